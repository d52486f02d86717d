"""The repository's address, and what depends on it outside the repository. Needs nothing but Python: `setup.py` uses it."""
import re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]
fenced = re.compile(r'(^```.*?^```$)', re.M | re.S)
relative = r'(?![a-z][a-z0-9+.-]*:|[#/])([^)"\s]+)'  # neither a full address nor a place on the page
picture = re.compile(rf'(!\[[^]]*\]\(|\bsrc="){relative}', re.I)
link = re.compile(rf'(\]\(|\bhref="){relative}', re.I)


def repository_url(root=root):
    "`repository_url` of settings.ini, without a slash at its end; empty where it is not set"
    settings = ConfigParser(delimiters='=', interpolation=None)
    settings.read(root/'settings.ini', encoding='utf-8')
    return settings['DEFAULT']['repository_url'].rstrip('/').removesuffix('.git')


def file_address(url):
    "The address below which files are served as they are, so that a page elsewhere can show a picture"
    return re.sub(r'^https://github\.com/', 'https://raw.githubusercontent.com/', url) + ('/main' if '//github.com/' in url else '/raw/main')


def absolute_links(markdown, url):
    "`markdown` with full addresses for links and pictures that are relative to the root; as it is while there is no address"
    if not url: return markdown
    parts = fenced.split(markdown)  # prose at even places, code at odd ones
    for i, prose in enumerate(parts):
        if i % 2: continue
        prose = picture.sub(lambda found: f'{found[1]}{file_address(url)}/{found[2]}', prose)
        parts[i] = link.sub(lambda found: f'{found[1]}{url}/blob/main/{found[2]}', prose)
    return ''.join(parts)


def site_address(url):
    "Where the pages of a repository on GitHub are published, with a slash at the end; elsewhere it is not known"
    found = re.fullmatch(r'https://github\.com/([^/]+)/([^/]+)', url)
    return f'https://{found[1].lower()}.github.io/{found[2]}/' if found else ''
