"""Processes are killed, files cut and disks filled at random moments, and then the call is made again.

    CAMKD_CAMPAIGN=200 python -m pytest -s tests/test_campaign.py    # so many tries, and their table

Each try runs in forks of this process, which leaves all computation to them; a full disk is a limit on the size of
files. Either what was finished is there and the next call does its work (survived), or finished work is gone (lost),
an error names no file or no remedy (unclear), or what is there is not what it should be (wrong silently).
"""
import gc, json, os, random, re, shutil, signal, sys, time, traceback, warnings
from pathlib import Path

import pytest
import torch
from fastai.callback.schedule import Callback, Learner
from fastai.torch_core import default_device, set_seed

from camkd_nb.all import (Checkpoint, ClassAttention, Distill, HeadStart, Recipe, SegLoss, evaluate, fill_pool, read_runs, toy_student, toy_teacher,
                          toy_voc, voc_dls)
from camkd_nb.files import fingerprint, whole_file
from camkd_nb.rows import append_row
from camkd_nb.teachers import trained_teacher

outcomes, epochs, tries = ('survived', 'lost', 'unclear', 'wrong silently'), 3, int(os.environ.get('CAMKD_CAMPAIGN', 20))


def recipe(folder, **options): return Recipe(folder.parents[1]/'toy', epochs=1, bs=4, device='cpu', **options)
def mark(model): return fingerprint(*(t.numpy().tobytes() for t in model.state_dict().values()))
def contents(folder): return fingerprint(*(x for file in sorted(folder.rglob('*')) if file.is_file() for x in (file.name, file)))


class Operation:
    "What is disturbed. `act` does it, or what is left of it, and returns a mark of the outcome"
    faults, processes = ('kill', 'cut', 'full'), 1
    def prepare(self, folder): pass
    def act(self, folder, report, k=0): raise NotImplementedError
    def file(self, folder): raise NotImplementedError  # what appears in the end, or is cut
    def before_cut(self, folder, report): self.act(folder, report)
    def state(self, folder, finished, marked): return 'survived' if self.file(folder).exists() or 'all' not in finished else 'lost'
    def again(self, folder, finished): return self.act(folder, lambda what: None)

class Rows(Operation):
    "Two processes add rows to a study's file"
    processes, n = 2, 12
    def row(self, seed):
        return dict(setting='a, "b"', method='größer\nals', seed=seed, miou=seed / 7, seconds=1.5, device='cpu', class_iou='{"画": 0.5}', terms='{}',
                    options=json.dumps({'x': 'y' * 3000}), versions='camkd_nb 0.0.1')
    def file(self, folder): return folder/'runs.csv'
    def act(self, folder, report, k=0):
        for seed in range(100 * k, 100 * k + self.n):
            append_row(self.file(folder), self.row(seed))
            report([seed, self.file(folder).stat().st_size])
    def state(self, folder, finished, marked): return 'survived'
    def again(self, folder, finished):
        append_row(self.file(folder), self.row(999))
        runs = read_runs(self.file(folder))
        if not {999, *(one[0] for one in finished if one != 'all')} <= set(runs.seed): return 'lost'
        return runs.seed.dtype == 'int64' and runs.seed.is_unique and runs.to_dict('records') == [self.row(seed) for seed in runs.seed]

class Replaced(Operation):
    "A file of 1 MB is written anew, and again"
    faults, size = ('kill', 'full'), 2**20
    def file(self, folder): return folder/'file'
    def prepare(self, folder): self.file(folder).write_bytes(b'\0' * self.size)
    def act(self, folder, report, k=0):
        for n in range(1, 20):
            with whole_file(self.file(folder), sync=n % 5 == 0) as draft, open(draft, 'wb') as opened:
                for _ in range(16): opened.write(bytes([n]) * (self.size // 16))
            report(n)
        return fingerprint(self.file(folder))
    def state(self, folder, finished, marked):
        content = self.file(folder).read_bytes()
        if len(content) != self.size or len(set(content)) != 1: return 'wrong silently'
        return 'lost' if content[0] < max((n for n in finished if n != 'all'), default=0) else 'survived'

class Drawings(Operation):
    "The built-in data set is drawn"
    faults = 'kill', 'full'
    def file(self, folder): return folder/'drawn'
    def act(self, folder, report, k=0): return contents(toy_voc(self.file(folder), n_train=20, n_valid=5, size=32))
    def state(self, folder, finished, marked):
        if self.file(folder).exists() and contents(self.file(folder)) != marked: return 'wrong silently'
        return Operation.state(self, folder, finished, marked)

class Fit(Operation):
    "A distillation with a checkpoint after each epoch"
    def file(self, folder): return folder/'models/checkpoint.pth'
    def act(self, folder, report, k=0, stop=epochs):
        class Reports(Callback):
            order = 72
            def after_epoch(self): report(self.epoch)
            def before_train(self):
                if self.epoch == stop: os.kill(os.getpid(), signal.SIGKILL)
        set_seed(0, reproducible=True)
        learn = Learner(voc_dls(folder.parents[1]/'toy', size=32, bs=4, seed=0), toy_student(), loss_func=SegLoss(), path=folder)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, 5e-3, cbs=[Distill(toy_teacher(pretrained=True), ClassAttention()), Checkpoint(), Reports()])
        return mark(learn.model)
    def before_cut(self, folder, report): self.act(folder, report, stop=epochs - 1)
    def state(self, folder, finished, marked):
        done = max((epoch for epoch in finished if epoch != 'all'), default=-1)
        if done in (-1, epochs - 1): return 'survived'
        return 'survived' if self.file(folder).exists() and torch.load(self.file(folder))['epoch'] >= done else 'lost'

class Teacher(Operation):
    "A teacher is trained, and kept in the cache"
    def file(self, folder): return next(folder.glob('teacher-*.pth'), folder/'none')
    def act(self, folder, report, k=0):
        os.environ['CAMKD_CACHE'] = str(folder)
        return mark(trained_teacher('toy_student', recipe(folder, size=32)))

class Pool(Operation):
    "A pool of features is filled"
    def file(self, folder): return folder/'pool.pth'
    def stem(self, half):
        torch.manual_seed(half)
        model = toy_teacher()
        model.align_corners = True
        return HeadStart(model, 3, half=half)
    def act(self, folder, report, k=0):
        pool = torch.load(fill_pool(self.file(folder), recipe(folder, size=33), self.stem(0), self.stem(1), n=2))
        return fingerprint(*(pool[name].numpy().tobytes() for name in ('x', 'mask')), pool['made'])

class Predictions(Operation):
    "Masks that a network predicts are saved"
    faults = 'kill', 'full'
    def file(self, folder): return folder/'results/toy/Segmentation/comp6_train_cls'
    def act(self, folder, report, k=0):
        if not self.file(folder).exists(): evaluate(toy_teacher(pretrained=True), folder.parents[1]/'toy', 'train', save_to=folder, progress=False)
        return contents(self.file(folder))
    state = Drawings.state


def is_clear(error, folder):
    "Whether an error names the file and the remedy, in no words of PyTorch"
    said = isinstance(error, (OSError, ValueError)) and str(error)
    return bool(said and str(folder) in said and re.search('[Rr]emove|[Mm]ake room|another', said) and not re.search('weights_only|ickle|Writer', said))


def start(work, folder, *args, room=None):
    "Fork a process that writes lines of JSON: that it begins, what it has finished, what came of it"
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, open(read, encoding='utf-8')
    def say(**said): os.write(write, (json.dumps(said) + '\n').encode())
    try:
        prepare_child(room)
        say(begin=True), (begin := time.monotonic())
        value = work(folder, lambda what: say(done=what), *args)
        say(done='all'), say(value=value, seconds=time.monotonic() - begin)
    except BaseException as error: say(error=traceback.format_exc(), clear=is_clear(error, folder))
    finally: os._exit(0)


def prepare_child(room):
    "Of its own session, silent, ended after two minutes, on one thread of the CPU, with files of `room` bytes at most"
    import resource
    os.setsid(), signal.alarm(120)
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    warnings.simplefilter('ignore')
    torch.set_num_threads(1), default_device(False)
    if room is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def end(process, delay=None):
    "What a process said, after it was killed or has ended"
    pid, lines = process
    if delay is not None:
        time.sleep(delay)
        os.killpg(pid, signal.SIGKILL)
    said = [json.loads(line) for line in lines if line.endswith('\n')]
    lines.close(), os.waitpid(pid, 0)
    return {**(said[-1] if said else {}), 'done': [one['done'] for one in said if 'done' in one]}


def call(work, folder):
    "What a function says in a process of its own"
    said = end(start(work, folder))
    assert 'value' in said, said
    return said


def disturb(operation, fault, folder, known, rng):
    "Let it happen; what was finished before, and what was said of it"
    if fault == 'cut':
        finished = end(start(operation.before_cut, folder))['done']
        at = rng.randrange(operation.file(folder).stat().st_size)
        os.truncate(operation.file(folder), at)
        return [one for one in finished if isinstance(operation, Rows) and one != 'all' and one[1] <= at], []
    room = rng.randrange(known['size']) if fault == 'full' else None
    running = [start(operation.act, folder, k, room=room) for k in range(operation.processes)]
    for _, lines in running: lines.readline()  # it begins
    delays = [rng.uniform(0, known['seconds']) if fault == 'kill' and k <= rng.randrange(2) else None for k in range(operation.processes)]
    ended = [end(process, delay) for process, delay in zip(running, delays)]
    failed = [one for one, delay in zip(ended, delays) if 'error' in one or delay is None and 'value' not in one]
    return [what for one in ended for what in one['done']], failed


def judge(folder, report, operation, fault, finished, marked):
    "What is there, and what the next call makes of it"
    if (found := operation.state(folder, finished, marked)) != 'survived': return found
    try: outcome = operation.again(folder, finished)
    except Exception as error:
        if not is_clear(error, folder): raise
        if fault != 'cut': return 'lost'
        operation.file(folder).unlink()  # as the error said
        outcome = operation.again(folder, finished)
    if outcome == 'lost': return 'lost'
    return 'survived' if outcome == marked and not [*folder.rglob('.*')] else 'wrong silently'  # no draft is left


def measure(operation, folder):
    "How long an operation takes undisturbed, a mark of its outcome, and the size of its largest file"
    for name in ('whole', 'half'): (folder/name).mkdir(parents=True)
    operation.prepare(folder/'whole')
    said = call(operation.act, folder/'whole')
    if isinstance(operation, Fit): end(start(operation.before_cut, folder/'half'))  # in the end it leaves no file
    return said | {'size': max(file.stat().st_size for file in folder.rglob('*') if file.is_file())}


def attempt(operation, fault, folder, known, rng):
    "One try: its outcome, and what is to be known of it"
    folder.mkdir()
    operation.prepare(folder)
    finished, errors = disturb(operation, fault, folder, known, rng)
    if unclear := [one for one in errors if not one.get('clear')]: return 'unclear', unclear[0]
    verdict = end(start(judge, folder, operation, fault, finished, True if isinstance(operation, Rows) else known['value']))
    return verdict.get('value', 'unclear'), verdict


@pytest.mark.skipif(os.name != 'posix', reason='forks, signals and limits of POSIX')
def test_campaign(tmp_path):
    gc.freeze()  # no collection writes to the pages that the forks share
    rng, counts, known, bad = random.Random(0), {}, {}, []
    call(lambda folder, report: str(toy_voc(folder, n_train=8, n_valid=2, size=32)), tmp_path/'toy')
    plan = [(kind(), fault) for kind in Operation.__subclasses__() for fault in kind.faults]
    for n in range(tries):
        operation, fault = plan[n % len(plan)]
        name = type(operation).__name__
        if name not in known: known[name] = measure(operation, tmp_path/name)
        outcome, detail = attempt(operation, fault, tmp_path/name/f'{n}', known[name], rng)
        row = counts.setdefault(f'{name}, {fault}', dict.fromkeys(outcomes, 0))
        row[outcome] += 1
        if outcome != 'survived': bad.append((n, name, fault, outcome, detail))
        else: shutil.rmtree(tmp_path/name/f'{n}')
    print(f'\n{"operation":20}{"tried":>8}', *(f'{outcome:>15}' for outcome in outcomes))
    for name, row in counts.items(): print(f'{name:20}{sum(row.values()):8}', *(f'{n:15}' for n in row.values()))
    assert not bad, '\n'.join(map(str, bad))
