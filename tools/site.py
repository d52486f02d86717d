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
from address import repository_url, site_address
from site_book import api_index, apart, book, contents, listing, page_of, public_modules, toctree
from site_check import problems
from site_pages import nbs, promise, slug, title

root = Path(__file__).resolve().parents[1]
orphan = '---\norphan: true\n---\n'  # not in the sidebar
lost_page = f'''{orphan}# This page does not exist

> The book has moved on, or the address has a slip in it.

Start at [the first page](/index.ipynb), or look for a word with the search field.
'''
fit = "const page = this.contentDocument; if (page) new ResizeObserver(() => this.style.height = page.documentElement.offsetHeight + 8 + 'px').observe(page.body)"
live_page = f'''# Try it in the browser

> Paint a picture: three networks answer, and show where they look, while you paint.

```{{raw}} html
<iframe class="live" src="live/index.html" title="Three networks and their class attention maps" loading="lazy" onload="{fit}"></iframe>
<p><a href="live/index.html">Open it alone</a></p>
```

The networks run in this page, on your machine. `camkd-demo --page FOLDER` makes one from networks of your own: see [the main job](/09_demo.ipynb).
'''

invitation = '[**Try it in the browser**](/live.md): paint a picture, and see what three networks answer and where they look.'


class Stage:
    "The folder that Sphinx reads"
    def __init__(self, folder, live=False): self.folder, self.live, self.url = folder, live, repository_url()

    def write(self, name, text):
        file = self.folder/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding='utf-8')

    def fill(self):
        for pages in contents().values():
            for page in pages: self.notebook(page)
        folded = {entry.title: entry for entry in book(self.live)['Behind the book']}
        for section in apart: self.write(f'{slug(section)}.md', listing(folded[section]))
        self.write('api/index.md', api_index(folded['Reference']))
        for module, names in public_modules().items(): self.write(f'api/{module}.md', site_api.page(module, names, promise(page_of(module)), where))
        for name in ('CHANGELOG.md', 'CONTRIBUTING.md'): self.write(name, self.markdown(root/name))
        self.write('404.md', lost_page)
        if self.live: self.write('live.md', live_page)

    def notebook(self, page):
        notebook = site_pages.shown(page, lambda link: self.target(nbs/page, link))
        if page == 'index.ipynb':
            trees = '\n'.join(toctree(entries, caption) for caption, entries in book(self.live).items())
            notebook.cells.append(nbformat.v4.new_markdown_cell(trees))
            if self.live: notebook.cells[0].source = notebook.cells[0].source.replace('\n## ', f'\n{invitation}\n\n## ', 1)
        self.write(page, nbformat.writes(notebook))

    def markdown(self, file):
        "A file of the repository as a page, whose first heading is its title"
        text = site_pages.relinked(file.read_text(encoding='utf-8'), lambda link: self.target(file, link))
        while not re.search(r'^# ', text, re.M): text = re.sub(r'^#(#+ )', r'\1', text, flags=re.M)
        return text

    def target(self, source, link):
        "Where a relative link of a file leads on the site, or None"
        name, mark, part = link.partition('#')
        anchor = mark + slug(part.replace('-', ' '))  # as JupyterLab writes it, or as here
        file = (source.parent/name).resolve() if name else source
        if not name: return anchor
        if file.suffix == '.ipynb': return f'/{file.relative_to(nbs).as_posix()}{anchor}'
        return self.file(file)

    def file(self, file):
        "Where a link to a file of the repository leads; the site takes a copy while the repository has no address"
        below = file.relative_to(root).as_posix()
        if file.is_relative_to(nbs/'images'): return self.copied(file, below.removeprefix('nbs/'))
        if file.suffix == '.md':
            if below not in ('CHANGELOG.md', 'CONTRIBUTING.md'): self.write(below, orphan + self.markdown(file))
            return f'/{below}'
        if self.url: return f'{self.url}/{"tree" if file.is_dir() else "blob"}/main/{below}'
        return None if file.is_dir() else self.copied(file, f'files/{below}')

    def copied(self, file, target):
        (self.folder/target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, self.folder/target)
        return f'/{target}'


def where(name):
    "A link to the place of a name in its notebook"
    anchor = site_pages.places(name.page)[name.cell]
    return f'Source and tests: [{title(name.page)}](/{name.page}' + (f'#{anchor})' if anchor else ')')


def finish(site, base):
    "What Sphinx has no word for"
    for pages in contents().values():
        for page in pages: shutil.copy(nbs/page, site/'_sources'/page)  # for download: as they are, with every cell
    (site/'.nojekyll').touch()  # on GitHub, folders whose names begin with an underscore are published too
    if not base: return
    sitemap(site, base)
    lost = site/'404.html'
    lost.write_text(anywhere(lost.read_text(encoding='utf-8'), base), encoding='utf-8')


def anywhere(text, base):
    "A page that is shown under any address: its links begin at the root"
    folder = re.sub('^https://[^/]*', '', base)
    return re.sub(r'\b(href|src)="(?![a-z]+:|#|/)', rf'\1="{folder}', text)


def sitemap(site, base):
    "The addresses of all pages, for search engines"
    pages = sorted(path.relative_to(site) for path in site.rglob('*.html') if path.name not in ('404.html', 'search.html'))
    lines = [f'<url><loc>{base}{page.as_posix()}</loc></url>' for page in pages if page.parts[0] not in ('_static', 'live')]
    head = '<?xml version="1.0" encoding="utf-8"?>', '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
    (site/'sitemap.xml').write_text('\n'.join([*head, *lines, '</urlset>', '']), encoding='utf-8')


def build(site, page=None):
    "Build the site in the new folder `site`; 0 when all went well"
    with tempfile.TemporaryDirectory(prefix='camkd-site-') as work:
        Stage(stage := Path(work)/'pages', bool(page)).fill()
        live = ['-D', 'live_page=1'] if page else []
        if status := sphinx(['-b', 'html', '-q', '-W', *live, '-c', str(root/'docs'), '-d', f'{work}/trees', str(stage), str(site)]): return status
    if page: shutil.copytree(page, site/'live')
    found = problems(site)
    print(*found, sep='\n', end='')
    finish(site, site_address(repository_url()))
    return int(bool(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=root/'_docs', help='the folder of the site, _docs by default')
    parser.add_argument('--page', type=Path, help='a folder that `camkd-demo --page` made')
    args = parser.parse_args()
    out = args.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out/'objects.inv').exists(): parser.error(f'{out} holds something else than a site')
    if args.page and not (args.page/'index.html').exists(): parser.error(f'{args.page} has no index.html: make it with `camkd-demo --page {args.page}`')
    with tempfile.TemporaryDirectory(prefix='camkd-site-') as work:
        site = Path(work)/'site'
        if status := build(site, args.page): return status
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out)
    print(f'{out}/index.html')
    return 0


if __name__ == '__main__': sys.exit(main())
