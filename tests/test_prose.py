"Links that lead somewhere, and words that are spelt as in a dictionary."
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from spellchecker import SpellChecker

root = Path(__file__).resolve().parents[1]
pages = [*sorted(path for path in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts), *sorted(root.glob('*.md'))]
each_page = pytest.mark.parametrize('page', pages, ids=lambda page: page.relative_to(root).as_posix())
fence, inline = re.compile(r'^ *```.*?^ *```', re.M | re.S), re.compile(r'`[^`\n]*`')
link = re.compile(r'\]\(([^)\s]+)\)|\b(?:src|href)="([^"]+)"')
heading = re.compile(r'^#{1,6} +(.*)$', re.M)


@cache
def text(page):
    "The prose of a page, without blocks of code"
    if page.suffix != '.ipynb': return fence.sub('', page.read_text(encoding='utf-8'))
    return fence.sub('', '\n\n'.join(cell.source for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == 'markdown'))


def anchor(title): return re.sub(r'[^\w\- ]', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', title).strip().lower()).replace(' ', '-')


@each_page
def test_relative_links_lead_somewhere(page):
    targets = [found[0] or found[1] for found in link.findall(inline.sub('', text(page)))]
    lost = []
    for target in targets:
        if re.match(r'[a-z][a-z0-9+.-]*:', target): continue  # of the web: nothing here can follow it
        name, _, part = target.partition('#')
        file = (page.parent/name).resolve() if name else page
        if not file.exists() or not file.is_relative_to(root): lost.append(target)
        elif part and part not in map(anchor, heading.findall(text(file))): lost.append(target)
    assert not lost


known = SpellChecker(language='en')
own_words = {word.lower() for word in (root/'tests/words.txt').read_text(encoding='utf-8').split()}


def prose(page):
    "What is to be spelt: no code, no formulas, no addresses"
    plain = inline.sub('', text(page))
    for pattern in (r'\$\$.*?\$\$', r'\$[^$\n]*\$', r'\]\([^)]*\)', r'https?://\S+', r'<[^>]*>', r'[\w.-]+\.(?:py|ini|toml|yml|md|cff)\b'): plain = re.sub(pattern, ' ', plain, flags=re.S)
    return plain


def misspelt(words):
    "Those in neither list; a possessive counts as its word"
    bare = {re.sub(r"['’]s?$", '', word): word for word in words}
    return sorted(word for bare, word in bare.items() if bare.lower() not in known and bare.lower() not in own_words)


@each_page
def test_words_are_in_the_dictionary(page):
    "A right word that is missing goes into tests/words.txt"
    assert misspelt(re.findall(r"[^\W\d_][^\W\d_A-Z]+(?:['’][a-z]+)?", prose(page))) == []


def test_the_word_list_is_needed():
    "What no page uses, or what the dictionary has, is no part of it"
    used = {re.sub(r"['’]s?$", '', word.lower()) for page in pages for word in re.findall(r"[^\W\d_][^\W\d_A-Z]+(?:['’][a-z]+)?", prose(page))}
    assert sorted(word for word in own_words if word not in used or word in known) == []


def test_checks_can_fail(tmp_path):
    assert misspelt(['Attention', 'atention', "fastai's"]) == ['atention']
    assert anchor('What *is* `guaranteed`?') == 'what-is-guaranteed'
