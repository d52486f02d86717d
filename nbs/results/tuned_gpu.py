"""A small student and its teacher on one GPU, many trainings at once: each step is captured as a CUDA graph, and the graphs of
several trainings run side by side on streams of their own.

    python tuned_gpu.py run --out FOLDER --seconds 335    fills the pool, tunes every weight on 80 held-out images, then trains the grid
    python tuned_gpu.py rows --device cpu --out FOLDER --first 1 --seeds 3 --methods "none;channel KD"     further rows of the grid, at the tuned weights
    python tuned_gpu.py pace                              milliseconds a step of each loss, alone on the GPU
    python tuned_gpu.py table --out FOLDER

Networks, photographs and environment variables are those of small_student_gpu.py beside it. tuned_gpu.jsonl holds one line a
training: those of 1,500 steps tune the weights (scored on 80 of the 311 training images, which they do not see), those of 2,500
are scored on the 321 validation images. Made on one NVIDIA H100 with PyTorch 2.11: the tuning of single losses and seed 0 with the
code of commit 5accb01, the rest (rows with a device) with that of this script's last commit.
"""
import argparse, json, math, multiprocessing, os, sys, tempfile, time, traceback
from pathlib import Path

import numpy as np, torch
from fastai.torch_core import set_seed
from small_student_gpu import BLOCKS, FROZEN_TEACHER, PLACES, SIX, TREE, augmented, new_student, new_teacher
from camkd_nb.distiller import Distiller
from camkd_nb.evaluate import network_input
from camkd_nb.losses import AttentionTransfer, ChannelKD, ClassAttention, PixelKD
from camkd_nb.rivals import DIST, FeatureKD
from camkd_nb.metrics import ConfusionMatrix, SegLoss
from camkd_nb.regions import region_masks
from camkd_nb.tensors import eval_mode, imagenet_stats, resize, resize_mask
from camkd_nb.trees import voc_ids
from camkd_nb.voc import read_image, read_mask, voc_classes, voc_items

FROZEN, BS, LR, N_CLASSES = 4, int(os.environ.get("BS", 16)), 2e-3, 21
LAYERS = {f'backbone.{BLOCKS - 1 - FROZEN}': f'backbone.{17 - FROZEN_TEACHER}'}

# --- pool ---
def draw(args):
    split, k, n, folder = args
    item = voc_items(TREE, split)[k]
    x, y = augmented(item, n, f'{split} {voc_ids(TREE, split)[k]}')
    np.savez(folder/f'{split}_{k}.npz', x=x, y=y)

def draw_all(args):
    args.work.mkdir(parents=True, exist_ok=True)
    jobs = [(split, k, n, args.work) for split, n in (('train', args.crops), ('more', args.more_crops)) for k in range(len(voc_ids(TREE, split)[:args.images]))]
    with multiprocessing.get_context('fork').Pool(args.procs) as pool: pool.map(draw, jobs, chunksize=8)
    return jobs

class Pool: pass

@torch.no_grad()
def load(args, jobs, device):
    student, teacher, pool = new_student(FROZEN).to(device).eval(), new_teacher().to(device), Pool()
    mean, std = imagenet_stats(torch.zeros((), device=device))
    rows, masks, owner = [], [], []
    for split, k, n, folder in jobs:
        z = np.load(folder/f'{split}_{k}.npz')
        x = (torch.tensor(z['x']).to(device).float() / 255 - mean) / std
        kept = student.kept(x), teacher.kept(x)
        if not PLACES:
            sizes = [o[0].numel() * o.element_size() for o in kept]
            PLACES.update(student=(0, sizes[0], str(kept[0].dtype)[6:], tuple(kept[0].shape[1:])), teacher=(sizes[0], sum(sizes), str(kept[1].dtype)[6:], tuple(kept[1].shape[1:])))
        rows.append(torch.cat([t.contiguous().view(len(t), -1).view(torch.uint8) for t in kept], 1))
        masks.append(torch.tensor(z['y'].astype(np.uint8)).to(device))
        owner += [(split, k)] * len(x)
    pool.x, pool.mask, pool.owner = torch.cat(rows), torch.cat(masks), owner
    ids = voc_ids(TREE, 'train')
    tune = set(voc_ids(TREE, 'tune'))
    at = lambda keep: torch.tensor([r for r, (s, k) in enumerate(owner) if keep(s, k)], device=device)
    pool.train, pool.more = at(lambda s, k: s == 'train'), at(lambda s, k: s == 'more')
    pool.less = at(lambda s, k: s == 'train' and ids[k] not in tune)
    pool.valid = {}
    for split in ('val', 'tune'):
        items = voc_items(TREE, split)[:args.images]
        pool.valid[split] = []
        for image, mask in items:
            x = network_input(read_image(image), None, torch.zeros((), device=device))
            pool.valid[split].append((student.kept(x), torch.tensor(np.array(read_mask(mask))).to(device)))
    return pool

# --- one training ---
class Asked(ClassAttention):
    "Class attention whose choice of classes comes from a buffer that is filled before each step."
    chance: torch.Tensor
    def question(self, step):
        logits = step.teacher.logits.detach()
        mask, (b, c) = resize_mask(step.mask, logits.shape[-2:]), logits.shape[:2]
        if self.absent: classes = self.chance.argsort(1)[:, :self.max_classes]
        else:
            flat = mask.flatten(1).clamp(max=c)
            there = torch.zeros(b, c + 1, device=mask.device).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))[:, :c] > 0
            amount, classes = ((1 - self.chance) * there).topk(self.max_classes, dim=1)
            classes = torch.where(amount > 0, classes, -1)
        return classes, region_masks(classes, logits, mask, self.region)

def batches(pool, which, steps, share, seed):
    "Row numbers of each batch: a share of the 311's crops, the others from the rest."
    rng, (first, more) = np.random.default_rng([seed, 5]), which
    a, b = rng.integers(0, len(first), (steps, BS)), rng.integers(0, max(1, len(more)), (steps, BS))
    take = rng.random((steps, BS)) < (share if len(more) else 1)
    a, b, take = (torch.tensor(v, device=first.device) for v in (a, b, take))
    return torch.where(take, first[a], more[b] if len(more) else first[a])

class Training:
    "One student, its step as a graph."
    def __init__(self, pool, teacher, job, args, device):
        self.job, self.pool, self.steps, self.device, self.seconds = job, pool, job['steps'], device, 0.
        set_seed(job['seed'], reproducible=True)
        self.student = new_student(FROZEN).to(device)
        terms = METHODS[job['method']](job['weight']) if job['method'] != 'none' else []
        terms = terms if isinstance(terms, list) else [terms]
        chance = torch.zeros(BS, N_CLASSES, device=device)
        for t in terms:
            if isinstance(t, Asked): t.chance = chance
        self.chance, self.terms = chance, terms
        self.d = Distiller(self.student, teacher, terms) if terms else None
        own = list(self.d.parameters()) if self.d else []
        self.parameters = [p for p in self.student.parameters() if p.requires_grad] + own
        self.lr = torch.tensor(LR / 25, device=device)
        capturable = device.type == 'cuda'
        self.opt = torch.optim.AdamW(self.parameters, lr=self.lr if capturable else LR, betas=(.9, .99), eps=1e-5, weight_decay=1e-2, fused=True if capturable else None, capturable=capturable)
        self.loss_func, self.rows = SegLoss(), torch.zeros(BS, dtype=torch.long, device=device)
        which = (pool.less if job['tuning'] else pool.train, pool.more if job['share'] < 1 else pool.more[:0])
        self.order = batches(pool, which, self.steps, job['share'], job['seed'])
        self.chances = torch.rand(self.steps, BS, N_CLASSES, generator=torch.Generator().manual_seed(job['seed'])).to(device)
        self.student.train()
        self.stream, self.graph = (torch.cuda.Stream(), None) if capturable else (None, None)
        if capturable and not args.eager: self.capture()

    def body(self):
        x, mask = self.pool.x[self.rows], self.pool.mask[self.rows].long()
        self.opt.zero_grad(set_to_none=True)
        if self.d:
            out = self.d.step(x, mask, self.loss_func)
            total, self.values = out.total, [v.detach() for v, _ in out.terms.values()]
        else: total, self.values = self.loss_func(self.student(x), mask), []
        total.backward()
        self.opt.step()
        self.total = total.detach()

    def capture(self):
        tensors = [*self.student.state_dict().values(), *(self.d.parameters() if self.d else [])]
        kept = [t.detach().clone() for t in tensors]
        self.rows.copy_(self.order[0]), self.chance.copy_(self.chances[0])
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3): self.body()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            self.opt.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph, stream=self.stream): self.body()
            self.graph = graph
        except Exception as e:
            if 'capture' not in FAILED: traceback.print_exc(limit=-6)
            FAILED['capture'] = f'{type(e).__name__}: {str(e)[:200]}'
            print('EAGER', self.job['method'], FAILED['capture'], flush=True)
            torch.cuda.synchronize()
        with torch.no_grad():
            for t, k in zip(tensors, kept): t.copy_(k)
            for state in self.opt.state.values():
                for v in state.values():
                    if isinstance(v, torch.Tensor): v.zero_()
        torch.cuda.synchronize()

    def rate(self, i):
        up = .25 * self.steps
        if i < up: return LR / 25 + (LR - LR / 25) * (1 - math.cos(math.pi * i / up)) / 2
        return LR * (1 + math.cos(math.pi * (i - up) / (self.steps - up))) / 2 + 1e-8

    def advance(self, i):
        start = time.perf_counter()
        if self.stream is None: self.one(i)
        else:
            with torch.cuda.stream(self.stream): self.one(i)
        self.seconds += time.perf_counter() - start

    def one(self, i):
        self.rows.copy_(self.order[i]), self.chance.copy_(self.chances[i])
        self.lr.fill_(self.rate(i))
        if self.stream is None: self.opt.param_groups[0]['lr'] = self.rate(i)
        self.graph.replay() if self.graph is not None else self.body()

@torch.no_grad()
def score(student, pool, split):
    names = voc_classes(TREE)
    confusion = ConfusionMatrix(len(names))
    with eval_mode(student):
        for kept, mask in pool.valid[split]:
            confusion.update(resize(student.small_logits(kept).float(), mask.shape[-2:], align_corners=True), mask[None].long())
    table = confusion.table(names).set_index('class').iou
    return confusion.miou(), {k: round(float(v), 4) for k, v in table.items()}

FAILED = {}
at = lambda w, **k: Asked(w, LAYERS, **k)
METHODS = {
    'pixel KD': lambda w: PixelKD(w), 'channel KD': lambda w: ChannelKD(w), 'feature KD': lambda w: FeatureKD(w, LAYERS),
    'DIST': lambda w: DIST(w), 'attention transfer': lambda w: AttentionTransfer(w, LAYERS), 'class attention': lambda w: at(w),
    'class attention, 1 class': lambda w: at(w, max_classes=1), 'class attention, first order': lambda w: at(w, second_order=False),
    'class attention, absent too': lambda w: at(w, absent=True, region='all'),
    'channel KD + class attention': lambda w: [ChannelKD(w[0]), at(w[1])], 'feature KD + class attention': lambda w: [FeatureKD(w[0], LAYERS), at(w[1])],
    'channel KD + feature KD': lambda w: [ChannelKD(w[0]), FeatureKD(w[1], LAYERS)], 'channel KD + attention transfer': lambda w: [ChannelKD(w[0]), AttentionTransfer(w[1], LAYERS)],
    'DIST + class attention': lambda w: [DIST(w[0]), at(w[1])], 'channel KD + DIST': lambda w: [ChannelKD(w[0]), DIST(w[1])],
    'channel KD + feature KD + class attention': lambda w: [ChannelKD(w[0]), FeatureKD(w[1], LAYERS), at(w[2])]}
TRIED = {'pixel KD': (.1, .3, 1, 3), 'channel KD': (1, 3, 9, 27), 'feature KD': (.3, 1, 3, 10), 'DIST': (.3, 1, 3, 10), 'attention transfer': (.3, 1, 3, 10), 'class attention': (.07, .2, .6, 2)}

PAIRS = {'channel KD + class attention': ([3, .07], [9, .07], [9, .2]), 'feature KD + class attention': ([.3, .07], [.3, .2])}

def tuning_jobs(args):
    base = dict(tuning=True, steps=args.tuning_steps, share=args.share)
    return [dict(method='none', weight=None, seed=s, **base) for s in range(args.tuning_seeds)] + [dict(method=m, weight=w, seed=s, **base) for s in range(args.tuning_seeds) for k in range(4) for m, ws in TRIED.items() for w in [ws[k]]]

def main_jobs(args, best):
    def w(*names): return best.get(' + '.join(names)) or [best[n] for n in names]
    grid = [('none', None)] + [(m, w(m)) for m in TRIED] + [('channel KD + class attention', w('channel KD', 'class attention')), ('feature KD + class attention', w('feature KD', 'class attention')), ('channel KD + feature KD', w('channel KD', 'feature KD')),
        ('channel KD + feature KD + class attention', w('channel KD', 'feature KD', 'class attention')), ('class attention, 1 class', w('class attention')), ('class attention, first order', w('class attention')), ('class attention, absent too', w('class attention')), ('channel KD + attention transfer', w('channel KD', 'attention transfer')),
        ('DIST + class attention', w('DIST', 'class attention')), ('channel KD + DIST', w('channel KD', 'DIST'))]
    return [dict(method=m, weight=v, seed=s, tuning=False, steps=args.steps, share=args.share) for s in range(args.seeds) for m, v in grid]

def run_jobs(jobs, pool, teacher, args, device, spare):
    "Keep `args.side` trainings going, until none is left or the time is up."
    waiting, going, rows, began, done = list(jobs), [], [], time.time(), 0
    while waiting or going:
        while waiting and len(going) < args.side:
            job = waiting.pop(0)
            left, speed = args.until - spare - time.time(), done / max(1e-9, time.time() - began)
            if done > 400 and job['steps'] * min(args.side, len(going) + 1) / speed > left: continue
            try: going.append([Training(pool, teacher, job, args, device), 0])
            except Exception as e: print('FAILED', job, type(e).__name__, str(e)[:300], flush=True); traceback.print_exc(limit=-4)
        if not going: break
        for _ in range(20):
            for one in going:
                if one[1] < one[0].steps: one[0].advance(one[1]); one[1] += 1; done += 1
        if device.type == 'cuda': torch.cuda.synchronize()
        for one in [o for o in going if o[1] >= o[0].steps]:
            going.remove(one)
            t = one[0]
            miou, classes = score(t.student, pool, 'tune' if t.job['tuning'] else 'val')
            row = dict(t.job, miou=round(miou, 5), class_iou=classes, values=[round(float(v), 4) for v in t.values], loss=round(float(t.total), 4), eager=t.graph is None, device=device.type, seconds=round(t.seconds, 1))
            rows.append(row)
            with open(args.out/'tuned_gpu.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')
            del t
        if time.time() > args.until - spare: break
    print(f'{done} steps in {time.time() - began:.0f} s: {done / (time.time() - began):.0f} a second; {len(rows)} of {len(jobs)} trainings', flush=True)
    return rows

def alone(pool, teacher, args, device):
    "Milliseconds a step of each method by itself, eager and as a graph."
    out = {}
    for name, w in (('none', None), ('channel KD', 3.), ('feature KD', 1.), ('class attention', .2), ('class attention, 1 class', .2), ('class attention, first order', .2)):
        t = Training(pool, teacher, dict(method=name, weight=w, seed=0, tuning=False, steps=200, share=.6), args, device)
        for i in range(args.timed // 4): t.advance(i)
        sync = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
        sync(); s = time.perf_counter()
        for i in range(10, 10 + args.timed): t.advance(i)
        sync(); a = (time.perf_counter() - s) / args.timed
        t.graph, s = None, time.perf_counter()
        for i in range(30, 30 + max(1, args.timed // 4)): t.advance(i)
        sync(); out[name] = (round(1000 * a, 2), round(1000 * (time.perf_counter() - s) / max(1, args.timed // 4), 2))
    return out

def begun(args, jobs):
    "The pool, the teacher and their device."
    device = torch.device(args.device)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    return load(args, jobs, device), new_teacher().to(device), device

def pace(args):
    "Milliseconds a step; 3 where one cannot be captured."
    pool, teacher, device = begun(args, draw_all(args))
    print('ms a step, graph and eager:', alone(pool, teacher, args, device), flush=True)
    if FAILED: print(FAILED), sys.exit(3)

def run(args):
    began = time.time()
    jobs = draw_all(args)
    print(f'{time.time() - began:.0f} s drawn', flush=True)
    pool, teacher, device = begun(args, jobs)
    print(f'{time.time() - began:.0f} s: pool of {len(pool.x)} crops, {pool.x.numel() / 1e9:.1f} GB', flush=True)
    print('ms a step, graph and eager:', alone(pool, teacher, args, device), flush=True)
    if FAILED: print(FAILED), sys.exit(3)
    rows = run_jobs(tuning_jobs(args), pool, teacher, args, device, max(args.spare, .5 * (args.until - time.time())))
    best = {m: 1. for m in TRIED}
    for m, ws in TRIED.items():
        means = {w: np.mean([r['miou'] for r in rows if r['method'] == m and r['weight'] == w] or [-1]) for w in ws}
        best[m] = max(means, key=means.get)
        print('tuned', m, {w: round(100 * v, 2) for w, v in means.items()}, '->', best[m], flush=True)
    print('none', [round(100 * r['miou'], 2) for r in rows if r['method'] == 'none'], flush=True)
    run_jobs(main_jobs(args, best), pool, teacher, args, device, args.spare)
    table(args)

def known(file): return [json.loads(line) for line in open(file)] if file.exists() else []

def at_best(made, names):
    "The weight of each name with the highest score in tuning."
    tuned = [r for r in made if r['tuning']]
    return {m: max((r for r in tuned if r['method'] == m), key=lambda r: r['miou'])['weight'] for m in names if any(r['method'] == m for r in tuned)}

def rows(args):
    "Trainings of the grid at the weights that were tuned (the rows beside this script); pairs that were not are tuned first. Rows that exist are left out."
    began, kept, file = time.time(), Path(__file__).with_suffix('.jsonl'), args.out/'tuned_gpu.jsonl'
    pool, teacher, device = begun(args, draw_all(args))
    print(f'{time.time() - began:.0f} s: pool of {len(pool.x)} crops', flush=True)
    asked = args.methods.split(';') if args.methods else list(METHODS) + ['none']
    have = {(r['method'], str(r['weight'])) for r in known(kept) + known(file) if r['tuning']}
    tune = [dict(method=m, weight=w, seed=0, tuning=True, steps=args.tuning_steps, share=args.share) for m in PAIRS if m in asked for w in PAIRS[m] if (m, str(w)) not in have]
    run_jobs(tune, pool, teacher, args, device, args.spare)
    best = at_best(known(kept) + known(file), [*TRIED, *PAIRS])
    print(best, flush=True)
    done = {(r['method'], r['seed']) for r in known(file) if not r['tuning']}
    jobs = [j for j in main_jobs(args, best) if j['seed'] >= args.first and j['method'] in asked and (j['method'], j['seed']) not in done]
    run_jobs(jobs, pool, teacher, args, device, args.spare)

def table(args):
    rows = [r for r in known(args.out/'tuned_gpu.jsonl') if not r['tuning']]
    none = {r['seed']: r for r in rows if r['method'] == 'none'}
    six = lambda r: 100 * sum(r['class_iou'][k] for k in SIX) / len(SIX)
    for m in dict.fromkeys(r['method'] for r in rows):
        of = {r['seed']: r for r in rows if r['method'] == m}
        g = [100 * (r['miou'] - none[s]['miou']) for s, r in of.items() if s in none]; h = [six(r) - six(none[s]) for s, r in of.items() if s in none]
        print(f"{m:45} w={next(iter(of.values()))['weight']} n={len(of)} miou {100 * np.mean([r['miou'] for r in of.values()]):5.2f} six {np.mean([six(r) for r in of.values()]):5.2f} gain {np.mean(g):+5.2f} {[round(v, 1) for v in g]} six {np.mean(h):+5.2f} {[round(v, 1) for v in h]}")

def main():
    made = argparse.ArgumentParser()
    add = made.add_argument
    add('what', choices=('run', 'rows', 'pace', 'table')), add('--out', type=Path, default=Path('.')), add('--work', type=Path, default=Path(tempfile.gettempdir())/'tuned_gpu')
    add('--until', type=float, default=0.), add('--seconds', type=float, default=300.), add('--device', default='cuda'), add('--images', type=int, default=None)
    add('--crops', type=int, default=32), add('--more-crops', type=int, default=8), add('--procs', type=int, default=16), add('--eager', action='store_true')
    add('--side', type=int, default=6), add('--steps', type=int, default=3000), add('--tuning-steps', type=int, default=2000), add('--tuning-seeds', type=int, default=1), add('--seeds', type=int, default=5), add('--first', type=int, default=0), add('--methods', help='names with ; between them, else all')
    add('--share', type=float, default=.6), add('--spare', type=float, default=8.), add('--timed', type=int, default=40)
    args = made.parse_args()
    args.until = args.until or time.time() + args.seconds
    globals()[args.what](args)

if __name__ == '__main__': main()
