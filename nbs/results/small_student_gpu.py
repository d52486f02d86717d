"""A small student and its teacher on one GPU: the trainings behind small_student_gpu.csv, a first look with two seeds.

    python small_student_gpu.py run --part 0/10 --until EPOCH --out FOLDER   (one process of ten, started together)
    python small_student_gpu.py table --out FOLDER                           (the summary)
    python small_student_gpu.py tree --source VOC2012 --out FOLDER           (first: the photographs at 400 pixels, and the lists)

The student is MobileNetV2 cut after block 13, pretrained on ImageNet, with a small pyramid head: 0.66 million parameters.
Its teacher is a DeepLabV3 on MobileNetV2 for the classes of VOC: 2.11 million. $CAMKD_VOC is a tree whose photographs
have a long side of 400 pixels, with the lists train, val, more, trainmore, tune and train_less_tune; $CAMKD_WEIGHTS holds
mobilenetv2_imagenet.pth and deeplabv3_mobilenetv2_voc.pth. `tree` makes the first from VOC 2012 with the masks of trainaug
(`voc_add_sbd`). The rows were made with the 311 and 321 images of VOC 2012
whose names begin with 2007_ and 550 more: all show one of the six well represented classes, and 310 another class too.

Each process augments every n-th photograph, sends the crops through the frozen first blocks of both networks and writes
its part; then all load all parts to the card, measure the speed of the methods under full load, choose the number of steps
that fits the time (--steps 0), and take trainings from the list, in the order of their importance, until the time is up.
"""
import argparse, json, os, random, tempfile, threading, time, warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np, pandas as pd, torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam, Optimizer
from PIL import Image
from torch import nn

import camkd_nb.training
from camkd_nb.data import JointAugment
from camkd_nb.samples import VOCImage, VOCMask
from camkd_nb.evaluate import Evaluation, evaluate, network_input
from camkd_nb.loading import SeededDL
from camkd_nb.losses import AttentionTransfer, ChannelKD, ClassAttention, PixelKD
from camkd_nb.metrics import ConfusionMatrix
from camkd_nb.backbones import build_backbone
from camkd_nb.heads import PSPHead
from camkd_nb.models import SegmentationModel
from camkd_nb.published import deeplabv3_mobilenetv2_voc
from camkd_nb.study import Study, append_row, read_runs, row_of, train
from camkd_nb.tensors import eval_mode, imagenet_stats, resize
from camkd_nb.training import Recipe
from camkd_nb.trees import voc_ids
from camkd_nb.voc import read_image, read_mask, voc_classes, voc_items

TREE, WEIGHTS = Path(os.environ.get('CAMKD_VOC', '.')), Path(os.environ.get('CAMKD_WEIGHTS', '.'))
SIX = 'cat', 'dog', 'horse', 'cow', 'sheep', 'person'
SIZE, GRID = 257, 65  # sides of crops and of what the loss sees
BLOCKS, CHANNELS, WIDTH, FROZEN_TEACHER = 14, 96, 64, 7

# --- networks ---
class Start(nn.Module):
    "A segmentation network behind its frozen blocks; it takes images, features, or its bytes of the pool's rows."
    def __init__(self, model, n):
        super().__init__()
        blocks = list(getattr(model.backbone, 'features', model.backbone))
        self.stem, self.backbone = nn.Sequential(*blocks[:n]).eval().requires_grad_(False), nn.Sequential(*blocks[n:])
        self.head, self.n, self.place = model.head, n, None

    def train(self, mode=True):
        super().train(mode)
        self.stem.eval()
        return self

    def kept(self, x):
        "What the pool keeps of normalised images: features as float16, or images as uint8."
        if self.n: return self.stem(x).half()
        mean, std = imagenet_stats(x)
        return ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def unkept(self, kept):
        if kept.dtype != torch.uint8: return kept.float()
        mean, std = imagenet_stats(kept.float())
        return (kept.float() / 255 - mean) / std

    def small_logits(self, kept): return self.head(self.backbone(self.unkept(kept)))

    def forward(self, x):
        if x.ndim == 4: return resize(self.head(self.backbone(self.stem(x))), x.shape[-2:], align_corners=True)
        start, stop, dtype, shape = self.place
        kept = x[:, start:stop].to(torch.uint8).contiguous().view(getattr(torch, dtype)).view(len(x), *shape)
        return resize(self.small_logits(kept), (GRID, GRID), align_corners=True)

PLACES = {}  # 'student' and 'teacher' -> (first byte, end, name of the dtype, shape): set with the pool

def new_student(frozen):
    net = build_backbone('mobilenet_v2', 16)
    state = torch.load(WEIGHTS/'mobilenetv2_imagenet.pth', weights_only=True)
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    made = Start(SegmentationModel(net.features[:BLOCKS], PSPHead(CHANNELS, 21, width=WIDTH), align_corners=True), frozen)
    made.place = PLACES.get('student')
    return made

def whole_teacher():
    return deeplabv3_mobilenetv2_voc(WEIGHTS/'deeplabv3_mobilenetv2_voc.pth').float().eval()

def new_teacher():
    made = Start(whole_teacher(), FROZEN_TEACHER).eval()
    made.place = PLACES.get('teacher')
    return made

# --- pool ---
def augmented(item, n, key):
    "Crops of one photograph: uint8 (n, 3, s, s) and (n, g, g)."
    aug, pair = JointAugment(SIZE, scale=(.6, 1.4)), (VOCImage.create(item[0]), VOCMask.create(item[1]))
    random.seed(key)
    both = [aug(pair, split_idx=0) for _ in range(n)]
    step = (SIZE - 1) // (GRID - 1)
    return (np.stack([np.asarray(x).transpose(2, 0, 1) for x, _ in both]), np.stack([np.asarray(y)[::step, ::step] for _, y in both]))

def as_bytes(t): return t.contiguous().view(len(t), -1).view(torch.uint8).cpu()

@torch.no_grad()
def fill_part(args, device):
    "Every n-th photograph of each list, through both stems."
    student, teacher = new_student(args.frozen).to(device).eval(), new_teacher().to(device)
    part = {'places': None}
    for split, n in (('train', args.crops), ('more', args.more_crops)):
        ids, items = voc_ids(TREE, split)[:args.images], voc_items(TREE, split)[:args.images]
        rows, masks, whose = [], [], []
        for k in range(args.k, len(items), args.n):
            images, mask = augmented(items[k], n, f'{split} {ids[k]}')
            for some in torch.tensor(images).split(16):
                x = some.to(device).float() / 255
                mean, std = imagenet_stats(x)
                x = (x - mean) / std
                kept = student.kept(x), teacher.kept(x)
                if part['places'] is None:
                    sizes = [o[0].numel() * o.element_size() for o in kept]
                    ends = [sizes[0], sizes[0] + sum(sizes[:1]) % 2]  # the teacher's halves begin at an even byte
                    part['places'] = {'student': (0, sizes[0], str(kept[0].dtype)[6:], tuple(kept[0].shape[1:])),
                                      'teacher': (ends[1], ends[1] + sizes[1], str(kept[1].dtype)[6:], tuple(kept[1].shape[1:]))}
                row = torch.zeros(len(x), part['places']['teacher'][1], dtype=torch.uint8)
                for who, o in zip(('student', 'teacher'), kept): row[:, slice(*part['places'][who][:2])] = as_bytes(o)
                rows.append(row)
            masks.append(torch.tensor(mask)), whose.extend([k] * n)
        part[split] = (torch.cat(rows), torch.cat(masks), whose) if rows else None
    for split in ('val', 'tune'):
        part[split] = []
        items = voc_items(TREE, split)[:args.images]
        for k in range(args.k, len(items), args.n):
            x = network_input(read_image(items[k][0]), None, torch.zeros((), device=device))
            part[split].append((student.kept(x).cpu(), torch.tensor(read_mask(items[k][1]))))
    draft = args.work/f'draft_{args.k}.pth'
    torch.save(part, draft)
    draft.rename(args.work/f'part_{args.k}.pth')

def wait_for(args, name, seconds):
    "Until all processes have written their file of this name."
    start = time.time()
    while True:
        there = [args.work/f'{name}_{k}.{"pth" if name == "part" else "json"}' for k in range(args.n)]
        if all(file.exists() for file in there): return there
        if time.time() - start > seconds: raise SystemExit(f'{name}: not all processes came')
        time.sleep(.1)

class Pool:
    "All parts on one device, and who may be drawn."
    def __init__(self, files, device):
        parts = [torch.load(file, weights_only=True, mmap=True) for file in files]
        PLACES.update(next(p['places'] for p in parts if p['places']))
        blocks = {split: [p[split] for p in parts if p[split] is not None] for split in ('train', 'more')}
        total = sum(len(b[0]) for of in blocks.values() for b in of)
        self.x = torch.empty(total, PLACES['teacher'][1], dtype=torch.uint8, device=device)
        self.mask, at, self.rows = torch.empty(total, GRID, GRID, dtype=torch.uint8, device=device), 0, {}
        for split, of in blocks.items():
            first = at
            whose = []
            for x, mask, owners in of:
                self.x[at:at + len(x)], self.mask[at:at + len(x)] = x.to(device), mask.to(device)
                at, whose = at + len(x), whose + list(owners)
            self.rows[split] = [(first + r, owner) for r, owner in enumerate(whose)]
        self.valid = {split: [(x.to(device), m.to(device)) for p in parts for x, m in p[split]] for split in ('val', 'tune')}

    def rows_of(self, split):
        "Row numbers of a list."
        if split == 'more': return [r for r, _ in self.rows['more']]
        allowed, ids = set(voc_ids(TREE, split)), voc_ids(TREE, 'train')
        return [r for r, owner in self.rows['train'] if ids[owner] in allowed]

POOL, UNTIL = None, float('inf')

class TimeIsUp(Exception): pass

class Batches(torch.utils.data.Dataset):
    "Item i is a whole batch, drawn by the random numbers that `SeededDL` sets for it."
    def __init__(self, recipe):
        self.recipe, self.first = recipe, POOL.rows_of(recipe.train)
        self.more = POOL.rows_of('more') if recipe.share < 1 else []

    def __len__(self): return self.recipe.steps_an_epoch
    def __getitem__(self, i):
        if time.time() > UNTIL: raise TimeIsUp()
        rows = [random.choice(self.first if not self.more or random.random() < self.recipe.share else self.more) for _ in range(self.recipe.bs)]
        rows = torch.tensor(rows, device=POOL.x.device)
        return POOL.x[rows], POOL.mask[rows].long()

@dataclass
class PoolBatches(Recipe):
    "Batches from the pool on the card."
    share: float = 1.  # of the crops from the 311, the others from `more`
    valid: str = 'val'
    frozen: int = 4
    steps_an_epoch: int = 100

    def batches(self, seed=None):
        loader = SeededDL(Batches(self), bs=None, shuffle=False, seed=seed, num_workers=0)
        device = torch.device(self.device)
        self.check_device(device)
        return DataLoaders(loader, loader.new(), device=device)

@torch.no_grad()
def score(model, recipe):
    "What `evaluate` computes on the photographs at 400 pixels, from what the pool keeps of them."
    names, device = voc_classes(TREE), next(model.parameters()).device
    confusion = ConfusionMatrix(len(names))
    with eval_mode(model):
        for kept, mask in POOL.valid[recipe.valid]:
            with torch.autocast(device.type, torch.bfloat16, enabled=bool(recipe.amp)): logits = model.small_logits(kept)
            confusion.update(resize(logits.float(), mask.shape, align_corners=True), mask[None])
    return Evaluation(confusion.miou(), confusion.pixel_accuracy(), confusion.table(names), confusion.matrix.cpu())

# --- optimiser ---
class QuickAdam(Optimizer):
    "fastai's Adam with one launch for all parameters instead of several for each."
    @torch.no_grad()
    def step(self, closure=None):
        for group, hyper in zip(self.param_lists, self.hypers):
            ps = [p for p in group if p.grad is not None]
            if not ps: continue
            states, grads = [self.state[p] for p in ps], [p.grad for p in ps]
            for p, s in zip(ps, states):
                if 'grad_avg' not in s: s.update(grad_avg=torch.zeros_like(p), sqr_avg=torch.zeros_like(p), step=0)
                s['step'] += 1
            lr, mom, sqr_mom, step = hyper['lr'], hyper['mom'], hyper['sqr_mom'], states[0]['step']
            decayed = [p for p, s in zip(ps, states) if s.get('do_wd', True)]
            if hyper['wd'] and decayed: torch._foreach_mul_(decayed, 1 - lr * hyper['wd'])
            avg, sqr = [s['grad_avg'] for s in states], [s['sqr_avg'] for s in states]
            torch._foreach_mul_(avg, mom), torch._foreach_add_(avg, grads, alpha=1 - mom)
            torch._foreach_mul_(sqr, sqr_mom), torch._foreach_addcmul_(sqr, grads, grads, value=1 - sqr_mom)
            root = torch._foreach_div(sqr, 1 - sqr_mom**step)
            torch._foreach_sqrt_(root), torch._foreach_add_(root, hyper['eps'])
            torch._foreach_addcdiv_(ps, avg, root, value=-lr / (1 - mom**step))

    def zero_grad(self):
        for p, *_ in self.all_params(with_grad=True): p.grad = None

def quick_adam(params, lr, **kwargs):
    made = Adam(params, lr=lr, **kwargs)
    made.__class__ = QuickAdam
    return made

# --- the grid ---
def methods(layers):
    at = partial(ClassAttention, layers=layers)
    main = {'none': [], 'channel KD': ChannelKD(), 'class attention': at(), 'channel KD + class attention': [ChannelKD(), at()],
            'pixel KD': PixelKD(), 'attention transfer': AttentionTransfer(layers=layers)}
    weights = {**{f'channel KD x{k:g}': ChannelKD(3. * k) for k in (.3, 3)}, **{f'class attention x{k:g}': at(.2 * k) for k in (.3, 3)},
               'pixel KD x0.3': PixelKD(.3)}
    tuning = {'none': [], 'channel KD x1': ChannelKD(), 'class attention x1': at(), 'pixel KD x1': PixelKD(), **weights}
    return main, weights, tuning

def studies(args, steps):
    "The settings."
    device, teacher = args.device, new_teacher().to(args.device)
    main, weights, tuning = methods({f'backbone.{BLOCKS - 1 - args.frozen}': f'backbone.{17 - FROZEN_TEACHER}'})
    made = lambda name, of, **kwargs: Study(args.out/'small_student_gpu.csv', f'{name}, {steps} steps',
        PoolBatches(TREE, epochs=steps // args.an_epoch, size=SIZE, bs=args.bs, lr=args.lr, resize=400, scale=(.6, 1.4), amp=args.amp,
                    device=device, frozen=args.frozen, steps_an_epoch=args.an_epoch, **kwargs),
        partial(new_student, args.frozen), teacher, of, score=score)
    n = len(voc_ids(TREE, 'more')[:args.images])
    return {'all': made(f'311 + {n} labelled', {**main, **weights}, share=args.share), '311': made('311 labelled', main),
            'tuning': made(f'tuning on 80 of the 311, 231 + {n} labelled', tuning, share=args.share, train='train_less_tune', valid='tune')}, main, weights, tuning

def grid(args, main, weights, tuning):
    "What to train, the most important first."
    first = [(of, name, seed) for of in ('all', '311') for seed in range(3) for name in main]
    listed = first + [('tuning', name, 0) for name in tuning] + [('all', name, seed) for seed in range(3) for name in weights] \
        + [(of, name, seed) for seed in (3, 4) for of in ('all', '311') for name in main]
    return [one for one in listed if one[0] in args.settings.split(',')]

def measure(args, main):
    "Seconds a step of one method, with all processes at work."
    name = list(main)[args.k % len(main)]
    few = max(1, args.measure // 4)
    for count in (few, args.measure):
        warming = argparse.Namespace(**{**vars(args), 'an_epoch': count, 'out': args.work})
        study = studies(warming, count)[0]['all']
        _, seconds, _ = train(study, name, 0)
        if count == few:
            (args.work/f'warm_{args.k}.json').write_text('1')
            wait_for(args, 'warm', 90)
    draft = args.work/f'draft_{args.k}.json'
    draft.write_text(json.dumps({'method': name, 'step': seconds / args.measure}))
    draft.rename(args.work/f'speed_{args.k}.json')

def run(args):
    global POOL, UNTIL
    began = time.time()
    last = threading.Timer(args.until + 25 - began, os._exit, [3])  # if all else hangs
    last.daemon = True
    last.start()
    say = lambda *what: print(f'[{args.k} {time.time() - began:.0f}s]', *what, flush=True)
    device = torch.device(args.device)
    if device.type == 'cpu': torch.set_num_threads(1)
    else: torch.set_num_threads(1), torch.zeros(1, device=device)
    camkd_nb.training.Learner = partial(Learner, opt_func=quick_adam)
    args.work.mkdir(parents=True, exist_ok=True), args.out.mkdir(parents=True, exist_ok=True)
    fill_part(args, device)
    say('part filled')
    POOL = Pool(wait_for(args, 'part', 180), device)
    if device.type == 'cuda': torch.cuda.empty_cache()
    say(f'pool of {len(POOL.x)} crops, {POOL.x.numel() / 1e9:.2f} GB')
    main = methods({})[0]
    measure(args, main)
    speeds = [json.loads(file.read_text()) for file in wait_for(args, 'speed', 120)]
    rate, step_of = sum(1 / s['step'] for s in speeds), {}
    for name in main: step_of[name] = np.mean([s['step'] for s in speeds if s['method'] == name] or [np.mean([s['step'] for s in speeds])])
    left = args.until - max((args.work/f'speed_{k}.json').stat().st_mtime for k in range(args.n))
    steps = args.steps or int(np.clip(rate * left * .9 / args.trainings, args.least, args.most)) // args.an_epoch * args.an_epoch
    if args.k == 0:
        table = {name: round(1000 * float(s), 1) for name, s in step_of.items()}
        say(f'{rate:.0f} steps/s together, {left:.0f} s left: trainings of {steps} steps; ms a step under load {table}')
        (args.out/'speed.json').write_text(json.dumps({'steps_a_second': rate, 'left': left, 'steps': steps, 'ms': table, 'processes': args.n,
            'options': {k: str(v) for k, v in vars(args).items()}, 'device': str(torch.cuda.get_device_name() if device.type == 'cuda' else device)}))
    UNTIL = args.until
    made, *of = studies(args, steps)
    slower, failed = 1., 0
    for i, (which, name, seed) in enumerate(grid(args, *of)):
        needed = slower * steps * next((s for known, s in reversed(step_of.items()) if name.startswith(known)), rate and args.n / rate) + args.spare
        if time.time() + needed > args.until: continue
        try: os.close(os.open(args.work/f'claim_{i}', os.O_CREAT | os.O_EXCL))
        except FileExistsError: continue
        try:
            start = time.time()
            student, seconds, terms = train(made[which], name, seed)
            append_row(made[which].file, row_of(made[which], name, seed, student, seconds, terms))
            say(f'{made[which].setting}, {name}, seed {seed}: {time.time() - start:.0f} s, expected {needed:.0f}')
            slower = .5 * slower + .5 * slower * min(2., max(.5, (seconds + args.spare) / needed))
        except TimeIsUp: say('time is up in', which, name, seed)
        except (FloatingPointError, RuntimeError, ValueError) as e:
            say('FAILED', which, name, seed, type(e).__name__, str(e)[:300])
            failed += 1
            if failed == 2: break  # what has broken the card's context would break all that follow
    say('done')

def table(args):
    "All rows, and the means."
    runs = read_runs(args.out/'small_student_gpu.csv')
    iou = runs.class_iou.map(json.loads)
    shown = runs.assign(miou=(100 * runs.miou).round(2), six=[round(100 * sum(one[name] for name in SIX) / len(SIX), 2) for one in iou])
    pd.set_option('display.width', 200), pd.set_option('display.max_rows', 500)
    print(shown[['setting', 'method', 'seed', 'miou', 'six', 'seconds']].sort_values(['setting', 'method', 'seed']).to_string(index=False))
    for setting, some in shown.groupby('setting'):
        wide = {what: some.pivot_table(index='seed', columns='method', values=what) for what in ('miou', 'six')}
        gains = pd.DataFrame({f'{what} {k}': v for what, w in wide.items() for k, v in
                              {'mean': w.mean(), 'gain': w.sub(w.get('none', w.mean(axis=1)), axis=0).mean()}.items()} | {'seeds': wide['miou'].count()})
        print(f'\n{setting}\n{gains.round(2).to_string()}')

# --- the photographs ---
def tree(args):
    "The photographs and masks of the rows at 400 pixels, with their lists; `--source` may be given several times."
    lists = json.loads(Path(__file__).with_name('small_student_lists.json').read_text())
    ids = {split: [i for i in voc_ids(args.source[0], split) if i.startswith('2007_')] for split in ('train', 'val')}
    lists = ids | lists | dict(trainmore=ids['train'] + lists['more'], train_less_tune=[i for i in ids['train'] if i not in lists['tune']])
    for part in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'): (args.out/part).mkdir(parents=True, exist_ok=True)
    for i in lists['trainmore'] + lists['val']:
        root = next((root for root in args.source if (root/f'SegmentationClass/{i}.png').exists()), None)
        if root is None: raise SystemExit(f'no mask of {i}: it is in trainaug, whose masks voc_add_sbd adds')
        image, mask = Image.open(root/f'JPEGImages/{i}.jpg').convert('RGB'), Image.open(root/f'SegmentationClass/{i}.png')
        size = [max(1, round(side * 400 / max(image.size))) for side in image.size]
        image.resize(size, Image.Resampling.BILINEAR).save(args.out/f'JPEGImages/{i}.jpg', quality=85, optimize=True, progressive=True)
        mask.resize(size, Image.Resampling.NEAREST).save(args.out/f'SegmentationClass/{i}.png', optimize=True)
    for name, rows in lists.items(): (args.out/f'ImageSets/Segmentation/{name}.txt').write_text('\n'.join(rows) + '\n')
    print({name: len(rows) for name, rows in lists.items()})

def main():
    made = argparse.ArgumentParser()
    add = made.add_argument
    add('what', choices=('run', 'table', 'teacher', 'tree'))
    add('--part', default='0/1'), add('--out', type=Path, default=Path('.')), add('--work', type=Path, default=Path(tempfile.gettempdir())/'small_student')
    add('--until', type=float, default=0.), add('--seconds', type=float, default=330.), add('--source', type=Path, action='append', help='a tree of VOC 2012')
    add('--device', default='cuda'), add('--amp', default=None), add('--frozen', type=int, default=4)
    add('--crops', type=int, default=32), add('--more-crops', type=int, default=8), add('--images', type=int, default=None)
    add('--steps', type=int, default=0), add('--an-epoch', type=int, default=100), add('--measure', type=int, default=60)
    add('--trainings', type=int, default=45), add('--least', type=int, default=2500), add('--most', type=int, default=6000)
    add('--bs', type=int, default=16), add('--lr', type=float, default=2e-3), add('--share', type=float, default=.6)
    add('--settings', default='all,311,tuning')
    add('--spare', type=float, default=5.)
    args = made.parse_args()
    args.k, args.n = map(int, args.part.split('/'))
    args.out, args.until = args.out.resolve(), args.until or time.time() + args.seconds
    if args.what == 'run': run(args)
    elif args.what == 'table': table(args)
    elif args.what == 'tree': tree(args)
    else: print('teacher', evaluate(whole_teacher().to(args.device), TREE, progress=False))

if __name__ == '__main__': main()
