"""The tests: each notebook and each of pytest's files in a process of its own, the longest first.

    python tests/run.py                                      # all but nbs/benchmarks, the site, whole browsers, gpu_check
    python tests/run.py --rest                               # what that leaves out
    python tests/run.py --all                                # everything
    python tests/run.py nbs/03_metrics.ipynb nbs/tutorials   # some notebooks
    python tests/run.py tests/test_packaging.py              # some of pytest's tests

The last line reads `N passed, N failed` and counts notebooks and pytest's tests alike.
A notebook of which no cell runs by default is skipped, and counts as neither.

The processes are forks (Linux, macOS) of one that has imported torch and fastai, but never camkd_nb. A job that is
alone imports all that itself, and shows what a notebook forgot to import because fastai had done so.
"""
import argparse, faulthandler, gc, importlib, json, os, re, shutil, signal, sys, tempfile, time, traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import nb_test_cells, test_nb

from real_data import real_data_environment

os.environ.setdefault('OMP_NUM_THREADS', '1')  # two workers with one thread each beat two with several
root = Path(__file__).resolve().parents[1]
sys.path[0] = str(root)  # instead of tests/
real_data_environment()
rest = [root/part for part in ('nbs/benchmarks', 'tests/test_browser.py', 'tests/test_gpu_check.py', 'tests/test_site.py')]
durations = root/'tests/durations.json'  # CPU seconds of an earlier run: a hint for the order, no more
shared = 'torch', 'torchvision', 'fastai.vision.all', 'ipywidgets', 'matplotlib_inline.backend_inline', 'nbformat'
skip_flags = get_config(root).tst_flags.split()
grace = 15  # seconds from the interrupt to the kill, in which servers and browsers are closed


@dataclass
class Job:
    path: Path
    folder: Path  # of its own: temporary files, what it printed, what it found
    deadline: float
    start: float
    pid: int = 0
    signal: int = signal.SIGINT  # the next to be sent; a notebook answers an interrupt with a traceback
    seconds = cpu = passed = failed = skipped = 0

    def send(self, number):
        "Signal the process and all that it started"
        with suppress(ProcessLookupError, PermissionError): os.killpg(self.pid, number)


def name(path):
    "A notebook without `nbs/`, as in the book; a test with `tests/`"
    base = next((base for base in (root/'nbs', root) if path.is_relative_to(base)), '/')
    return path.relative_to(base).with_suffix('').as_posix()


def in_rest(path): return any(path.is_relative_to(part) for part in rest)


def find(path, every):
    "The jobs at or below `path`: notebooks in nbs, elsewhere pytest's files"
    if path.is_file(): return [path]
    files = sorted(path.rglob('*.ipynb' if path.is_relative_to(root/'nbs') else 'test_*.py'))
    files = [file for file in files if not any(part[0] in '_.' for part in file.relative_to(path).parts)]
    return [file for file in files if every or in_rest(path) or not in_rest(file)]


def needs_newer_torch(path):
    "What is missing to run a notebook that exports a network; '' where nothing is"
    cells = [''.join(cell['source']) for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
    calls = [cell for cell in cells if not cell.startswith('#| export') and re.search(r'\b(export_onnx|write_page)\(', cell)]
    if not calls: return ''
    try: importlib.import_module('camkd_nb.export').check_torch()
    except ImportError as error: return str(error)
    return ''


def run_notebook(path, args):
    "How many passed, failed and were skipped: one, run as nbdev-test does"
    if reason := needs_newer_torch(path):
        print(reason)
        return 0, 0, 1
    flags = args.flags.split()
    passed, _ = test_nb(path, skip_flags, flags, basepath=root, cell_timeout=args.cell_limit)
    if not passed: return 0, 1, 0
    return (1, 0, 0) if nb_test_cells(path, skip_flags, flags) else (0, 0, 1)


class Counts:
    "Counts pytest's tests; one that cannot be collected, set up or taken down has failed"
    def __init__(self): self.passed = self.failed = self.skipped = 0
    def pytest_collectreport(self, report): self.failed += report.failed; self.skipped += report.skipped
    def pytest_runtest_logreport(self, report):
        self.pytest_collectreport(report)
        self.passed += report.passed and report.when == 'call'


def run_pytest(path):
    "How many tests of a file passed, failed and were skipped"
    counts, quiet = Counts(), 'ignore::pytest.PytestAssertRewriteWarning'  # its plugins may have been imported
    code = pytest.main(['-q', '-W', quiet, str(path)], plugins=[counts])
    fine = code == pytest.ExitCode.OK or code == pytest.ExitCode.NO_TESTS_COLLECTED and counts.skipped
    return counts.passed, counts.failed or int(not fine), counts.skipped


def child(job, args):
    "Run a job in the process that was forked for it, and end the process"
    try:
        os.setpgid(0, 0)
        output = os.open(job.folder/'output', os.O_WRONLY | os.O_CREAT)
        for source, target in (os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2): os.dup2(source, target)
        sys.stdout.reconfigure(line_buffering=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.enable()
        os.environ['TMPDIR'], tempfile.tempdir = str(job.folder), None
        os.chdir(root)
        found = run_notebook(job.path, args) if job.path.suffix == '.ipynb' else run_pytest(job.path)
        (job.folder/'found.json').write_text(json.dumps(found))
        os._exit(int(found[1] > 0))
    except BaseException: traceback.print_exc()
    finally: os._exit(1)


def start(path, running, folder, args):
    "Fork a process for a job, and add it to those that are running"
    now = time.monotonic()
    print('start ', name(path), flush=True)
    job = Job(path, Path(tempfile.mkdtemp(dir=folder, prefix='')), now + args.limit, now)
    job.pid = os.fork()
    if not job.pid: child(job, args)
    running[job.pid] = job
    with suppress(OSError): os.setpgid(job.pid, job.pid)  # here as well as there: neither need wait for the other


def reap(running):
    "The next job that has ended, or None; those over their limit are told to end"
    pid, status, usage = os.wait4(-1, os.WNOHANG)
    now = time.monotonic()
    if job := running.pop(pid, None):
        job.send(signal.SIGKILL)  # what it left running
        job.seconds, job.cpu = now - job.start, usage.ru_utime + usage.ru_stime
        conclude(job, os.waitstatus_to_exitcode(status))
        return job
    for job in running.values():
        if now > job.deadline:
            job.send(job.signal)
            job.signal, job.deadline = signal.SIGKILL, now + grace
    time.sleep(.05)


def conclude(job, code):
    "Read what a job found, and print a line about it; where it failed, all that it printed"
    found = job.folder/'found.json'
    if found.exists(): job.passed, job.failed, job.skipped = json.loads(found.read_text())
    job.failed = job.failed or int(code != 0 or not found.exists())
    status = 'FAILED' if job.failed else 'ok' if job.passed else 'skip'
    tests = f', {job.passed} passed, {job.skipped} skipped' if job.path.suffix == '.py' else ''
    print(f'{status:6} {name(job.path)} {job.seconds:.1f} s, {job.cpu:.1f} s CPU{tests}', flush=True)
    if not job.failed: return
    print((job.folder/'output').read_text(errors='replace'))
    if job.signal == signal.SIGKILL: print('stopped by an interrupt, or at its limit')
    print(f'exit status {code}' if code >= 0 else f'ended by {signal.Signals(-code).name}', flush=True)


def run(paths, args):
    "Run all jobs, `args.workers` at a time"
    waiting, running, ended, folder = paths[::-1], {}, [], tempfile.mkdtemp(prefix='camkd-')
    try:
        while waiting or running:
            while waiting and len(running) < args.workers: start(waiting.pop(), running, folder, args)
            if job := reap(running): ended.append(job)
        return ended
    finally:
        try:  # after an interrupt: kindly at first
            for job in running.values(): job.deadline = 0
            while running: reap(running)
        finally:
            for job in running.values(): job.send(signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', type=Path, help='notebooks, files for pytest, or folders of them')
    parser.add_argument('--all', action='store_true', help='everything: also nbs/benchmarks, the site, whole browsers and tools/gpu_check.py')
    parser.add_argument('--rest', action='store_true', help='these alone')
    parser.add_argument('--flags', default='', help='run cells under these directives as well: "slow cuda"')
    parser.add_argument('--workers', type=int, default=2, help='jobs that run at the same time')
    parser.add_argument('--limit', type=float, default=1200, help='seconds after which a job has failed')
    parser.add_argument('--cell-limit', type=int, default=300, help='seconds after which a cell has failed')
    parser.add_argument('--store-durations', action='store_true', help=f'rewrite {durations.name}')
    args = parser.parse_args()
    if args.rest and (args.all or args.paths): parser.error('--rest names what is run: give it alone')
    args.paths = [path.resolve() for path in args.paths] or (rest if args.rest else [root/'nbs', root/'tests'])
    if missing := [str(path) for path in args.paths if not path.exists()]: parser.error(f'no such file: {missing}')
    return args


def main():
    args = arguments()
    known = json.loads(durations.read_text()) if durations.exists() else {}
    jobs = list(dict.fromkeys(job for path in args.paths for job in find(path, args.all)))
    if not jobs: sys.exit('no notebooks or tests found')
    jobs.sort(key=lambda path: known.get(name(path), float('inf')), reverse=True)
    if len(jobs) > 1: list(map(importlib.import_module, shared))
    gc.freeze()  # no collection writes to the pages that the forks share
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ended = run(jobs, args)
    if args.store_durations:
        known |= {name(job.path): round(job.cpu) for job in ended if not job.failed}
        there = {name(path) for path in find(root/'nbs', True) + find(root/'tests', True)}
        durations.write_text(json.dumps({key: known[key] for key in sorted(there & known.keys())}, indent=0) + '\n')
    slowest = [f'{name(job.path)} {job.seconds:.0f} s' for job in sorted(ended, key=lambda job: -job.seconds)[:5]]
    print('slowest:', ', '.join(slowest))
    if bad := [name(job.path) for job in ended if job.failed]: print('FAILED:', ', '.join(bad))
    print(f'{sum(job.passed for job in ended)} passed, {sum(job.failed for job in ended)} failed')
    return int(bool(bad))


if __name__ == '__main__': sys.exit(main())
