"""The tests: each notebook alone in its own process, two at a time, then pytest.

    python tests/run.py                                      # everything
    python tests/run.py nbs/03_metrics.ipynb nbs/tutorials   # some notebooks
    python tests/run.py tests/test_packaging.py              # some of pytest's tests

The last line reads `N passed, N failed` and counts notebooks and pytest's tests alike.
A notebook of which no cell runs by default is skipped, and counts as neither.
"""
import argparse, os, subprocess, sys, sysconfig, tempfile, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

from nbdev.config import get_config
from nbdev.test import nb_test_cells

root = Path(__file__).resolve().parents[1]
nbdev_test = Path(sysconfig.get_path('scripts'))/'nbdev-test'
skip_flags = get_config(root).tst_flags.split()
os.environ.setdefault('OMP_NUM_THREADS', '1')  # two workers with one thread each beat two with several


def is_source(path): return path.suffix == '.ipynb' and not any(part[0] in '_.' for part in path.relative_to(root).parts)


def notebooks(path):
    "The notebooks at or below `path`; the later in the book, the longer it runs, so the last come first"
    found = [path] if path.is_file() else path.rglob('*.ipynb')
    return sorted(filter(is_source, found), reverse=True)


def run_notebook(path):
    "`ok`, `skip` or `FAILED`, the seconds it took, and what it printed"
    start = time.perf_counter()
    done = subprocess.run([nbdev_test, path, '--cell-timeout', '300'], cwd=root, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - start
    if done.returncode or 'Success.' not in done.stdout:  # nbdev-test exits with 0 when it finds nothing to test
        return 'FAILED', seconds, f'{done.stdout}exit status {done.returncode}'
    return 'ok' if nb_test_cells(path, skip_flags) else 'skip', seconds, ''


def run_notebooks(paths, workers):
    "Run notebooks, print a line for each, return how many passed and failed"
    count = Counter()
    with ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(run_notebook, path): path.relative_to(root/'nbs').with_suffix('') for path in paths}
        for job in as_completed(jobs):
            status, seconds, output = job.result()
            print(f'{status:6} {jobs[job]} {seconds:.1f} s', output, sep='\n' if output else '', flush=True)
            count[status] += 1
    return count['ok'], count['FAILED']


def run_pytest(paths):
    "Run pytest, return how many of its tests passed and failed"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        code = subprocess.run([sys.executable, '-m', 'pytest', '-q', f'--junitxml={report}', *paths], cwd=root).returncode
        if not report.exists(): return 0, 1
        suite = ElementTree.parse(report).find('testsuite')
    total, skipped, failures, errors = (int(suite.get(key)) for key in ('tests', 'skipped', 'failures', 'errors'))
    failed = failures + errors
    return total - skipped - failed, failed or int(code != 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=Path, help='notebooks, folders of notebooks, or files for pytest')
    parser.add_argument('--workers', type=int, default=2, help='notebooks that run at the same time')
    args = parser.parse_args()
    paths = [path.resolve() for path in args.paths] or [root/'nbs', root/'tests']
    if missing := [str(path) for path in paths if not path.exists()]: parser.error(f"no such file: {', '.join(missing)}")
    in_nbs = [path for path in paths if path.is_relative_to(root/'nbs')]
    for_pytest = [path for path in paths if path not in in_nbs]
    found = [notebook for path in in_nbs for notebook in notebooks(path)]
    if in_nbs and not found: sys.exit('no notebooks found')
    results = [run_notebooks(found, args.workers)]
    if for_pytest: results.append(run_pytest(for_pytest))
    passed, failed = map(sum, zip(*results))
    print(f'{passed} passed, {failed} failed')
    return int(failed > 0)


if __name__ == '__main__': sys.exit(main())
