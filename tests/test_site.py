"The site: built once from the stored notebooks, then read as a file, by a browser and by axe-core."
import importlib.util, os, re, subprocess, sys, zlib
from contextlib import contextmanager
from html import unescape
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.append(str(root/'tools'))
pytest.importorskip('myst_nb', reason='sphinx and myst-nb are not installed')

import site_api, site_check, site_pages, site_sphinx
from address import site_address
from site_book import contents
from test_browser import artefacts, chromium, quiet

looked_at = 'index', '05_attention', '06_losses', 'tutorials/03_compare', 'api/losses'
long_words = 'api/backbones', 'tutorials/05_scale_up', 'engine/quantize'
tags = re.compile(r'<[^>]*>')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The whole site, with a live page that is a stub"
    folder = tmp_path_factory.mktemp('site')
    (folder/'live').mkdir()
    (folder/'live/index.html').write_text('<!doctype html><html lang="en"><title>live</title><p>live</p></html>')
    command = [sys.executable, 'tools/site.py', '--out', str(folder/'out'), '--page', str(folder/'live')]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder/'out'


def html(site, page): return (site/f'{page}.html').read_text(encoding='utf-8')
def code(text): return unescape('\n'.join(tags.sub('', block) for block in re.findall(r'<pre>(.*?)</pre>', text, re.S)))
def pages(): return [page.removesuffix('.ipynb') for listed in contents().values() for page in listed]
def lines(cell): return {line.strip() for line in cell.source.splitlines() if len(line) > 40 and line[0] != '#'}


def test_what_is_hidden_is_hidden(site):
    "No line of a hidden cell is on its page, unless a shown one has it too; and no directive is"
    for page in pages():
        cells = [cell for cell in nbformat.read(root/f'nbs/{page}.ipynb', as_version=4).cells if cell.cell_type == 'code']
        hidden = [cell for cell in cells if re.search(r'^#\| *hide$', cell.source, re.M)]
        secret = set().union(*map(lines, hidden)) - set().union(*(lines(cell) for cell in cells if cell not in hidden))
        shown = code(html(site, page))
        assert '#|' not in re.sub(r'[\'"`]#\|', '', shown) and {line for line in secret if line in shown} == set(), page


def test_every_page_is_in_the_sidebar_of_every_page(site):
    for page in 'index', 'engine/files', 'api/data':
        text, up = html(site, page), '../'*page.count('/')
        assert [other for other in pages() if other not in (page, 'index') and f'href="{up}{other}.html"' not in text
                and f'href="{os.path.relpath(other, os.path.dirname(page) or ".")}.html"' not in text] == []


def test_names_lead_to_the_reference_and_back(site):
    assert 'href="api/data.html#camkd_nb.data.voc_dls"' in html(site, '02_data')
    assert 'href="voc.html#camkd_nb.voc.VOID"' in html(site, 'api/index')
    text = html(site, 'api/data')
    assert 'id="camkd_nb.data.voc_dls"' in text and 'href="../02_data.html#one-call"' in text
    assert 'side of the square batches, pixels' in text and 'https://docs.fast.ai/data.core.html' in text


def test_other_sites_can_link_here(site):
    "objects.inv has an entry for each public name"
    inventory = zlib.decompress((site/'objects.inv').read_bytes().split(b'\n', 4)[4]).decode()
    found = {line.split()[0] for line in inventory.splitlines() if ' py:' in line}
    assert {f'camkd_nb.{module}.{name}' for name, module in site_api.public().items()} <= found


def test_equations_are_numbered_and_found(site):
    text = html(site, '03_metrics')
    assert 'id="equation-2"' in text and 'href="#equation-2"' in text and '<math' in text and '\\tag' not in text


def test_notebooks_are_served_as_they_are(site):
    assert (site/'_sources/02_data.ipynb').read_bytes() == (root/'nbs/02_data.ipynb').read_bytes()


def test_those_who_share_a_page_see_its_title(site):
    assert 'property="og:title" content="Class attention maps"' in html(site, '05_attention')


def test_the_live_page_is_framed(site):
    assert 'src="live/index.html"' in html(site, 'live') and 'Try it in the browser: paint' in tags.sub('', html(site, 'index'))


# The tools by themselves

def cell(source, **more): return nbformat.v4.new_code_cell(source, **more)


def test_directives():
    assert site_pages.shown_code(cell('#| hide\nx = 1'), False) is None
    assert site_pages.shown_code(cell('#| default_exp voc'), False) is None
    assert site_pages.shown_code(cell('#| export\n#| slow\nx = 1'), False).source == 'x = 1'
    assert site_pages.shown_code(cell('#| code-fold: true\nx = 1'), False).metadata.tags == ['hide-input']
    assert site_pages.shown_code(cell('#| code-fold: true\nx = 1'), True).metadata.tags == ['hide-cell']  # a solution
    output = nbformat.v4.new_output('stream', text='1')
    assert site_pages.shown_code(cell('#| hide_output\nx', outputs=[output]), False).outputs == []
    assert site_pages.shown_code(cell('#| echo: false\nx', outputs=[output]), False).metadata.tags == ['remove-input']
    assert site_pages.shown_code(cell('#| echo: false\nx'), False) is None


def test_pictures_get_words():
    picture = nbformat.v4.new_output('display_data', {'image/png': 'aGk='})
    text = nbformat.v4.new_markdown_cell
    with_caption, without = site_pages.with_words([text('## Maps'), cell('a', outputs=[picture]), text('*Red speaks `for` it. More.*\n\nProse.'), cell('b', outputs=[picture])])[1::2]
    assert [shown.metadata['mystnb']['image']['alt'] for shown in (with_caption, without)] == ['Red speaks for it. More.', 'Figure: Maps']


def test_reading_time():
    words, statement = nbformat.v4.new_markdown_cell('word ' * 400), cell('# a comment\nx = 1\n' * 12)
    assert site_pages.minutes(nbformat.v4.new_notebook(cells=[words, statement])) == 3


def test_links_of_prose_alone():
    text = site_pages.relinked('[a](b.md) `[a](b.md)` [`c`](c.md#d) [e](https://e.org) [f](g)', {'b.md': '/b', 'c.md#d': '/c'}.get)
    assert text == '[a](/b) `[a](b.md)` [`c`](/c) [e](https://e.org) f'


def command():
    "tools/site.py, which has the name of a module of Python"
    spec = importlib.util.spec_from_file_location('site_command', root/'tools/site.py')
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_other_folders_are_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path/'mine.txt').write_text('mine')
    monkeypatch.setattr(sys, 'argv', ['site.py', '--out', str(tmp_path)])
    with pytest.raises(SystemExit): command().main()
    assert 'something else' in capsys.readouterr().err and (tmp_path/'mine.txt').read_text() == 'mine'


def test_what_needs_an_address(tmp_path):
    tool, base = command(), site_address('https://github.com/Someone/camkd_nb')
    assert base == 'https://someone.github.io/camkd_nb/' and site_address('') == site_address('https://example.org/a/b') == ''
    assert tool.anywhere('<a href="a/b.html"><a href="#c"><a href="https://e.org">', base) == '<a href="/camkd_nb/a/b.html"><a href="#c"><a href="https://e.org">'
    for name in 'a.html', '404.html', 'search.html': (tmp_path/name).touch()
    tool.sitemap(tmp_path, base)
    assert re.findall('<loc>(.*?)</loc>', (tmp_path/'sitemap.xml').read_text()) == [f'{base}a.html']


module = '''"words"
# %% ../nbs/x.ipynb #cell1
def resize(
    x: Tensor,  # images, (B, 3, H, W)
    size: Iterable[int] = (1, 2),  # (H, W)
    *,
    mode: str | None = None,  # 'nearest' | 'linear'
) -> Tensor:  # (B, 3, *size)
    "Another size."
@dataclass
class View:
    "What is seen."
    box: tuple[int, ...]  # pixels
    def area(self) -> int: "Its area."
    def _hidden(self): "No."
'''


@pytest.fixture
def described(tmp_path, monkeypatch):
    (tmp_path/'x.py').write_text(module)
    monkeypatch.setattr(site_api, 'package', tmp_path)
    yield lambda name: site_api.describe.__wrapped__('x', name)
    site_api.source.cache_clear()


def test_a_function_in_its_own_words(described):
    found = described('resize')
    assert found.signature == "(x: Tensor, size: Iterable[int] = (1, 2), *, mode: str | None = None) -> Tensor"
    assert [p.meaning for p in found.parameters] == ['images, (B, 3, H, W)', '(H, W)', "'nearest' | 'linear'"]
    assert (found.words, found.returns.meaning, found.cell) == ('Another size.', '(B, 3, *size)', 'cell1')
    assert "| `mode` | `str \\| None` | `None` | 'nearest' \\| 'linear' |" in site_api.table(found.parameters)


def test_a_class_in_its_own_words(described):
    found = described('View')
    assert found.signature == '(box: tuple[int, ...])' and found.parameters[0].meaning == 'pixels'
    assert [member.name for member in found.members] == ['area']


@pytest.mark.parametrize('broken, reason', [('b.html', 'no such file'), ('a.html#x', 'no such anchor'), ('#x', 'no such anchor')])
def test_a_broken_link_is_found(tmp_path, broken, reason):
    (tmp_path/'a.html').write_text(f'<p id="here"><a href="#here">a</a> <a class="l" href="{broken}">b</a> <a href="https://e.org/x">c</a></p>')
    assert site_check.problems(tmp_path) == [f'a.html: {broken}: {reason}']


def test_a_picture_without_words_is_found(tmp_path):
    (tmp_path/'a.html').write_text('<img alt="A cat" src="a.png"><img src="a.png">')
    (tmp_path/'a.png').touch()
    assert site_check.problems(tmp_path) == ['a.html: a.png: a picture without an alternative text']


def test_formulas():
    for formula in r'\big(\tfrac12 a\big)', r'\frac1{|V|}\sum_{u\in V}', r'\Big\|\frac{a}{\|a\|}\Big\|^2':
        assert site_sphinx.mathml(formula).startswith('<math')
    with pytest.raises(Exception, match='nosuch'): site_sphinx.mathml(r'\nosuch')


# In a browser

@contextmanager
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as hands:
        opened = hands.chromium.launch(executable_path=chromium, args=quiet)
        try: yield opened
        finally: opened.close()


def screenshots(opened, site, theme):
    "Pictures of five pages in three widths; the pages that are wider than a phone"
    wide = []
    for width in 390, 800, 1280:
        context = opened.new_context(viewport={'width': width, 'height': 1000}, color_scheme=theme)
        tab = context.new_page()
        for name in looked_at:
            if too_wide(tab, site, name): wide.append(f'{name} at {width}')
            tab.screenshot(path=str(artefacts/f'site_{name.replace("/", "_")}_{width}_{theme}.png'))
        if width == 390: wide += [name for name in long_words if too_wide(tab, site, name)]
        context.close()
    return wide


def too_wide(tab, site, name):
    tab.goto((site/f'{name}.html').as_uri())
    return tab.evaluate('document.documentElement.scrollWidth > innerWidth')


@pytest.mark.skipif(chromium is None, reason='no browser')
@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_in_a_browser(site, theme):
    "Nothing scrolls sideways; contrast, names and roles pass; the keyboard finds its way"
    pytest.importorskip('playwright.sync_api')
    rules = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    artefacts.mkdir(exist_ok=True)
    with browser() as opened:
        assert screenshots(opened, site, theme) == []
        tab = opened.new_context(viewport={'width': 1280, 'height': 1000}, color_scheme=theme).new_page()
        for name in '05_attention', 'api/losses', 'live':
            tab.goto((site/f'{name}.html').as_uri())
            found = rules.run(tab, options={'iframes': False}).response['violations']
            assert [(rule['id'], [node['html'] for node in rule['nodes'][:3]]) for rule in found] == [], name
        tab.goto((site/'05_attention.html').as_uri())
        tab.keyboard.press('Tab')
        assert 'Skip' in tab.evaluate('document.activeElement.textContent')
        fold = tab.locator('details.hide').first
        fold.locator('summary').press('Enter')
        assert fold.evaluate('fold => fold.open')
        paper = tab.locator('.cell_output img').first.evaluate('picture => getComputedStyle(picture).backgroundColor')
        assert theme == 'light' or paper == 'rgb(255, 255, 255)'
