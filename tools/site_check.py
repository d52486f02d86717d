"Every link inside a built site: does its file exist, and its anchor? And has every picture its words?"
import re
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

tag = re.compile(r'<([a-zA-Z][\w-]*)((?:\s+[\w:-]+(?:=(?:"[^"]*"|\'[^\']*\'|[^\s>]*))?)*)\s*/?>')
attribute = re.compile(r'\s(id|name|href|src|alt)="([^"]*)"')


class Page:
    "The anchors of a page, where its links lead, and its pictures without an alternative text"
    def __init__(self, path):
        self.anchors, self.links, self.wordless = set(), set(), []
        for name, attributes in tag.findall(path.read_text(encoding='utf-8')):
            found = {key: unescape(value) for key, value in attribute.findall(attributes)}
            self.anchors |= {found[key] for key in ('id', 'name') if key in found}
            self.links |= {found[key] for key in ('href', 'src') if found.get(key)}
            if name == 'img' and not found.get('alt', '').strip(): self.wordless.append(found.get('src', ''))


def problems(site):
    "What is wrong, one line each: page, link and reason"
    pages = {path.resolve(): Page(path) for path in sorted(Path(site).rglob('*.html')) if not {'_static', 'live'} & {*path.relative_to(site).parts}}
    found = []
    for path, page in pages.items():
        where = path.relative_to(Path(site).resolve())
        found += [f'{where}: {link}: {reason}' for link in sorted(page.links) if (reason := lost(path, link, pages))]
        found += [f'{where}: {picture}: a picture without an alternative text' for picture in page.wordless]
    return found


def lost(path, link, pages):
    "Why a link leads nowhere, or None"
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None  # of the web: nothing here can follow it
    file = (path.parent/unquote(parts.path)).resolve() if parts.path else path
    if file.is_dir(): file /= 'index.html'
    if not file.exists(): return 'no such file'
    if parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors: return 'no such anchor'
