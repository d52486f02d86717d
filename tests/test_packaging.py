"""What a user's pip gets: the wheel's content and metadata, and what importing it costs."""
import ast, json, re, shutil, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from importlib.metadata import Distribution, PathDistribution, packages_distributions
from pathlib import Path

import pytest
import tomllib, yaml
from packaging.requirements import Requirement

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
from sources import sources

modules = sorted(path.stem for path in (root/'camkd_nb').glob('*.py') if path.stem[0] != '_')
settings = ConfigParser(delimiters='=', interpolation=None)
settings.read(root/'settings.ini', encoding='utf-8')
pyproject = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))


extras = {key.removesuffix('_requirements') for key in settings['DEFAULT'] if key.endswith('_requirements')}


def lines(key): return settings['DEFAULT'][key].strip().splitlines()


def python(code):
    "What `code` prints as JSON in a fresh process that imports camkd_nb from this checkout"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def copy_sources(folder):
    for name in sources(root):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, folder/name)
    return folder


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A folder with the source distribution, and the wheel built by way of it from a copy of the checkout, unpacked as well"
    folder = tmp_path_factory.mktemp('built')
    source = copy_sources(folder/'source')
    done = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    zipfile.ZipFile(next(folder.glob('*.whl'))).extractall(folder/'wheel')
    return folder


@pytest.fixture(scope='module')
def wheel(built): return built/'wheel'


@pytest.fixture(scope='module')
def metadata(wheel): return PathDistribution(next(wheel.glob('*.dist-info')))


def test_wheel_holds_every_requirement_of_settings(metadata):
    required = set(map(Requirement, metadata.requires))
    assert required == {*map(Requirement, lines('requirements')),
                        *(Requirement(f'{line}; extra == "{extra}"') for extra in extras for line in lines(f'{extra}_requirements'))}
    assert set(metadata.metadata.get_all('Provides-Extra')) == extras


def test_wheel_holds_keywords_classifiers_and_commands(metadata):
    assert metadata.metadata['Keywords'].split(',') == lines('keywords')
    assert metadata.metadata.get_all('Classifier') == lines('classifiers')
    assert [f'{e.name}={e.value}' for e in metadata.entry_points.select(group='console_scripts')] == lines('console_scripts')


def test_wheel_holds_every_module_and_the_weights(wheel):
    shipped = {path.name for path in (wheel/'camkd_nb').iterdir()}
    assert shipped >= {path.name for path in (root/'camkd_nb').glob('*.py')}
    assert (wheel/'camkd_nb/weights/toy_teacher.pth').exists()
    assert (wheel/'camkd_nb/py.typed').exists(), 'type checkers skip a package without it'
    weights = [path for path in (root/'camkd_nb').rglob('*.pth') if path.stat().st_size > 3_000_000]
    assert not weights, 'weights that ship have at most 3 MB'


def test_source_distribution_can_run_its_tests(built):
    with tarfile.open(next(built.glob('*.tar.gz'))) as archive: held = {name.partition('/')[2] for name in archive.getnames()}
    assert not set(sources(root)) - held


def imported(path):
    "The top-level modules that a file imports from elsewhere, also inside functions"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): found |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.partition('.')[0])
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'onnx_package' and isinstance(node.args[0], ast.Constant): found.add(node.args[0].value.partition('.')[0])
    return found - sys.stdlib_module_names - {'camkd_nb'}


def test_requirements_are_what_the_package_imports():
    used = set().union(*map(imported, (root/'camkd_nb').glob('*.py')))
    distributions = packages_distributions()  # PIL -> pillow
    needed = {distributions[module][0].lower() for module in used} | {'onnxscript'}  # which torch.onnx imports
    keys = [key for key in settings['DEFAULT'] if key.endswith('requirements') and key not in ('dev_requirements', 'docs_requirements')]
    assert {Requirement(line).name.lower() for key in keys for line in lines(key)} == needed


def test_lower_bounds_can_be_tried():
    "`.ci/run --lowest` turns `name>=1.2` into `name==1.2.*`"
    assert [line for line in lines('requirements') if not re.fullmatch(r'[a-z]+>=[0-9.]+', line)] == []


def test_every_python_of_ci_is_a_classifier():
    jobs = yaml.safe_load((root/'.github/workflows/test.yml').read_text(encoding='utf-8'))['jobs']
    tried = {leg['python'] for leg in jobs['test']['strategy']['matrix']['include']}
    named = {line.rpartition(' ')[2] for line in lines('classifiers') if re.search(r':: 3\.\d+$', line)}
    assert tried <= named and pyproject['project']['requires-python'] == f'>={min(tried)}'


def test_pages_of_ci_are_there():
    text = (root/'.github/workflows/test.yml').read_text(encoding='utf-8')
    assert [page for page in re.findall(r'\b(?:nbs|tests)/[\w./-]+', text) if not (root/page).exists()] == []


def described(folder, url):
    "The description that the package index shows when settings.ini has this `repository_url`"
    text = (root/'settings.ini').read_text(encoding='utf-8')
    set_url = re.sub(r'^repository_url =.*$', f'repository_url = {url}', text, flags=re.M)
    source = copy_sources(folder/'source')
    (source/'settings.ini').write_text(set_url, encoding='utf-8')
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', folder], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metadata = Distribution.at(folder/'camkd_nb.egg-info').metadata
    assert metadata['Description-Content-Type'] == 'text/markdown'
    return metadata.get_payload()


def targets(text): return re.findall(r'\]\(([^)\s]+)\)|\bsrc="([^"]+)"', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S))


def test_description_is_the_readme_while_there_is_no_address(tmp_path):
    assert described(tmp_path, '').strip() == (root/'README.md').read_text(encoding='utf-8').strip()


def test_description_has_full_addresses_where_there_is_one(tmp_path):
    text = described(tmp_path, 'https://github.com/someone/camkd_nb')
    assert '](https://raw.githubusercontent.com/someone/camkd_nb/main/nbs/images/' in text
    assert '](https://github.com/someone/camkd_nb/blob/main/nbs/00_voc.ipynb)' in text
    assert not [found for found in targets(text) if not re.match('https://|#', ''.join(found))]


def test_version_has_one_home(metadata):
    assert 'version' not in settings['DEFAULT'] and 'version' not in pyproject['project']
    init = ast.parse((root/'camkd_nb/__init__.py').read_text(encoding='utf-8'))
    [version] = [node.value.value for node in init.body if isinstance(node, ast.Assign) and node.targets[0].id == '__version__']
    assert metadata.version == version


widgets = {'IPython', 'comm', 'ipywidgets', 'jupyterlab_widgets', 'pygments', 'traitlets', 'widgetsnbextension'}  # what ipywidgets loads


def test_import_loads_little_more_than_fastai():
    "The packages that a module loads on top of `fastai.vision.all`, each module in a fork of its own"
    loaded = python(f'''
import importlib, json, multiprocessing, sys
import fastai.vision.all

def packages(): return {{name.partition('.')[0] for name in sys.modules}} - set(sys.stdlib_module_names) - {{'camkd_nb'}}

def loads(name):
    before = packages()
    importlib.import_module('camkd_nb.' + name)
    return sorted(packages() - before)

with multiprocessing.get_context('fork').Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(dict(zip({modules}, pool.map(loads, {modules}, chunksize=1)))))
''')
    extra = {name: set(found) - (widgets if name in ('explore', 'all') else set()) for name, found in loaded.items()}
    assert {name: found for name, found in extra.items() if found} == {}


public_names = '''
    toy_voc voc_dls VOC_CLASSES VOID read_mask voc_check voc_download voc_gather
    SegLoss MeanIoU PixelAccuracy evaluate predict
    deeplabv3 pspnet build_model toy_teacher toy_student voc_teacher cost_table
    class_attention ClassMaps show_attention AttentionExplorer
    ClassAttention PixelKD ChannelKD AttentionTransfer PairwiseKD IFV FeatureKD DIST PseudoLabels Relative Term Distiller
    Distill CAMDistill Checkpoint
    Study Method run_study read_runs paired_gains plot_gains'''.split()


def test_one_import_gives_every_public_name_and_loads_what_is_declared():
    "`from camkd_nb.all import *` in a fresh process: on top of fastai.vision.all only requirements and what they load"
    declared = [Requirement(line).name for line in lines('requirements')]
    modules_of = {module for module, names in packages_distributions().items() if {name.lower() for name in names} & set(declared)}
    given, loaded = python('''
import json, sys
import fastai.vision.all

def packages(): return {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names) - {'camkd_nb'}

before, given = packages(), {}
exec('from camkd_nb.all import *', given)
kinds = {name: type(value).__name__ for name, value in given.items() if name != '__builtins__'}
print(json.dumps([kinds, sorted(packages() - before)]))
''')
    assert set(public_names) - set(given) == set()
    assert [name for name, kind in given.items() if name[0] == '_' or kind == 'module'] == []
    assert set(loaded) <= modules_of | widgets


@pytest.mark.parametrize('module, heavy', [('voc', 'torch'), *((module, 'fastai') for module in ('attention', 'losses', 'rivals', 'terms', 'distiller', 'layers', 'tensors', 'regions'))])
def test_plain_modules_stay_plain(module, heavy):
    "voc needs Pillow and NumPy only; attention, losses, terms and the distiller serve any PyTorch loop"
    assert not python(f'import json, sys, camkd_nb.{module}; print(json.dumps("{heavy}" in sys.modules))')
