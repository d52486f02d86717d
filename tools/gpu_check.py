"""Check camkd_nb on a GPU and measure it there. Prints a table for each topic, in markdown, to be pasted.

    python tools/gpu_check.py                       # everything, on the first GPU: under 8 minutes on an H100
    python tools/gpu_check.py --only maps           # one part
    python tools/gpu_check.py --device cpu --tiny   # every path in small, without a GPU and without torch.compile

Needs the package and its requirements alone: no photographs, nothing from the network. Progress goes to stderr.
The exit status is 1 where a result is wrong or a line broke off with an error.
"""
import argparse, gc, platform, statistics, sys, tempfile, time, warnings
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fastai, fastai.callback.fp16, fastai.callback.progress, numpy as np, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner

import camkd_nb
from camkd_nb.attention import METHODS, class_attention
from camkd_nb.data import voc_dls
from camkd_nb.distill import CAMDistill
from camkd_nb.distiller import Distiller
from camkd_nb.layers import unwrapped
from camkd_nb.stages import last_stages
from camkd_nb.losses import AttentionTransfer, ChannelKD, ClassAttention, PixelKD
from camkd_nb.metrics import SegLoss
from camkd_nb.models import deeplabv3, pspnet, toy_student, toy_teacher
from camkd_nb.rivals import DIST, IFV, FeatureKD, PairwiseKD
from camkd_nb.tensors import imagenet_stats, resize, resize_mask
from camkd_nb.toyvoc import toy_pair, toy_voc

CHEAP = {'pixel KD': PixelKD, 'channel KD': ChannelKD, 'DIST': DIST, 'attention transfer': AttentionTransfer}
DEAR = {'class attention': ClassAttention, 'class attention, first order': partial(ClassAttention, second_order=False),
        'class attention, 1 class': partial(ClassAttention, max_classes=1),
        'class attention, 1 class, first order': partial(ClassAttention, max_classes=1, second_order=False),
        'class attention, every 2nd batch': partial(ClassAttention, every=2),
        'class attention, every 4th batch': partial(ClassAttention, every=4)}
TERMS = {**CHEAP, 'feature KD': FeatureKD, **DEAR, 'pair-wise KD': PairwiseKD, 'IFV': IFV, 'no distillation': None}


@dataclass
class Mode:
    "A way to run networks, and how near to float64 its results have to be."
    dtype: torch.dtype | None = None  # of autocast
    tf32: bool = True  # False: off; True: as PyTorch is set
    channels_last: bool = False
    compiled: bool = False

    @property
    def least(self): return .9 if self.dtype is torch.bfloat16 else .97  # cosine, where numbers are rounded
    def placed(self, x): return x.to(memory_format=torch.channels_last) if self.channels_last else x

    def ready(self, model):
        "The network in this mode's layout, compiled or not."
        if not self.compiled: return self.placed(model)
        torch.compiler.reset()
        return torch.compile(self.placed(model))


MODES = {'float32': Mode(), 'bfloat16': Mode(torch.bfloat16), 'float16': Mode(torch.float16),
         'channels last': Mode(channels_last=True), 'compiled': Mode(compiled=True)}
EXACT = {'float32, no TF32': Mode(tf32=False), 'channels last, no TF32': Mode(tf32=False, channels_last=True),
         'compiled, no TF32': Mode(tf32=False, compiled=True)}
CHECKED = {**EXACT, **{f'{name}, TF32 as set': MODES[name] for name in ('float32', 'bfloat16', 'float16')}}


class Skip(Exception):
    "A line that cannot be had here."


@dataclass
class Run:
    "Where the tables are made, how large, and what went wrong."
    device: torch.device
    tiny: bool = False
    failed: list = field(default_factory=list)
    steps: dict = field(default_factory=dict)  # seconds per step, for the loader's table
    part: str = ''
    name: str = ''
    start: float = field(default_factory=time.perf_counter)
    deadline: float = float('inf')

    def section(self, title, columns, seconds):
        "Begin a table; lines that come later than so many seconds are skipped."
        self.deadline = float('inf') if self.tiny else time.perf_counter() + seconds
        print(f'\n### {title}\n\n| {" | ".join(columns)} |\n|{" --- |" * len(columns)}', flush=True)

    def row(self, name, make, *args):
        "A line of the table: the cells that `make` returns, or what kept it from that."
        self.name = f'{self.part}: {name}'
        print(f'{time.perf_counter() - self.start:6.1f} s  {self.name}', file=sys.stderr, flush=True)
        try:
            if time.perf_counter() > self.deadline: raise Skip("this table's time is up")
            cells = make(*args)
        except Skip as why: cells = [f'skipped: {why}'.replace('|', '/')]
        except torch.OutOfMemoryError: cells = ['out of memory']
        except Exception as error: cells = [self.broken(error)]
        print(f'| {" | ".join([name, *cells])} |', flush=True)
        if self.device.type == 'cuda': gc.collect(), torch.cuda.empty_cache()

    def broken(self, error):
        "The cell for an error."
        self.failed.append(self.name)
        return f'**failed**: {type(error).__name__}: {" ".join(str(error).split())[:200]}'.replace('|', '/')

    def judged(self, text, right):
        "A cell with the verdict, where it is wrong."
        if right: return text
        self.failed.append(self.name)
        return f'{text} **wrong**'

    def synchronize(self): self.device.type == 'cuda' and torch.cuda.synchronize(self.device)


def seconds(run, work, warm=3, repeats=9):
    "The median time of a piece of work, after some that are not counted."
    if run.tiny: warm, repeats = 1, 1
    times = []
    for _ in range(warm + repeats):
        run.synchronize()
        start = time.perf_counter()
        work()
        run.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


@contextmanager
def running(device, mode):
    "Autocast and TF32 as a mode has them."
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    if not mode.tf32: torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, mode.dtype or torch.bfloat16, enabled=mode.dtype is not None): yield
    finally: torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@cache
def drawings(n, side, device):
    "Drawings as networks want them, (n, 3, side, side), and their masks."
    rng = np.random.default_rng(0)
    images, masks = (torch.from_numpy(np.stack(both)) for both in zip(*[toy_pair(rng) for _ in range(n)]))
    x = images.permute(0, 3, 1, 2) / 255
    mean, std = imagenet_stats(x)
    return resize((x - mean) / std, (side, side)).contiguous().to(device), resize_mask(masks, (side, side)).to(device)


@cache
def check_compiler(device):
    "A line is skipped where PyTorch finds no compiler."
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).to(device)
    try: torch.compile(net)(torch.rand(1, 3, 8, 8, device=device)).sum().backward()
    except Exception as error: raise Skip(f'torch.compile fails here: {" ".join(str(error).split())[:120]}') from None


def small(run): return (2, 33) if run.tiny else (8, 97)  # images and side, where results are checked


def needs(run, mode):
    "Skip what is not to be had."
    if mode.compiled and run.tiny: raise Skip('no compiling in the tiny form')
    if mode.compiled: check_compiler(run.device)


def compared(run, mode, ours, exact, trained=True):
    "A cell: the largest relative difference of the tensors, and the mean cosine; random networks amplify rounding."
    pairs = [(a.detach().double().cpu(), b.detach().double()) for a, b in zip(ours, exact)]
    apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    units = [[F.normalize(x.flatten(2), dim=2, eps=1e-200) for x in pair] for pair in pairs]
    cosine = torch.cat([(a * b).sum(2)[b.norm(dim=2) > 0] for a, b in units]).mean().item()
    right = cosine >= (mode.least if trained else -1) if mode.tf32 else apart < 1e-2
    return run.judged(f'{apart:.1e}, {cosine:.5f}', right)


@cache
def checked_networks(size):
    "Networks in single precision on the CPU, with a few classes; random ones have seen a batch."
    torch.manual_seed(0)
    fresh = {"pspnet('resnet18')": pspnet('resnet18', 7), "deeplabv3('mobilenet_v2')": deeplabv3('mobilenet_v2', 7)}
    for net in fresh.values():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d): module.momentum = 1.
        with torch.no_grad(): net(drawings(*size, torch.device('cpu'))[0])
    return {'toy_teacher': toy_teacher(pretrained=True), **fresh}


def maps_of(model, x, mask, method):
    "Signed maps of two layers."
    layers = last_stages(unwrapped(model), 2)
    with torch.no_grad(): return list(class_attention(model, x, mask, layers, method=method, signed=True).maps.values())


@cache
def exact_maps(name, size, method):
    "In float64 on the CPU."
    x, mask = drawings(*size, torch.device('cpu'))
    return maps_of(deepcopy(checked_networks(size)[name]).double().eval(), x.double(), mask, method)


def maps_row(run, name, mode):
    "A network's maps by all methods, in one mode."
    needs(run, mode)
    size = small(run)
    model, (x, mask) = deepcopy(checked_networks(size)[name]).eval().to(run.device), drawings(*size, run.device)
    model, x = mode.ready(model), mode.placed(x)
    with running(run.device, mode):
        if mode.compiled: model(x)
        both = [(maps_of(model, x, mask, how), exact_maps(name, size, how)) for how in METHODS]
    return [compared(run, mode, ours, exact, name == 'toy_teacher') for ours, exact in both]


def maps(run):
    "Class attention maps against float64 on the CPU."
    run.section('Maps: largest relative difference from float64 on the CPU, mean cosine (toy_teacher is trained)',
                ['network, mode', *METHODS], 90)
    for name in checked_networks(small(run)):
        for how, mode in CHECKED.items():
            if name == 'toy_teacher' or not mode.compiled: run.row(f'{name}, {how}', maps_row, run, name, mode)


def term_on(term, size, device, dtype, mode):
    "A term's value, and its gradient at all of the student's parameters, (1, 1, N)."
    torch.manual_seed(0)
    student, teacher = (net.to(device, dtype) for net in (toy_student(), toy_teacher(pretrained=True)))
    x, mask = drawings(*size, device)
    student, teacher, x = mode.ready(student), mode.placed(teacher), mode.placed(x.to(dtype))
    distiller = Distiller(student, teacher, TERMS[term]())
    with running(device, mode):
        with distiller: output = student(x)
        (value, _), = distiller(x, mask, output).values()
    (value * 1024).backward()  # within float16's range
    parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() / 1024 for p in student.parameters()]
    return value.double().view(1, 1, 1), torch.cat(parts).double().view(1, 1, -1)


@cache
def exact_term(term, size):
    "In float64 on the CPU."
    return term_on(term, size, torch.device('cpu'), torch.float64, Mode())


def term_cell(run, term, mode):
    "Value and gradient in one mode; compiling is tried with one term."
    if mode.compiled and term != 'class attention': return ''
    try: needs(run, mode)
    except Skip as why: return f'skipped: {why}'
    size = small(run)
    (value, gradient), exact = term_on(term, size, run.device, torch.float32, mode), exact_term(term, size)
    apart = (value.cpu() / exact[0] - 1).abs().item()
    text = run.judged(f'{apart:.1e}', apart < (.2 if mode.tf32 else 1e-2))
    return f'{text}; {compared(run, mode, [gradient], exact[1:])}'


def terms(run):
    "The terms against float64 on the CPU."
    run.section('Terms: relative difference of the value from float64 on the CPU; that of its gradient, and cosine',
                ['term', *CHECKED], 90)
    for term in [*CHEAP, 'IFV', 'pair-wise KD', *list(DEAR)[:2]]:
        run.row(term, lambda term=term: [term_cell(run, term, mode) for mode in CHECKED.values()])


class Watch(Callback):
    "The losses of a fit, its skipped steps, and its time after some steps."
    order = 80
    def __init__(self, run, warm): self.run_of, self.warm, self.seen, self.skipped = run, warm, [], 0
    def before_validate(self): raise CancelValidException()
    def after_cancel_step(self): self.skipped += 1
    def after_batch(self):
        self.seen.append(self.learn.loss.detach())
        if len(self.seen) == self.warm: self.start = self.now()
    def after_train(self): self.seconds = (self.now() - self.start) / (len(self.seen) - self.warm)
    def now(self):
        self.run_of.synchronize()
        return time.perf_counter()


def fitted(run, mode, distilled, n):
    "What was seen in a fit of n steps through fastai's `Learner`."
    torch.manual_seed(0)
    images, masks = drawings(*((8, 33) if run.tiny else (64, 97)), run.device)
    bs, images = len(images) // 4, mode.placed(images)
    batches = DataLoader([(images[i:i + bs], masks[i:i + bs]) for i in range(0, 4 * bs, bs)] * (n // 4),
                         bs=None, device=run.device)
    student, teacher = mode.ready(toy_student().to(run.device)), mode.placed(toy_teacher(pretrained=True))
    learn = Learner(DataLoaders(batches, batches, device=run.device), student, SegLoss(), cbs=Watch(run, n // 4))
    if mode.dtype: learn.to_bf16() if mode.dtype is torch.bfloat16 else learn.to_fp16()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 2e-3, cbs=CAMDistill(teacher) if distilled else None)
    return learn.watch


def training_row(run, mode, distilled):
    "One fit."
    needs(run, mode)
    n = 12 if run.tiny else 200
    watch = fitted(run, mode, distilled, n)
    losses, n = torch.stack(watch.seen).float().cpu(), n // 4
    first, last = losses[:n].mean().item(), losses[-n:].mean().item()
    fell = run.judged(f'{first:.3f} to {last:.3f}', last < first and bool(losses.isfinite().all()))
    return [fell, str(watch.skipped), f'{1000 * watch.seconds:.1f}']


def training(run):
    "Steps through fastai's `Learner`."
    run.section(f"Training: {12 if run.tiny else 200} steps through fastai's Learner",
                ['mode', 'loss, first and last quarter', 'skipped steps', 'ms per step'], 100)
    for name, mode in MODES.items():
        for distilled in (False, True):
            run.row(name + (', CAMDistill' if distilled else ', plain'), training_row, run, mode, distilled)


@cache
def large_networks(tiny, device):
    "The teacher and the student whose steps are timed, with random weights."
    torch.manual_seed(0)
    return deeplabv3('resnet18' if tiny else 'resnet50').to(device).eval(), pspnet('mobilenet_v2').to(device)


def large(run): return (2, 33) if run.tiny else (16, 513)  # images and side, where time is taken


def step_of(run, networks, term, mode, size):
    "A function that makes one training step."
    teacher, student = networks
    (x, mask), loss_func = drawings(*size, run.device), SegLoss()
    optimiser = torch.optim.SGD(student.parameters(), 1e-3)
    distiller = TERMS[term] and Distiller(student, teacher, TERMS[term]())
    def step():
        optimiser.zero_grad()
        with running(run.device, mode):
            loss = distiller.step(x, mask, loss_func).total if distiller else loss_func(student(x), mask)
        loss.backward()
        optimiser.step()
    return step


def cost_row(run, term, how):
    "Time and memory of one kind of step, also as a ratio to pixel KD's."
    cuda = run.device.type == 'cuda'
    if cuda: torch.cuda.reset_peak_memory_stats(run.device)
    step = step_of(run, large_networks(run.tiny, run.device), term, MODES[how], large(run))
    n = getattr(TERMS[term], 'keywords', {}).get('every', 1)
    took = seconds(run, lambda: [step() for _ in range(n)]) / n
    memory = torch.cuda.max_memory_allocated(run.device) / 2**30 if cuda else float('nan')
    run.steps[term, how] = took, memory
    ratios = [f'{a / b:.2f}' for a, b in zip((took, memory), run.steps.get(('pixel KD', how), [float('nan')] * 2))]
    return [f'{1000 * took:.0f}', ratios[0], f'{memory:.1f}', ratios[1]]


def cost(run):
    "The training step of a large teacher and a small student."
    teacher, (bs, side) = 'ResNet-18' if run.tiny else 'ResNet-50', large(run)
    run.section(f'Step: {teacher} DeepLabV3 teaches MobileNetV2 PSPNet, 21 classes, {bs} crops of {side} pixels',
                ['term, mode', 'ms', 'to pixel KD', 'peak memory, GiB', 'to pixel KD'], 160)
    for how in ('float32', 'bfloat16'):
        for term in [*CHEAP, 'feature KD', 'no distillation', *DEAR]: run.row(f'{term}, {how}', cost_row, run, term, how)


def speed_row(run, side, how):
    "One forward pass, and maps by some methods."
    model, (x, mask) = large_networks(run.tiny, run.device)[0], drawings(large(run)[0], side, run.device)
    asked = partial(class_attention, model, x, mask, last_stages(model))
    work = [partial(asked, max_classes=1), partial(asked, max_classes=2), partial(asked, max_classes=2, method='mask')]
    with running(run.device, MODES[how]), torch.no_grad():
        forward, *times = (seconds(run, one) for one in (partial(model, x), *work))
    return [f'{len(x) / forward:.0f}', *(f'{len(x) / one:.0f}, {one / forward:.2f}' for one in times)]


def speed(run):
    "Images a second."
    run.section('Maps: images a second, ratio to the time of one forward pass',
                ['side, mode', 'forward pass', 'gradcam, 1 class', 'gradcam, 2 classes', 'mask, 2 classes'], 40)
    for side in ((17, 33) if run.tiny else (257, 513)):
        for how in ('float32', 'bfloat16'): run.row(f'{side}, {how}', speed_row, run, side, how)


@contextmanager
def waits(run, found):
    "Count into `found` the lines at which the host waits for the GPU."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        if run.device.type == 'cuda': torch.cuda.set_sync_debug_mode('warn')
        try: yield
        finally:
            if run.device.type == 'cuda': torch.cuda.set_sync_debug_mode('default')
    lines = [w for w in caught if 'called a synchronizing' in str(w.message)]
    found.update(f'{Path(w.filename).name}:{w.lineno}' for w in lines)


def waits_row(run, term):
    "Waits in the third step."
    networks = toy_teacher(pretrained=True).to(run.device), toy_student().to(run.device)
    step, found = step_of(run, networks, term, Mode(), small(run)), Counter()
    step(), step()
    with waits(run, found): step()
    return [str(found.total()), ', '.join(f'{line} ×{n}' for line, n in found.items())]


def fit_waits_row(run, distilled):
    "Waits in a step of a fit: what four more steps add."
    short, long = Counter(), Counter()
    with waits(run, short): fitted(run, Mode(), distilled, 8)
    with waits(run, long): fitted(run, Mode(), distilled, 12)
    more = long - short
    return [f'{more.total() / 4:g}', ', '.join(f'{line} ×{n / 4:g}' for line, n in more.items())]


def sync(run):
    "Where the host waits for the GPU."
    run.section('Waits of the host for the GPU in a step after the first', ['step', 'waits', 'where'], 40)
    for term in TERMS: run.row(term, waits_row, run, term)
    for distilled in (False, True):
        run.row("fastai's Learner" + (', CAMDistill' if distilled else ', plain'), fit_waits_row, run, distilled)


def loader_row(run, tree, side, workers):
    "Batches a second in a pass over the training images, the start of the processes left out."
    dls = voc_dls(tree, side, 2 if run.tiny else 16, n_workers=workers).to(run.device)
    batches, count = iter(dls.train), 0
    next(batches), run.synchronize()
    start = time.perf_counter()
    for _ in batches: count += 1
    run.synchronize()
    rate = count / (time.perf_counter() - start)
    return [f'{rate:.1f}', *(f'{rate * run.steps[kind][0]:.2f}' if kind in run.steps else '' for kind in BESIDE)]


BESIDE = [(term, how) for how in ('float32', 'bfloat16') for term in ('no distillation', 'class attention')]


def loader(run):
    "Batches of `voc_dls` beside the steps that use them up."
    run.section('Loader: batches a second, and how many of them in the time of a step (1 or more is enough)',
                ['processes', 'batches a second', *map(', '.join, BESIDE)], 60)
    images, side, times = (4, 33, 2) if run.tiny else (16, 513, 30)
    with tempfile.TemporaryDirectory() as folder:
        tree = toy_voc(Path(folder)/'toy', n_train=images, n_valid=1, size=side * 3 // 4)
        names = tree/'ImageSets/Segmentation/train.txt'
        names.write_text(names.read_text() * times)
        for workers in (0, 1) if run.tiny else (0, 4, 8, 16):
            run.row(str(workers), loader_row, run, tree, side, workers)


PARTS = dict(maps=maps, terms=terms, training=training, cost=cost, speed=speed, sync=sync, loader=loader)


def head(run):
    "What this is about."
    name = torch.cuda.get_device_name(run.device) if run.device.type == 'cuda' else platform.processor() or 'CPU'
    print(f'## camkd_nb {camkd_nb.__version__} on {name}\n\n'
          f'Python {platform.python_version()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, '
          f'cuDNN {torch.backends.cudnn.version()}, fastai {fastai.__version__}, '
          f'{torch.get_num_threads()} CPU threads. TF32 as PyTorch sets it: '
          f'convolutions {torch.backends.cudnn.allow_tf32}, matrix products {torch.backends.cuda.matmul.allow_tf32}.')


def main(args=None):
    "The tables asked for; 1 where something is wrong."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', help="'cuda', 'cuda:1' or 'cpu'")
    parser.add_argument('--tiny', action='store_true', help='every path in small, without torch.compile')
    parser.add_argument('--only', choices=PARTS, metavar='PART', help=f'one of {", ".join(PARTS)}')
    asked = parser.parse_args(args)
    warnings.filterwarnings('ignore')
    gc.freeze()  # what is imported stays: collecting between lines is quick
    run = Run(torch.device(asked.device), asked.tiny)
    head(run)
    for run.part in [asked.only] if asked.only else PARTS:
        run.name = run.part
        try: PARTS[run.part](run)
        except Exception as error: print(run.broken(error), flush=True)
    verdict = '; '.join(['**wrong**', *run.failed]) if run.failed else 'all right'
    print(f'\n{time.perf_counter() - run.start:.0f} s; {verdict}')
    return int(bool(run.failed))


if __name__ == '__main__': sys.exit(main())
