"""Print the files of the checkout, one a line: what git tracks or would track, without git whatever is no by-product."""
import re, subprocess
from pathlib import Path

root = Path(__file__).resolve().parents[1]
by_product = re.compile(r'(^|/)(__pycache__|\..*_cache|\.ipynb_checkpoints|\.venv|[^/]*\.egg-info)(/|$)|^(build|dist|artefacts|_docs|_proc)/|^PKG-INFO$')


def sources(root=root):
    "Paths relative to the root; an unpacked source distribution has no .git"
    if (root/'.git').exists():
        listed = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=root, capture_output=True, text=True, check=True)
        names = set(listed.stdout.split('\0')) - {''}
    else:
        names = {path.relative_to(root).as_posix() for path in root.rglob('*')}
        names = {name for name in names if not by_product.search(name)}
    return sorted(name for name in names if (root/name).is_file())


if __name__ == '__main__': print(*sources(), sep='\n')
