"""What a user's pip gets: the wheel's content and metadata, and what importing it costs."""
import ast, json, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

root = Path(__file__).resolve().parents[1]
modules = sorted(path.stem for path in (root/'camkd_nb').glob('*.py') if path.stem[0] != '_')
settings = ConfigParser(delimiters='=', interpolation=None)
settings.read(root/'settings.ini', encoding='utf-8')
pyproject = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))


def lines(key): return settings['DEFAULT'][key].strip().splitlines()


def python(code):
    "What `code` prints as JSON in a fresh process that imports camkd_nb from this checkout"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The unpacked wheel, built by way of the source distribution from a copy of the checkout"
    folder = tmp_path_factory.mktemp('wheel')
    listed = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True)
    for name in listed.stdout.split('\0'):
        if (root/name).is_file():
            (folder/'source'/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root/name, folder/'source'/name)
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, folder/'source'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    zipfile.ZipFile(next(folder.glob('*.whl'))).extractall(folder/'wheel')
    return folder/'wheel'


@pytest.fixture(scope='module')
def metadata(wheel): return PathDistribution(next(wheel.glob('*.dist-info')))


def test_wheel_holds_every_requirement_of_settings(metadata):
    required = set(map(Requirement, metadata.requires))
    assert required == {*map(Requirement, lines('requirements')),
                        *(Requirement(f'{line}; extra == "dev"') for line in lines('dev_requirements'))}


def test_wheel_holds_keywords_classifiers_and_commands(metadata):
    assert metadata.metadata['Keywords'].split(',') == lines('keywords')
    assert metadata.metadata.get_all('Classifier') == lines('classifiers')
    assert [f'{e.name}={e.value}' for e in metadata.entry_points.select(group='console_scripts')] == lines('console_scripts')


def test_wheel_holds_every_module_and_the_weights(wheel):
    shipped = {path.name for path in (wheel/'camkd_nb').iterdir()}
    assert shipped >= {path.name for path in (root/'camkd_nb').glob('*.py')}
    assert (wheel/'camkd_nb/weights/toy_teacher.pth').exists()
    weights = [path for path in (root/'camkd_nb').rglob('*.pth') if path.stat().st_size > 3_000_000]
    assert not weights, 'weights that ship have at most 3 MB'


def test_version_has_one_home(metadata):
    assert 'version' not in settings['DEFAULT'] and 'version' not in pyproject['project']
    init = ast.parse((root/'camkd_nb/__init__.py').read_text(encoding='utf-8'))
    [version] = [node.value.value for node in init.body if isinstance(node, ast.Assign) and node.targets[0].id == '__version__']
    assert metadata.version == version


def test_import_costs_little_more_than_fastai():
    "Best of three forks each, CPU seconds, with fastai.vision.all imported before the fork"
    costs = python(f'''
import importlib, json, multiprocessing, time
import fastai.vision.all

def cost(name):
    start = time.process_time()
    importlib.import_module('camkd_nb.' + name)
    return time.process_time() - start

with multiprocessing.get_context('fork').Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps({{name: min(pool.map(cost, [name] * 3, chunksize=1)) for name in {modules}}}))
''')
    assert {name: cost for name, cost in costs.items() if cost > 0.3} == {}


@pytest.mark.parametrize('module, heavy', [('voc', 'torch'), ('attention', 'fastai'), ('losses', 'fastai')])
def test_plain_modules_stay_plain(module, heavy):
    "voc needs Pillow and NumPy only; attention and losses serve any PyTorch loop"
    if module not in modules: pytest.skip(f'{module} is not there')
    assert not python(f'import json, sys, camkd_nb.{module}; print(json.dumps("{heavy}" in sys.modules))')
