"""What every notebook and module promises, whatever it is about."""
import ast, re
from pathlib import Path

import pytest
from nbdev.process import NBProcessor

root = Path(__file__).resolve().parents[1]
notebooks = sorted(path for path in (root/'nbs').rglob('*.ipynb') if not any(part[0] in '_.' for part in path.relative_to(root).parts))
chapters = [path for path in notebooks if path.parent.name == 'engine' or path.parent.name == 'nbs' and re.match(r'\d\d_', path.name)]
# The house from the ground up: a module imports only from those before it. Numbered pages are the course, the others
# the engine room.
floors = """explain files lettering photos lists trees 00_voc signs inspection check outlines colours pairs plans gather
            download toytree 01_toyvoc loading views samples 02_data tensors runtime layouts layers probes stages weights heads
            backbones cost 04_models published watch pixels 03_metrics evaluate regions sums gradients second_order readings methods 05_attention graphs export quantize
            terms asking 06_losses rivals classes inputs pulls teachercheck distiller groups columns unlabelled events
            07_distill identity checkpoint drawing panels 08_figures training teachers webruntime livepage arguments outcomes 09_demo rows study
            pool board explore all""".split()
modules = [re.sub(r'^\d\d_', '', page) for page in floors]
machine_path = re.compile(r'(?<![\w.:/<+=~…])/[\w.-]+/[\w./-]+')
widget_view = 'application/vnd.jupyter.widget-view+json'
data_uri = re.compile(r'base64,[\w+/=]+')


def over(paths): return pytest.mark.parametrize('path', paths, ids=lambda path: path.relative_to(root/'nbs').as_posix())
def cells(path, kind): return [cell for cell in NBProcessor(path).nb.cells if cell.cell_type == kind]
def outputs(path): return [output for cell in cells(path, 'code') for output in cell.outputs]


def texts(output):
    "The text that a stored output shows"
    parts = [output.get('text', ''), *(value for mime, value in output.get('data', {}).items() if mime.startswith('text/'))]
    return [data_uri.sub('', ''.join(part)) for part in parts]


@over(notebooks)
def test_notebook_opens_with_title_and_promise(path):
    first = cells(path, 'markdown')[0].source
    assert re.match(r'# \S', first) and re.search(r'^> \S', first, re.M)


@over(notebooks)
def test_stored_outputs_are_clean(path):
    assert not [output.ename for output in outputs(path) if output.output_type == 'error']
    assert not [output for output in outputs(path) if widget_view in output.get('data', {})]  # a page without a kernel cannot show it: keep the picture beside it alone
    assert not [found for output in outputs(path) for text in texts(output) for found in machine_path.findall(text)]


@over(notebooks)
def test_notebook_is_small(path): assert path.stat().st_size < 1_500_000


@over(notebooks)
def test_page_is_in_the_contents(path):
    page = path.relative_to(root/'nbs').as_posix()
    assert f'- {page}\n' in (root/'nbs/contents.yml').read_text(encoding='utf-8')


@over(chapters)
def test_imports_have_cells_of_their_own(path):
    "A reader finds what a page imports at once; exported code beside an import is copied with it"
    def mixed(cell):
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for tree in cell.parsed_() or [] for node in ast.walk(tree)]
        return any(imports) and not all(isinstance(tree, (ast.Import, ast.ImportFrom)) for tree in cell.parsed_())
    exported = {'export', 'exports', 'exporti'}
    assert not [cell.source for cell in cells(path, 'code') if not exported & cell.directives_.keys() and mixed(cell)]


def test_every_page_of_the_house_has_its_floor():
    "And each exports the module of its name"
    assert sorted(floors) == sorted(path.stem for path in chapters)
    exported = {re.search(r'#\| *default_exp (\w+)', path.read_text(encoding='utf-8'))[1] for path in chapters}
    assert exported == set(modules) == {path.stem for path in (root/'camkd_nb').glob('*.py') if path.stem[0] != '_'}


def imports_of(module):
    "Pairs of a module of the package and a name that is imported from it; for `from . import x` the name is None"
    tree = ast.parse((root/f'camkd_nb/{module}.py').read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level: continue
        yield from ((node.module.split('.')[0], name.name) if node.module else (name.name, None) for name in node.names)


@pytest.mark.parametrize('module', modules)
def test_module_imports_only_from_those_below(module):
    assert {other for other, _ in imports_of(module)} - {'__version__'} <= set(modules[:modules.index(module)])


@pytest.mark.parametrize('module', modules)
def test_no_private_name_crosses_a_module(module):
    assert [name for _, name in imports_of(module) if name and name[0] == '_' and name != '__version__'] == []
