"A notebook as a page of the site: what is shown of it, its links, its pictures' words, its reading time."
import ast, re
from functools import cache
from pathlib import Path

import nbformat

from directives import hidden, no_code, no_outputs, split_directives

root = Path(__file__).resolve().parents[1]
nbs = root/'nbs'
fenced = re.compile(r'(^ *```.*?^ *```|`[^`\n]*`)', re.M | re.S)
link = re.compile(r'(!?\[(?:[^][]|\[[^]]*\])*\])\(([^)\s]+)\)')
heading = re.compile(r'^#{1,6} +(.*?)\s*$', re.M)
caption = re.compile(r'\s*\*(?!\*)(.+?)(?<!\*)\*(?:\n\n|\s*$)', re.S)
style = re.compile(r'<style\b.*?</style>', re.S)


@cache
def read(page): return nbformat.read(nbs/page, as_version=4)


def prose(notebook): return [cell.source for cell in notebook.cells if cell.cell_type == 'markdown']
def title(page): return heading.search(prose(read(page))[0])[1]


def promise(page):
    "The line below the title, without its links"
    return re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', re.search(r'^> (.*)$', prose(read(page))[0], re.M)[1])


def is_code(line): return bool(line.strip()) and not line.strip().startswith('#')


def minutes(notebook):
    "Reading time: 200 words a minute, and 5 seconds for a line of code"
    words = sum(len(text.split()) for text in prose(notebook))
    lines = sum(is_code(line) for cell in notebook.cells if cell.cell_type == 'code' for line in cell.source.splitlines())
    return max(1, round(words/200 + lines*5/60))


def slug(text):
    "The anchor of a heading"
    return re.sub(r'[^\w\- ]', '', re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', text).strip().lower()).replace(' ', '-')


def plain(markdown):
    "Markdown without its marks, in one line"
    text = re.sub(r'!?\[([^]]*)\]\([^)]*\)', r'\1', markdown)
    return ' '.join(re.sub(r'[*`$\\]', '', text).split())


def first_sentences(text, limit=180):
    "As many sentences as fit, at least one"
    found, *rest = re.split(r'(?<=[.!?:]) +(?=[A-Z(])', text)
    for sentence in rest:
        if len(found) + len(sentence) > limit: break
        found += ' ' + sentence
    return found


def shown_output(output):
    "An output without styles of its own, or None if nothing is left"
    data = output.get('data', {})
    if 'text/html' in data:
        output.data = {'text/html': style.sub('', data['text/html']).strip()}
        if not output.data['text/html']: return None
    elif 'text/markdown' in data: output.data = {'text/markdown': data['text/markdown']}
    return output


def with_words(cells):
    "Give each picture its words: the caption below it, else the heading above it"
    above = ''
    for cell, below in zip(cells, [*cells[1:], None]):
        if cell.cell_type == 'markdown': above = (heading.findall(cell.source) or [above])[-1]
        elif any(mime.startswith('image/') for output in cell.outputs for mime in output.get('data', {})):
            words = caption.match(below.source) if below and below.cell_type == 'markdown' else None
            alt = first_sentences(plain(words[1])) if words else f'Figure: {plain(above)}'
            cell.metadata.setdefault('mystnb', {})['image'] = {'alt': alt.replace('"', '”')}
    return cells


def shown_code(cell, solution):
    "A cell of code as the page shows it, or None"
    directives, source = split_directives(cell.source)
    if directives & hidden: return None
    outputs = [] if directives & no_outputs else list(filter(None, map(shown_output, cell.outputs)))
    silent = not source.strip() or directives & no_code
    if silent and not outputs: return None
    new = nbformat.v4.new_code_cell(source, outputs=outputs)
    new.id = cell.id
    if silent: new.metadata.tags = ['remove-input']
    elif ('code-fold', '') in directives: fold(new, *(('hide-cell', 'a solution') if solution else ('hide-input', 'the code')))
    elif only_imports(source): fold(new, 'hide-input', 'the imports')
    return new


def fold(cell, tag, what):
    cell.metadata.tags = [tag]
    cell.metadata.mystnb = {f'code_prompt_{do}': f'{do.title()} {what}' for do in ('show', 'hide')}


def only_imports(source):
    "Imports and nothing else; what is not plain Python, a line for the shell for example, is no import"
    try: return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)
    except SyntaxError: return False


def shown(page, relink):
    "The notebook as the page shows it; `relink` maps a relative link to another, or to None where there is nothing to lead to"
    old, cells, solution = read(page), [], False
    for cell in old.cells:
        if cell.cell_type == 'markdown':
            for found in heading.findall(cell.source): solution = found.lower().startswith('exercise')
            cells.append(nbformat.v4.new_markdown_cell(relinked(cell.source, relink)))
        elif cell.cell_type == 'code' and (new := shown_code(cell, solution)): cells.append(new)
    python = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3'}, 'language_info': {'name': 'python'}}
    return nbformat.v4.new_notebook(cells=with_words(cells), metadata=python)


def relinked(markdown, relink):
    "`markdown` with its relative links mapped; code stays as it is"
    def _one(found):
        if re.match(r'[a-z][a-z0-9+.-]*:', found[2]): return found[0]
        new = relink(found[2])
        return found[1][1:-1] if new is None else f'{found[1]}({new})'
    parts = fenced.split(markdown)
    # A link may have code in its text: hide code behind marks while links are mapped.
    kept = parts[1::2]
    text = link.sub(_one, ''.join(part if i % 2 == 0 else f'\0{i//2}\0' for i, part in enumerate(parts)))
    return re.sub('\0(\\d+)\0', lambda found: kept[int(found[1])], text)


@cache
def places(page):
    "Where names are defined on a page: cell id -> anchor of the heading above it, and the names that it defines"
    anchor, found = '', {}
    for cell in read(page).cells:
        if cell.cell_type == 'markdown': anchor = slug((heading.findall(cell.source) or [anchor])[-1])
        else: found[cell.id] = anchor
    return found
