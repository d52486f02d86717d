"""What the repository's address drives: badges, links to Colab, cells that set notebooks up there."""
import shutil, sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import colab, make_readme
from address import absolute_links, repository_url

url = 'https://github.com/someone/camkd_nb'


def test_notebooks_are_in_step_with_the_address():
    address = repository_url()
    assert [path.name for path in colab.notebooks() if colab.in_step(path, address) != path.read_text(encoding='utf-8')] == []


def test_readme_without_an_address_has_neither_badges_nor_colab():
    text = make_readme.build(url='')
    assert 'badge' not in text and 'olab.research' not in text


def test_readme_with_an_address_links_every_notebook():
    "But those of the engine room, which the others link"
    text = make_readme.build(url=url)
    assert f'[![tests]({url}/actions/workflows/test.yml/badge.svg)]' in text
    for path in colab.notebooks():
        if path.parent.name != 'engine': assert f'github/someone/camkd_nb/blob/main/{path.relative_to(root).as_posix()})' in text


def test_cells_come_and_go_without_a_trace(tmp_path):
    "And the cell clones what the link shows, from inside the notebook's own folder"
    (tmp_path/'nbs/tutorials').mkdir(parents=True)
    page = Path(shutil.copy(root/'nbs/tutorials/07_explorer.ipynb', tmp_path/'nbs/tutorials'))
    before = colab.in_step(page, '', tmp_path)
    page.write_text(with_cell := colab.in_step(page, url, tmp_path), encoding='utf-8')
    cell = nbformat.reads(with_cell, as_version=4).cells[1]
    assert f'git clone -q {url} ' in cell.source and '/content/camkd_nb/nbs/tutorials' in cell.source
    assert colab.in_step(page, url, tmp_path) == with_cell
    assert nbformat.reads(colab.in_step(page, '', tmp_path), as_version=4) == nbformat.reads(before, as_version=4)


def test_links_for_pages_elsewhere():
    "Pictures from where files lie as they are, other links to the page that shows the file; code stays"
    text = '![a](i/a.png) [b](b.md#c) [d](#d) [e](https://e.org) <img src="f.png">\n\n```bash\nx[0](y)\n```\n'
    assert absolute_links(text, '') == text
    files, page = 'https://raw.githubusercontent.com/someone/camkd_nb/main', f'{url}/blob/main'
    assert absolute_links(text, url) == text.replace('](i/', f']({files}/i/').replace('](b', f']({page}/b').replace('"f', f'"{files}/f')
    assert absolute_links('![a](a.png)', 'https://example.com/x') == '![a](https://example.com/x/raw/main/a.png)'


def test_another_host_is_refused():
    with pytest.raises(ValueError, match='github.com only'): colab.colab_link('https://example.com/someone/camkd_nb', 'nbs/00_voc.ipynb')
