"Every link inside a built site: does its file exist, and its anchor?"
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "The anchors of a page, and where its links lead"
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.without_words = set(), set(), []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ('id', 'name') if found.get(key)}
        self.links |= {found[key] for key in ('href', 'src') if found.get(key)}
        if name == 'img' and not (found.get('alt') or '').strip(): self.without_words.append(found.get('src', ''))


def problems(site):
    "What is wrong, one line each: page, link and reason"
    pages = {path.resolve(): Page(path) for path in sorted(Path(site).rglob('*.html')) if '_static' not in path.relative_to(site).parts}
    found = []
    for path, page in pages.items():
        where = path.relative_to(Path(site).resolve())
        found += [f'{where}: {link}: {reason}' for link in sorted(page.links) if (reason := lost(path, link, pages))]
        found += [f'{where}: {picture}: a picture without an alternative text' for picture in page.without_words]
    return found


def lost(path, link, pages):
    "Why a link leads nowhere, or None"
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None  # of the web: nothing here can follow it
    file = (path.parent/unquote(parts.path)).resolve() if parts.path else path
    if file.is_dir(): file /= 'index.html'
    if not file.exists(): return 'no such file'
    if parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors: return 'no such anchor'
