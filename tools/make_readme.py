"""Build README.md from nbs/index.ipynb. With --check, write nothing and fail where the two differ.

`#| hide` and `#| include: false` drop a cell, `#| hide_input` and `#| echo: false` its code,
`#| hide_output` and `#| output: false` its outputs. A figure that a cell draws is left out: a README shows files,
so save the figure under nbs/images and link it. With a `repository_url` in settings.ini
there are badges below the title, and a link to Colab behind each notebook in a table.
"""
import argparse, difflib, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from address import fenced, repository_url
from colab import colab_link
from directives import hidden, no_code, no_outputs, split_directives

root = Path(__file__).resolve().parents[1]
source, target = root/'nbs/index.ipynb', root/'README.md'
header = '<!-- Generated from nbs/index.ipynb by tools/make_readme.py: edit the notebook, not this file. -->\n\n'

relative_link = re.compile(r'(\]\(|\b(?:src|href)=")(?![a-z][a-z0-9+.-]*:|[#/])', re.I)
spare_lines = re.compile(r'\n(?:[ \t]*\n){2,}(?!    )')  # not those inside a cell's output


def is_figure(output): return any(mime.startswith('image/') for mime in output.get('data', {}))


def shown(cell):
    "`cell` as the README shows it, or None"
    if cell.cell_type == 'raw': return None
    if cell.cell_type == 'markdown': return cell
    directives, cell.source = split_directives(cell.source)
    if directives & hidden: return None
    if directives & no_outputs: cell.outputs = []
    cell.outputs = [output for output in cell.outputs if not is_figure(output)]
    silent = not cell.source or directives & no_code
    cell.metadata.transient = {'remove_source': bool(silent)}
    return cell if cell.outputs or not silent else None


def from_root(text):
    "Links in `text` that are relative to nbs/, made relative to the repository's root"
    return relative_link.sub(r'\1nbs/', text).replace('nbs/../', '')


def with_badges(text, url):
    "What only a repository with an address can have"
    if not url: return text
    title, rest = text.split('\n', 1)
    tests = f'{url}/actions/workflows/test.yml'
    colab = lambda row: f'{row[1]} [(Colab)]({colab_link(url, row[2])}) |'
    return f'{title}\n\n[![tests]({tests}/badge.svg)]({tests})\n' + re.sub(r'(^\| \[[^]]*\]\((nbs/[^)]*\.ipynb)\)) \|', colab, rest, flags=re.M)


def build(url=repository_url()):
    notebook = nbformat.read(source, as_version=4)
    notebook.cells = [cell for cell in map(shown, notebook.cells) if cell]
    notebook.metadata.language_info = {'name': 'python'}  # nbdev-clean drops it; it names the code blocks' language
    markdown, _ = MarkdownExporter().from_notebook_node(notebook)
    parts = fenced.split(markdown)  # prose at even places, code at odd ones
    parts[::2] = [spare_lines.sub('\n\n', from_root(part)) for part in parts[::2]]
    return header + with_badges(''.join(parts).strip(), url) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 and show the difference, if any')
    args, new = parser.parse_args(), build()
    if not args.check:
        target.write_text(new, encoding='utf-8')
        return 0
    old = target.read_text(encoding='utf-8') if target.exists() else ''
    print('\n'.join(difflib.unified_diff(old.splitlines(), new.splitlines(), 'README.md', 'nbs/index.ipynb', lineterm='')))
    return int(old != new)


if __name__ == '__main__': sys.exit(main())
