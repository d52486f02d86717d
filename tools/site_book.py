"What the site consists of: sections, pages, and the order in which they are read."
from dataclasses import dataclass
from functools import cache
from html import escape

import yaml

import site_api
from site_pages import minutes, nbs, promise, read, slug, title

# Sections that are folded away, each behind a page of its own.
apart = {'Engine room': 'How the library keeps its promises: files, guards, layers, checkpoints. Each room is a notebook and exports one module.',
         'Benchmarks': 'What maps, training steps, loading and networks cost, measured.'}


@dataclass
class Entry:
    "A line of the sidebar"
    title: str
    name: str  # as Sphinx calls the page
    minutes: int = 0
    pages: list | tuple = ()  # those that are folded away behind it


@cache
def contents():
    "Section -> pages, paths below nbs/, as nbs/contents.yml lists them"
    return yaml.safe_load((nbs/'contents.yml').read_text(encoding='utf-8'))


@cache
def public_modules():
    "Module -> its public names, in the order of the pages"
    found, place = {}, [page for pages in contents().values() for page in pages]
    for name, module in site_api.public().items(): found.setdefault(module, []).append(name)
    if missing := {page_of(module) for module in found} - {*place}: raise LookupError(f'nbs/contents.yml does not list {sorted(missing)}')
    return {module: found[module] for module in sorted(found, key=lambda module: place.index(page_of(module)))}


def page_of(module):
    "The notebook that exports a module"
    return site_api.source(module).cells[0][1]


def notebook_entry(page): return Entry(title(page), page.removesuffix('.ipynb'), minutes(read(page)))


@cache
def book(live=False):
    "Caption -> entries of the sidebar; `live`: with the page whose networks run in the browser"
    found = {section: [notebook_entry(page) for page in pages if page != 'index.ipynb'] for section, pages in contents().items()}
    folded = [Entry(section, slug(section), pages=found.pop(section)) for section in apart if section in found]
    if live: found['Course'].insert(0, Entry('Try it in the browser', 'live'))
    reference = Entry('Reference', 'api/index', pages=[Entry(f'camkd_nb.{module}', f'api/{module}') for module in public_modules()])
    return found | {'Behind the book': [*folded, reference, Entry('Changes', 'CHANGELOG'), Entry('Contributing', 'CONTRIBUTING')]}


def toctree(entries, caption=''):
    return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *(f'/{entry.name}' for entry in entries), '```', ''])


def listing(folded):
    "The page of a section that is folded away"
    pages = contents()[folded.title]
    rows = [f'| [{title(page)}](/{page}) | {promise(page)} | {minutes(read(page))} min |' for page in pages]
    head = [f'# {folded.title}', '', f'> {apart[folded.title]}', '', '| page | promise | reading time |', '| --- | --- | --- |']
    return '\n'.join([*head, *rows, '', toctree(folded.pages)])


def api_index(reference):
    found = [(module, site_api.describe(module, name)) for module, names in public_modules().items() for name in names]
    rows = [f'| `{module}.{one.name}` | {site_api.cell_of_table(one.words)} |' for module, one in found]
    return '\n'.join(['# Reference', '', '> Every public name, in the order of the book. `from camkd_nb.all import *` gives them all.', '',
                      '| name | what it does |', '| --- | --- |', *rows, '', toctree(reference.pages)])


def line(entry, here, pathto, depth=1):
    "An entry of the sidebar in HTML, seen from the page `here`"
    inside = here == entry.name or here in [page.name for page in entry.pages]
    time = f' <span class="minutes">{entry.minutes} min</span>' if entry.minutes else ''
    mark = ' current active' if inside else ''
    words, here_mark = escape(entry.title.replace('`', '')), ' aria-current=page' if here == entry.name else ''
    link = f'<a class="reference internal{mark}" href="{pathto(entry.name)}"{here_mark}>{words}{time}</a>'
    if not entry.pages: return f'<li class="toctree-l{depth}{mark}">{link}</li>'
    pages = ''.join(line(page, here, pathto, 2) for page in entry.pages)
    toggle = f'<summary aria-label="{entry.title}: its pages"><span class="toctree-toggle"><i class="fa-solid fa-chevron-down"></i></span></summary>'
    return f'<li class="toctree-l{depth} has-children{mark}">{link}<details{" open" if inside else ""}>{toggle}<ul>{pages}</ul></details></li>'


def sidebar(here, pathto, live=False):
    "The sidebar of the page `here` in HTML"
    return '\n'.join(f'<p class="caption" role="heading" aria-level="2"><span class="caption-text">{caption}</span></p>\n'
                     f'<ul class="nav bd-sidenav">{"".join(line(entry, here, pathto) for entry in entries)}</ul>' for caption, entries in book(live).items())
