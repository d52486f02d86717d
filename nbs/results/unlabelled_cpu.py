"""A small student that learns from 311 labelled photographs and 2,446 without labels, on one CPU core.

    python unlabelled_cpu.py pool                       crops of the photographs, through the frozen blocks: once, 5 minutes of two cores
    python unlabelled_cpu.py tune --steps 500           the weights, on 78 of the 311 that these trainings do not see
    python unlabelled_cpu.py rows --seeds 0 --methods "none;channel KD, unlabelled too"     trainings that the file lacks, 3 to 11 minutes each
    python unlabelled_cpu.py table

The student is MobileNetV2 cut after block 13, pretrained on ImageNet, its first seven blocks frozen, with a small pyramid head: 0.66
million parameters. Its teacher is a DeepLabV3 on MobileNetV2 for the classes of VOC: 2.11 million. $CAMKD_VOC is a tree of Pascal
VOC 2012 whose lists train and val hold the 311 and 321 photographs named 2007_*, $CAMKD_MORE one whose list "more" is more.txt beside
this script (the masks there, from the list trainaug, serve "labels for all" alone), $CAMKD_WEIGHTS a folder with mobilenetv2_imagenet.pth
and deeplabv3_mobilenetv2_voc.pth; $CAMKD_POOL keeps the crops, 3 GB. Each step sees 8 labelled crops. Except where a
loss is named alone, it also sees 8 of the others: for the loss ("unlabelled too"), or with the teacher's answers ("pseudo-labels") or the
labels ("labels for all") as labels too. With "true labels choose" the labels only choose the classes that class attention asks about. unlabelled_cpu.jsonl holds a line a training; `rows` takes the best weights in it.
CAMKD_SWAP=1 changes the parts of train and val: 321 photographs teach and 311 score, with the weights of the first list; its pool wants a
folder of its own, its rows go to unlabelled_cpu_swapped.jsonl.
"""
import argparse, json, math, os, random, tempfile, time, zlib
from collections import OrderedDict
from copy import deepcopy
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path

import numpy as np, torch
from small_student_gpu import BLOCKS, GRID, SIX, SIZE, TREE, WEIGHTS, whole_teacher
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

from camkd_nb.attention import class_attention
from camkd_nb.backbones import build_backbone
from camkd_nb.data import JointAugment
from camkd_nb.distiller import Distiller
from camkd_nb.evaluate import network_input
from camkd_nb.heads import PSPHead
from camkd_nb.losses import ChannelKD, ClassAttention, PixelKD
from camkd_nb.metrics import ConfusionMatrix, SegLoss
from camkd_nb.rivals import DIST, FeatureKD
from camkd_nb.samples import VOCImage, VOCMask
from camkd_nb.tensors import eval_mode, imagenet_stats, resize, resize_mask
from camkd_nb.voc import VOC_CLASSES, VOID, read_image, read_mask, voc_items

folder = lambda name, other='.': Path(os.environ.get(name, other))
MORE = folder('CAMKD_MORE')
POOL, FILE = folder('CAMKD_POOL', Path(tempfile.gettempdir())/'unlabelled_pool'), Path(__file__).with_suffix('.jsonl')
TRAIN, VAL = ('val', 'train') if os.environ.get('CAMKD_SWAP') else ('train', 'val')
LONG, FROZEN, BS, LR = 400, 7, 8, 2e-3
OURS, THEIRS = (32, 33, 33), (320, 17, 17)  # what the pool keeps of a crop: the student's input, the teacher's last features

# --- networks ---
def stem_and_rest():
    net = build_backbone('mobilenet_v2', 16, WEIGHTS/'mobilenetv2_imagenet.pth')
    blocks = list(getattr(net, 'features', net))[:BLOCKS]
    return nn.Sequential(*blocks[:FROZEN]).eval().requires_grad_(False), nn.Sequential(*blocks[FROZEN:])

class Student(nn.Module):
    "Blocks 7 to 13 and a head, on rows of the pool, or behind the frozen blocks on images."
    def __init__(self):
        super().__init__()
        self.stem, rest = stem_and_rest()
        self.backbone, self.head = rest.to(memory_format=torch.channels_last), PSPHead(96, 21, width=64)
    def small_logits(self, kept): return self.head(self.backbone(kept.float().contiguous(memory_format=torch.channels_last)))
    def forward(self, x):
        if x.ndim == 4: return resize(self.small_logits(self.stem(x)), x.shape[-2:], align_corners=True)
        return resize(self.small_logits(x[:, :math.prod(OURS)].view(-1, *OURS)).float(), (GRID, GRID), align_corners=True)

class TeacherHead(nn.Module):
    "The teacher from its last features on, or whole on images; `last` is the layer that is compared."
    def __init__(self):
        super().__init__()
        whole = whole_teacher()
        self.backbone, self.last, self.head = whole.backbone, nn.Identity(), whole.head
    def forward(self, x):
        if x.ndim == 4: return resize(self.head(self.last(self.backbone(x))), x.shape[-2:], align_corners=True)
        return resize(self.head(self.last(x[:, math.prod(OURS):].view(-1, *THEIRS).float())).float(), (GRID, GRID), align_corners=True)

LAYERS = {f'backbone.{BLOCKS - 1 - FROZEN}': 'last'}  # the last layer before the heads

# --- pool ---
def photographs():
    "(split, image, mask, crops) of all."
    return [('train', *item, 12) for item in voc_items(TREE, TRAIN)] + [('more', *item, 3) for item in voc_items(MORE, 'more')]

@torch.no_grad()
def fill(part):
    "Every n-th photograph's crops, and its part of the whole images that are scored."
    torch.set_num_threads(1)
    stem, teacher = stem_and_rest()[0], whole_teacher()
    mean, std = imagenet_stats(torch.zeros(()))
    aug, made = JointAugment(SIZE, scale=(.6, 1.4), resize=LONG), []
    for k, (split, image, mask, n) in enumerate(photographs()):
        if k % 2 != part: continue
        pair = VOCImage.create(image), VOCMask.create(mask)
        random.seed(zlib.crc32(image.stem.encode()))
        both = [aug(pair, split_idx=0) for _ in range(n)]
        x = (torch.tensor(np.stack([np.asarray(a) for a, _ in both])).permute(0, 3, 1, 2).float() / 255 - mean) / std
        masks = np.stack([np.asarray(b)[::4, ::4] for _, b in both]).astype(np.uint8)
        kept = [t.half().flatten(1) for t in (stem(x), teacher.backbone(x))]
        made.append((k, torch.cat(kept, 1), torch.tensor(masks)))
    whole = {'val': [], 'tune': []}
    for split, items in (('val', voc_items(TREE, VAL)), ('tune', voc_items(TREE, TRAIN)[::4])):
        for image, mask in items[part::2]:
            pixels, labels = read_image(image), Image.fromarray(read_mask(mask))
            size = [round(side * LONG / max(labels.size)) for side in labels.size]
            x = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
            x = network_input(x, None, torch.zeros(()))
            whole[split].append((stem(x).half(), torch.tensor(np.asarray(labels.resize(size, Image.Resampling.NEAREST))), teacher.backbone(x).half()))
    torch.save((made, whole), POOL/f'part_{part}.pth')

def pool(args):
    POOL.mkdir(parents=True, exist_ok=True)
    with torch.multiprocessing.get_context('spawn').Pool(args.processes) as them: them.map(fill, range(2))
    parts = [torch.load(POOL/f'part_{k}.pth') for k in range(2)]
    rows = sorted((row for made, _ in parts for row in made), key=lambda row: row[0])
    np.save(POOL/'x.npy', torch.cat([x for _, x, _ in rows]).numpy())
    owners = [k for k, x, _ in rows for _ in range(len(x))]
    torch.save(dict(mask=torch.cat([m for _, _, m in rows]), owner=torch.tensor(owners), whole={s: [one for _, w in parts for one in w[s]] for s in ('val', 'tune')}), POOL/'rest.pth')
    for k in range(2): (POOL/f'part_{k}.pth').unlink()

def loaded():
    kept = torch.load(POOL/'rest.pth')
    kept['x'] = torch.from_numpy(np.load(POOL/'x.npy', mmap_mode='c'))
    return kept

# --- one training ---
def at(weight): return ClassAttention(weight, LAYERS)
TERMS = {'none': lambda: [], 'channel KD': lambda w: [ChannelKD(w)], 'class attention': lambda w: [at(w)], 'pixel KD': lambda w: [PixelKD(w)],
         'feature KD': lambda w: [FeatureKD(w, LAYERS)], 'DIST': lambda w: [DIST(w)],
         'channel KD + class attention': lambda w, v: [ChannelKD(w), at(v)], 'DIST + class attention': lambda w, v: [DIST(w), at(v)], 'channel KD + DIST': lambda w, v: [ChannelKD(w), DIST(v)]}
USES = ', unlabelled too', ', labels for all', ', pseudo-labels', ', true labels choose'

def split(method):
    "'channel KD, unlabelled too' -> the terms' name, and what the other photographs are for."
    for use in USES:
        if method.endswith(use): return method.removesuffix(use), use
    return method, None

def train(pool, method, weights, seed, steps, tuning, amp=True):
    name, use = split(method)
    owner, n = pool['owner'], len(voc_items(TREE, TRAIN))
    first = torch.tensor([r for r, k in enumerate(owner.tolist()) if k < n and not (tuning and k % 4 == 0)])
    rest = torch.arange(len(owner))[owner >= n]
    set_seed(seed, reproducible=True)
    student, teacher, task = Student().train(), TeacherHead().eval(), SegLoss()
    d = Distiller(student, teacher, TERMS[name](*weights)) if name != 'none' else None
    params = [*student.parameters(), *(d.parameters() if d else [])]
    opt = torch.optim.AdamW(params, lr=LR, betas=(.9, .99), eps=1e-5, weight_decay=1e-2)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps, pct_start=.25, cycle_momentum=False)
    rng, began, shown = np.random.default_rng(seed), time.process_time(), []
    def batch(of):
        rows = of[torch.from_numpy(rng.integers(0, len(of), BS))]
        return pool['x'][rows], pool['mask'][rows].long()
    for _ in range(steps):
        (x, y), other = batch(first), batch(rest)
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            total = d.step(x, y, task).total if d else task(student(x), y)
            if use in (', labels for all', ', pseudo-labels'):
                with torch.no_grad(): labels = other[1] if use == ', labels for all' else teacher(other[0]).argmax(1)
                total = total + (d.step(other[0], labels, task).total if d else task(student(other[0]), labels))
            elif use == ', unlabelled too': total = total + d.step(other[0], None).total
            elif use == ', true labels choose': total = total + d.step(*other, lambda *_: torch.zeros(())).total
        opt.zero_grad(set_to_none=True)
        total.backward()
        opt.step(), sched.step()
        shown.append(float(total.detach()))
    seconds = time.process_time() - began
    miou, classes = score(student, pool['whole']['tune' if tuning else 'val'])
    return dict(method=method, weights=weights, seed=seed, steps=steps, tuning=tuning, miou=round(miou, 5), six=round(float(np.mean([classes[c] for c in SIX])), 5), class_iou=classes,
                loss=round(float(np.mean(shown[-50:])), 4), **({} if tuning else alike(student, teacher, pool['whole']['val'])), cpu=round(seconds, 1), amp='bf16' if amp else None, lr=LR, versions=f'torch {torch.__version__}')

@torch.no_grad()
def score(student, whole):
    confusion = ConfusionMatrix(21)
    with eval_mode(student):
        for kept, mask, _ in whole: confusion.update(resize(student.small_logits(kept).float(), mask.shape[-2:], align_corners=True), mask[None].long())
    iou = confusion.table(VOC_CLASSES).set_index('class').iou
    return confusion.miou(), {name: round(float(v), 4) for name, v in iou.items()}

def alike(student, teacher, whole, n=100):
    "Shares of the pixels with the teacher's answer, of its mistakes that are made too, and the cosine of the signed maps of the classes in each of `n` images."
    nets = [nn.Sequential(OrderedDict(layer=net, head=head.eval())).eval() for net, head in ((deepcopy(student.backbone), deepcopy(student.head)), (nn.Identity(), teacher.head))]
    same, mistakes, cosines = [], [], []
    for k, (kept, mask, theirs) in enumerate(whole):
        xs = kept.float().contiguous(memory_format=torch.channels_last), theirs.float()
        with torch.no_grad(): ours, given = (resize(net(x), mask.shape[-2:], align_corners=True).argmax(1)[0] for net, x in zip(nets, xs))
        known, wrong = mask != VOID, (mask != VOID) & (given != mask)
        same.append((ours == given)[known].float().mean().item()), mistakes.extend((ours == given)[wrong].tolist())
        classes = [c for c in mask.unique().tolist() if c not in (0, VOID)]
        if k >= n or not classes: continue
        maps = [class_attention(net, x, resize_mask(mask[None].long(), x.shape[-2:]), 'layer', classes=classes, signed=True).maps['layer'][0].flatten(1) for net, x in zip(nets, xs)]
        ours, given = (m - m.mean(1, keepdim=True) for m in maps)
        cosines += torch.cosine_similarity(ours, given).tolist()
    return dict(same=round(float(np.mean(same)), 4), mistakes=round(float(np.mean(mistakes)), 4), map_cosine=round(float(np.mean(cosines)), 4))

# --- what is trained ---
U, P = ', unlabelled too', ', pseudo-labels'
TRIED = {'none': [[]], f'channel KD{U}': [[.3], [1.], [3.], [9.], [27.]], f'class attention{U}': [[.02], [.07], [.2], [.6]], f'pixel KD{U}': [[.1], [.3], [1.], [3.]],
         f'feature KD{U}': [[.1], [.3], [1.], [3.]], f'DIST{U}': [[.1], [.3], [1.], [3.]], f'channel KD + class attention{U}': [[3., .02], [1., .02], [1., .07]],
         f'DIST + class attention{U}': [[.3, .02], [.3, .07], [.3, .2], [1., .07]], f'channel KD + DIST{U}': [[1., .3], [1., .1], [.3, .3]]}
GRID_OF = ['none', f'channel KD{U}', f'class attention{U}', f'pixel KD{U}', f'feature KD{U}', f'DIST{U}', f'channel KD + class attention{U}', f'DIST + class attention{U}', f'channel KD + DIST{U}', f'none{P}', f'channel KD{P}', f'class attention{P}',
           f'channel KD + class attention{P}', 'channel KD', 'class attention', 'none, labels for all']

def known(file): return [json.loads(line) for line in open(file)] if file.exists() else []

def add(args, row):
    with open(args.out, 'a') as f: f.write(json.dumps(row) + '\n')
    print({k: row[k] for k in ('method', 'weights', 'seed', 'steps', 'miou', 'six', 'cpu')}, flush=True)

def tune(args):
    data, done = loaded(), {(r['method'], str(r['weights']), r['steps']) for r in known(args.out) if r['tuning']}
    for method, ws in TRIED.items():
        for w in ws:
            if (args.methods is None or method in args.methods.split(';')) and (method, str(w), args.steps) not in done: add(args, train(data, method, w, 0, args.steps, True))

def best(args, name):
    "The best weights of a loss, among those that were tuned here or in the file beside this script."
    if name == 'none': return []
    found = [r for file in {FILE, args.out} for r in known(file) if r['tuning'] and split(r['method'])[0] == name]
    if not found: raise SystemExit(f'{name}: no weight was tuned; run tune first')
    return max(found, key=lambda r: r['miou'])['weights']

def rows(args):
    data, done = loaded(), {(r['method'], r['seed'], r['steps']) for r in known(args.out) if not r['tuning']}
    for seed in map(int, args.seeds.split(',')):
        for method in args.methods.split(';') if args.methods else GRID_OF:
            if (method, seed, args.steps) not in done: add(args, train(data, method, best(args, split(method)[0]), seed, args.steps, False))

def table(args):
    kept = [r for r in known(args.out) if not r['tuning']]
    none = {(r['seed'], r['steps']): r for r in kept if r['method'] == 'none'}
    for method, steps in dict.fromkeys((r['method'], r['steps']) for r in kept):
        of = {r['seed']: r for r in kept if (r['method'], r['steps']) == (method, steps)}
        gains = [[100 * (r[k] - none[s, steps][k]) for s, r in of.items() if (s, steps) in none] for k in ('miou', 'six')]
        print(f"{method:45} {steps} {100 * np.mean([r['miou'] for r in of.values()]):5.1f} {100 * np.mean([r['six'] for r in of.values()]):5.1f} {np.mean([r['cpu'] for r in of.values()]):5.0f} s", *([round(v, 1) for v in g] for g in gains))

def main():
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument('what', choices=('pool', 'tune', 'rows', 'table')), made.add_argument('--out', type=Path, default=FILE.with_stem(FILE.stem + '_swapped') if TRAIN == 'val' else FILE)
    made.add_argument('--seeds', default='0'), made.add_argument('--methods', help='names, with ; between them'), made.add_argument('--steps', type=int, default=1500)
    made.add_argument('--processes', type=int, default=2)
    args = made.parse_args()
    torch.set_num_threads(1)
    globals()[args.what](args)

if __name__ == '__main__': main()
