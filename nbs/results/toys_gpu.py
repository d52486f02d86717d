"""Which schedule makes camkd-demo dependable, and what may class attention leave out? Short trainings of the toy student on a GPU.

    python toys_gpu.py run --part 0/14 --out FOLDER --work FOLDER    (one process of fourteen, started together)
    python toys_gpu.py table --out FOLDER

toys_gpu.jsonl holds a first look: one or two seeds of each, made on one NVIDIA H100 in 390 seconds with the code of commit
aad27fd, where `absent=True` was `classes='any'`. The schedule is fastai's one cycle, rewritten; batches lie on the card.
"""
import argparse, json, os, random, tempfile, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import numpy as np, torch
from fastai.torch_core import set_seed
from camkd_nb.data import JointAugment
from camkd_nb.samples import VOCImage, VOCMask
from camkd_nb.losses import ChannelKD, ClassAttention
from camkd_nb.distiller import Distiller
from camkd_nb.metrics import ConfusionMatrix, SegLoss
from camkd_nb.models import toy_student, toy_teacher
from camkd_nb.toyvoc import toy_voc
from camkd_nb.voc import voc_items
from camkd_nb.tensors import imagenet_stats

CA = lambda w=.2, **k: [ClassAttention(w, **k)]
BOTH = lambda w=.2, c=3.: [ClassAttention(w), ChannelKD(c)]
class Every(ClassAttention):
    def __init__(self, weight, n): super().__init__(weight * n); self.n = n
    def forward(self, step): return super().forward(step) if self.calls % self.n == 0 else step.student.logits.new_zeros(())
from camkd_nb.losses import map_distance
import torch.nn.functional as F
from camkd_nb.tensors import resize
def pooled(side): return lambda s, t, m: map_distance(F.adaptive_avg_pool2d(s, side), F.adaptive_avg_pool2d(t, side), m, centred=True)
def at_image(s, t, m): return map_distance(resize(s, m.shape[-2:]), resize(t, m.shape[-2:]), m, centred=True)
# name: (size, epochs, bs, lr, n_train, warm epochs, {method: terms})
GRID = {
 'today':     (96, 25, 16, 5e-3, 400, 0, {'ca.2': CA, 'ca.5': lambda: CA(.5), 'both': BOTH}),
 'fork':      (96, 18, 16, 5e-3, 400, 14, {'ca.2': CA, 'ca.5': lambda: CA(.5)}),
 'crop64':    (64, 56, 16, 5e-3, 400, 0, {'ca.2': CA, 'ca.5': lambda: CA(.5), 'both': BOTH, 'one': lambda: CA(.2, max_classes=1), 'first': lambda: CA(.2, second_order=False),
               'every2': lambda: [Every(.2, 2)], 'every4': lambda: [Every(.2, 4)], 'onefirst': lambda: CA(.2, max_classes=1, second_order=False), 'ckd': lambda: [ChannelKD()],
               'pool4': lambda: CA(.2, distance=pooled(4)), 'pool2': lambda: CA(.2, distance=pooled(2)), 'image': lambda: CA(.2, distance=at_image),
               'absent': lambda: CA(.2, absent=True, region='all'), 'late': lambda: CA(lambda p: .4 * (p > .5)), 'early': lambda: CA(lambda p: .4 * (p < .5))}),
 'crop64lr1': (64, 56, 16, 1e-2, 400, 0, {'ca.2': CA, 'ca.5': lambda: CA(.5)}),
 'n200':      (64, 110, 16, 5e-3, 200, 0, {'ca.5': lambda: CA(.5)}),
 'fork64':    (64, 36, 16, 5e-3, 400, 36, {'ca.2': CA, 'ca.5': lambda: CA(.5)}),
}
SIZES, VERSIONS = (96, 64), 20

def pool(args):
    tree = toy_voc(n_train=400, n_valid=200, dest=args.work/'toy')
    for k in range(args.k, 400, args.n):
        item = voc_items(tree, 'train')[k]
        pair = VOCImage.create(item[0]), VOCMask.create(item[1])
        out = {}
        for size in SIZES:
            aug = JointAugment(size, scale=(1., 1.))
            random.seed(f'{size} {k}')
            both = [aug(pair, split_idx=0) for _ in range(VERSIONS)]
            out[size] = np.stack([np.asarray(x).transpose(2, 0, 1) for x, _ in both]), np.stack([np.asarray(y) for _, y in both])
        np.save(args.work/f'item_{k}.draft.npy', np.array([0]))
        for size, (x, y) in out.items():
            np.save(args.work/f'x_{size}_{k}.npy', x), np.save(args.work/f'y_{size}_{k}.npy', y)
        (args.work/f'item_{k}.done').write_text('')

def load(args, device):
    while sum(1 for _ in args.work.glob('item_*.done')) < 400: time.sleep(.2)
    data = {size: tuple(torch.tensor(np.stack([np.load(args.work/f'{a}_{size}_{k}.npy') for k in range(400)])).to(device) for a in 'xy') for size in SIZES}
    tree = args.work/'toy'
    valid = [(np.asarray(VOCImage.create(i)).transpose(2, 0, 1), np.asarray(VOCMask.create(m))) for i, m in voc_items(tree, 'val')]
    return data, (norm(torch.tensor(np.stack([x for x, _ in valid])).to(device)), torch.tensor(np.stack([m for _, m in valid])).long().to(device))

def norm(x):
    mean, std = imagenet_stats(torch.zeros((), device=x.device))
    return (x.float() / 255 - mean) / std

def batches(data, size, epochs, bs, n, seed):
    rng, (x, y) = np.random.default_rng([seed, 17]), data[size]
    for e in range(epochs):
        order = rng.permutation(n)
        for s in range(0, n - bs + 1, bs):
            who, v = torch.tensor(order[s:s + bs], device=x.device), torch.tensor(rng.integers(0, VERSIONS, bs), device=x.device)
            yield norm(x[who, v]), y[who, v].long()

def train(model, teacher, terms, data, size, epochs, bs, lr, n, seed, total=None, at=0, pct=.25):
    "One cycle as fastai's fit_one_cycle: cosine up for a quarter, cosine down; Adam with wd .01 and momentum .95-.85-.95."
    steps = epochs * (n // bs)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.95, .99), eps=1e-5, weight_decay=1e-2, fused=True)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps + 1, pct_start=pct, div_factor=25, final_div_factor=4e3, base_momentum=.85, max_momentum=.95)
    loss, d = SegLoss(), Distiller(model, teacher, terms) if terms else None
    model.train()
    for i, (x, m) in enumerate(batches(data, size, epochs, bs, n, seed)):
        opt.zero_grad()
        total_loss = d.step(x, m, loss, i / steps).total if d else loss(model(x), m)
        total_loss.backward(); opt.step(); sched.step()
        if time.time() > UNTIL: raise TimeoutError
    return model

@torch.no_grad()
def score(model, valid):
    model.eval(); c = ConfusionMatrix(7)
    for x, m in zip(valid[0].split(50), valid[1].split(50)): c.update(model(x), m)
    return c.miou()

def run(args):
    global UNTIL
    UNTIL = args.until
    torch.set_num_threads(1)
    device = torch.device(args.device)
    args.work.mkdir(parents=True, exist_ok=True), args.out.mkdir(parents=True, exist_ok=True)
    pool(args)
    data, valid = load(args, device)
    teacher = toy_teacher(pretrained=True).to(device).eval()
    if args.k == 0: print('teacher', score(teacher, valid), flush=True)
    names = args.names.split(',') if args.names else list(GRID)
    jobs = [(s, n, m) for s in range(args.first, args.first + args.seeds) for n in names for m in ['none', *GRID[n][-1]]]
    for seed, name, method in jobs:
        try: os.close(os.open(args.work/f'claim_{seed}_{name}_{method}', os.O_CREAT | os.O_EXCL))
        except FileExistsError: continue
        size, epochs, bs, lr, n, warm, of = GRID[name]
        try:
            set_seed(seed, reproducible=True)
            made, t0 = toy_student().to(device), time.time()
            if warm: train(made, teacher, [], data, size, warm, bs, lr, n, 100 + seed)
            train(made, teacher, {'none': list, **of}[method](), data, size, epochs, bs, lr, n, seed)
            with open(args.out/'toys_gpu.jsonl', 'a') as f: f.write(json.dumps(dict(name=name, method=method, seed=seed, miou=score(made, valid), seconds=round(time.time() - t0, 1))) + '\n')
        except TimeoutError: break
        except (RuntimeError, ValueError, TypeError, FloatingPointError) as e: print('FAILED', seed, name, method, type(e), str(e)[:300], flush=True)
    print('done', args.k, flush=True)

def table(args):
    rows = [json.loads(l) for l in open(args.out/'toys_gpu.jsonl')]
    by = {(r['name'], r['method'], r['seed']): r for r in rows}
    for name in GRID:
        for method in ['none', *GRID[name][-1]]:
            got = {s: r for (n, m, s), r in by.items() if (n, m) == (name, method)}
            if not got: continue
            gains = [100 * (r['miou'] - by[name, 'none', s]['miou']) for s, r in got.items() if (name, 'none', s) in by]
            v = [100 * r['miou'] for r in got.values()]
            print(f'{name:10} {method:8} n={len(v):2} miou {np.mean(v):5.1f} sd {np.std(v):4.1f} gain {np.mean(gains):+5.2f} sd {np.std(gains):4.2f} min {min(gains):+5.2f} s {np.mean([r["seconds"] for r in got.values()]):.0f}')

p = argparse.ArgumentParser(); add = p.add_argument
add('what'); add('--part', default='0/1'); add('--until', type=float, default=time.time() + 1e5); add('--out', type=Path, default=Path('.')); add('--work', type=Path, default=Path(tempfile.gettempdir())/'toys')
add('--device', default='cuda'); add('--seeds', type=int, default=6); add('--first', type=int, default=0); add('--names', default='')
args = p.parse_args(); args.k, args.n = map(int, args.part.split('/'))
run(args) if args.what == 'run' else table(args)
