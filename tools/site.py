"""Build the site from the notebooks, as they are stored: nothing is run, and warnings are errors.

    python tools/site.py                   # into _docs
    python tools/site.py --out FOLDER      # elsewhere; a folder that holds anything but an older site is refused
    python tools/site.py --page FOLDER     # with the live page that `camkd-demo --page FOLDER` made
"""
import argparse, re, shutil, sys, tempfile
from pathlib import Path

import nbformat
from sphinx.cmd.build import main as sphinx

import site_api, site_pages
from address import repository_url
from site_check import problems
from site_pages import contents, minutes, nbs, promise, read, slug, title
from site_sphinx import public_modules

root = Path(__file__).resolve().parents[1]
orphan = '---\norphan: true\n---\n'  # not in the sidebar
apart = {'Engine room': 'How the library keeps its promises: files, guards, layers, checkpoints. Each room is a notebook and exports one module.',
         'Benchmarks': 'What maps, training steps, loading and networks cost, measured.'}


def toctree(entries, caption=''):
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *entries, '```', ''])


def entry(page): return f'{title(page)} · {minutes(read(page))} min </{page.removesuffix(".ipynb")}>'


def listing(section, pages):
    "The page of a section that is folded away in the sidebar"
    rows = [f'| [{title(page)}](/{page}) | {promise(page)} | {minutes(read(page))} min |' for page in pages]
    return '\n'.join([f'# {section}', '', f'> {apart[section]}', '', '| page | promise | reading time |', '| --- | --- | --- |', *rows, '', toctree(map(entry, pages))])


def by_reading_order():
    "The modules that have public names, in the order of the pages"
    pages = [page for pages in contents().values() for page in pages]
    if missing := {page_of(module) for module in public_modules()} - {*pages}: raise LookupError(f'not listed in nbs/contents.yml: {sorted(missing)}')
    place = {module: pages.index(page_of(module)) for module in public_modules()}
    return sorted(place, key=place.get)


def page_of(module):
    "The notebook that exports a module"
    return site_api.source(module).cells[0][1]


def api_index():
    rows = [f'| `camkd_nb.{module}.{name}` | {site_api.cell_of_table(site_api.describe(module, name).words)} |' for module in by_reading_order() for name in public_modules()[module]]
    return '\n'.join(['# Reference', '', '> Every public name, in the order of the book. `from camkd_nb.all import *` gives them all.', '',
                      '| name | what it does |', '| --- | --- |', *rows, '', toctree(f'/api/{module}' for module in by_reading_order())])


class Stage:
    "The folder that Sphinx reads"
    def __init__(self, folder): self.folder, self.url = folder, repository_url()

    def write(self, name, text):
        file = self.folder/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf-8')

    def relink(self, page):
        "A function that maps the links of a page, a path below nbs/"
        def _map(target):
            name, mark, part = target.partition('#')
            part = slug(part.replace('-', ' ')) if part else ''
            if not name: return f'#{part}'
            file = (nbs/page).parent/name
            file = file.resolve()
            if file.suffix == '.ipynb': return name + mark + part
            return self.file(file, page)
        return _map

    def file(self, file, page):
        "Where a link to a file of the repository leads; the site takes a copy while the repository has no address"
        below = file.relative_to(root).as_posix()
        if file.suffix == '.md' or file.is_relative_to(nbs/'images'):
            target = below.removeprefix('nbs/')
            if not (self.folder/target).exists(): self.copy(file, target)
            return '/' + target
        if self.url: return f'{self.url}/{"tree" if file.is_dir() else "blob"}/main/{below}'
        if file.is_dir(): return None
        self.copy(file, f'files/{below}')
        return f'/files/{below}'

    def copy(self, file, target):
        (self.folder/target).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == '.md': self.write(target, orphan + self.markdown(file))
        else: shutil.copy(file, self.folder/target)

    def markdown(self, file):
        "A file of the repository as a page, whose first heading is its title"
        text = site_pages.relinked(file.read_text(encoding='utf-8'), lambda link: self.elsewhere(file, link))
        while not re.search(r'^# ', text, re.M): text = re.sub(r'^#(#+ )', r'\1', text, flags=re.M)
        return text

    def elsewhere(self, file, link):
        "A link of a Markdown file"
        if link[0] == '#': return link
        target, _, part = link.partition('#')
        target = (file.parent/target).resolve()
        if target.suffix == '.ipynb': return '/' + target.relative_to(nbs).as_posix() + (f'#{part}' if part else '')
        return self.file(target, '')

    def notebook(self, page):
        notebook = site_pages.shown(page, self.relink(page))
        if page == 'index.ipynb': notebook.cells.append(nbformat.v4.new_markdown_cell(self.whole_tree()))
        self.write(page, nbformat.writes(notebook))

    def whole_tree(self):
        found = []
        for section, pages in contents().items():
            pages = [page for page in pages if page != 'index.ipynb']
            if section not in apart: found.append(toctree(map(entry, pages), section))
        folded = [f'{section} </{slug(section)}>' for section in apart if section in contents()]
        return '\n'.join([*found, toctree([*folded, 'Reference </api/index>', 'Changes </CHANGELOG>', 'Contributing </CONTRIBUTING>'], 'Behind the book')])

    def fill(self):
        for section, pages in contents().items():
            for page in pages: self.notebook(page)
            if section in apart: self.write(f'{slug(section)}.md', listing(section, pages))
        self.write('api/index.md', api_index())
        for module, names in public_modules().items():
            self.write(f'api/{module}.md', site_api.page(module, names, promise(page_of(module)), where))
        for name in ('CHANGELOG.md', 'CONTRIBUTING.md'): self.copy(root/name, name)
        self.write('404.md', orphan + '# This page does not exist\n\n> The book has moved on, or the address has a slip in it.\n\nStart at [the first page](/index.ipynb), or search at the top of the sidebar.\n')


def where(name):
    "A link to the place of a name in its notebook"
    anchor = site_pages.places(name.page)[name.cell]
    return f'Source and tests: [{title(name.page)}](/{name.page}' + (f'#{anchor})' if anchor else ')')


minutes_mark = re.compile(r' · (\d+ min)(</a>)')


def finish(site):
    "What Sphinx has no word for: reading times set apart, the notebooks as they are for download"
    for file in site.rglob('*.html'):
        text = file.read_text(encoding='utf-8')
        file.write_text(minutes_mark.sub(r' <span class="minutes">\1</span>\2', text), encoding='utf-8')
    for pages in contents().values():
        for page in pages: shutil.copy(nbs/page, site/'_sources'/page)
    (site/'.nojekyll').touch()


def sitemap(site, base):
    "The addresses of all pages, for search engines"
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob('*.html') if path.name not in ('404.html', 'search.html') and '_static' not in path.parts)
    lines = [f'<url><loc>{base}{page}</loc></url>' for page in pages]
    (site/'sitemap.xml').write_text('\n'.join(['<?xml version="1.0" encoding="utf-8"?>', '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">', *lines, '</urlset>', '']), encoding='utf-8')


def build(folder):
    "Build the site in `folder`, which is empty; 0 when all went well"
    with tempfile.TemporaryDirectory(prefix='camkd-site-') as work:
        stage = Stage(Path(work)/'pages')
        stage.fill()
        status = sphinx(['-b', 'html', '-q', '-W', '--keep-going', '-c', str(root/'docs'), '-d', f'{work}/trees', str(stage.folder), str(folder)])
    if status: return status
    finish(folder)
    found = problems(folder)
    print(*found, sep='\n')
    return int(bool(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=root/'_docs', help='the folder of the site, _docs by default')
    out = parser.parse_args().out.resolve()
    if out.exists() and any(out.iterdir()) and not (out/'objects.inv').exists(): parser.error(f'{out} holds something else than a site')
    with tempfile.TemporaryDirectory(prefix='camkd-site-') as work:
        site = Path(work)/'site'
        if status := build(site): return status
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out)
    print(f'{out}/index.html')
    return 0


if __name__ == '__main__': sys.exit(main())
