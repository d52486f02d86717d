"""Put a cell into each notebook that sets it up on Colab, or take these cells out.

The address is `repository_url` in settings.ini. While it is empty no notebook has such a cell.
With --check, write nothing and fail where a notebook is not in step with the setting.
"""
import argparse, sys
from hashlib import sha256
from pathlib import Path

import nbformat

from address import repository_url

root = Path(__file__).resolve().parents[1]
mark = '#| hide\n#| eval: false\n# Set up on Colab; elsewhere it does nothing.\n'


def notebooks(root=root): return sorted(path for path in (root/'nbs').rglob('*.ipynb') if not any(part[0] in '_.' for part in path.relative_to(root).parts) and path.name != 'index.ipynb')


def colab_link(url, page):
    "The address under which Colab opens a page, a path below the repository's root"
    host, owner, name = url.split('/')[-3:]
    if host != 'github.com': raise ValueError(f'repository_url = {url}: Colab opens notebooks of github.com only')
    return f'https://colab.research.google.com/github/{owner}/{name}/blob/main/{page}'


def setup_cell(url, folder):
    "Clone, install, and go to the notebook's folder, where its files are"
    name = url.split('/')[-1]
    cell = nbformat.v4.new_code_cell(f'{mark}![ ! -e /content ] || [ -e /content/{name} ] || (git clone -q {url} /content/{name} && pip install -q -e /content/{name})\n'
                                     f'if get_ipython().getoutput("ls -d /content/{name}"): get_ipython().run_line_magic("cd", "/content/{name}/{folder}")')
    cell['id'] = sha256(cell.source.encode()).hexdigest()[:8]  # the same each time
    return cell


def in_step(path, url, root=root):
    "The notebook's text with its cell for Colab, or without one"
    old = path.read_text(encoding='utf-8')
    notebook = nbformat.reads(old, as_version=4)
    cells = [cell for cell in notebook.cells if not cell.source.startswith(mark)]
    if url: cells.insert(1, setup_cell(url, path.parent.relative_to(root).as_posix()))  # below the title
    if cells == notebook.cells: return old
    notebook.cells = cells
    return nbformat.writes(notebook) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 and name the notebooks that would change')
    args, url = parser.parse_args(), repository_url()
    changed = {path: text for path in notebooks() if (text := in_step(path, url)) != path.read_text(encoding='utf-8')}
    for path, text in changed.items():
        print(path.relative_to(root))
        if not args.check: path.write_text(text, encoding='utf-8')
    return int(args.check and bool(changed))


if __name__ == '__main__': sys.exit(main())
