"""The trainings behind toy.csv and voc.csv: one of them again, or more of them.

    python paired_study.py list                                settings, methods, seeds, and the seconds of a training
    python paired_study.py row 'methods' 'channel KD' 3        trains one row again, prints it beside the kept one
    python paired_study.py go 'methods' --seeds 9              appends what the file does not have
    python paired_study.py check                               whether each kept row is still what its method is; on photographs with $CAMKD_WEIGHTS

The settings "methods" and "25 epochs" are drawings, and take two to eight minutes a training on one CPU thread. The others are
photographs of Pascal VOC 2012 whose names begin with 2007_: $CAMKD_VOC is a tree whose lists train and val hold these
311 and 321, $CAMKD_WEIGHTS a folder with mobilenetv2_imagenet.pth and deeplabv3_mobilenetv2_voc.pth. Their crops go through the frozen
blocks once, in eight minutes ($CAMKD_POOL keeps the result), and a training takes two to fourteen.
"""
import argparse, os, tempfile
os.environ.setdefault('OMP_NUM_THREADS', '1')
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from fastai.torch_core import set_seed

from camkd_nb.all import *
from camkd_nb.backbones import build_backbone, toy_backbone
from camkd_nb.heads import ASPPHead, PSPHead
from camkd_nb.models import SegmentationModel
from camkd_nb.pool import Crops
from camkd_nb.published import deeplabv3_mobilenetv2_voc
from camkd_nb.study import row_of, train
from camkd_nb.tensors import resize, resize_mask

here = Path(__file__).parent
weights, pool = Path(os.environ.get('CAMKD_WEIGHTS', '.')), Path(os.environ.get('CAMKD_POOL', Path(tempfile.gettempdir())/'voc_pool.pth'))
tree, last = Path(os.environ.get('CAMKD_VOC', '.')), {'backbone.6': 'backbone.6'}  # behind eleven frozen blocks, block 17

# --- drawings ---
def signed(share=1., **options): return ClassAttention(Relative(share), **options)
def wide(): return SegmentationModel(toy_backbone(12, 1), PSPHead(96, 7, width=48, dropout=0.))

def drawings():
    "Sixty epochs: short trainings stop where the learning curve is steep."
    set_seed(0)
    untrained = toy_teacher()
    return Study(here/'toy.csv', 'methods', Recipe(toy_voc(), epochs=60), toy_student, toy_teacher(pretrained=True), {
        'none': [], 'pixel KD': PixelKD(), 'attention transfer': AttentionTransfer(), 'channel KD': ChannelKD(), 'IFV': IFV(), 'pair-wise KD': PairwiseKD(),
        'signed class attention': signed(),
        'ReLU, first order': signed(signed=False, second_order=False),
        'as by default': ClassAttention(),
        'pixel KD + signed class attention': [PixelKD(), signed()],
        'channel KD + signed class attention': [ChannelKD(), signed()],
        'shuffled maps': ShuffledAttention(Relative(1.)),
        'untrained teacher': Method(signed(), teacher=untrained),
        'student twice as wide': Method(new_student=wide),
        'signed, first order': signed(second_order=False),
        'signed, share 0.3': signed(.3), 'signed, share 3': signed(3.),
        'signed, two stages': signed(layers=['backbone.layer3', 'backbone.layer4']),
        'signed, HiResCAM': signed(method='hirescam'),
        'signed, one class': signed(max_classes=1), 'signed, region all': signed(region='all'), 'signed, region predicted': signed(region='predicted'),
        'signed, share rising': signed(lambda progress: 2 * progress), 'signed, share falling': signed(lambda progress: 2 * (1 - progress))})

def short_drawings():
    made = drawings()
    return replace(made, setting='25 epochs', recipe=replace(made.recipe, epochs=25), methods={'none': [], 'as by default': ClassAttention()})

# --- photographs ---
def attention(weight, **options): return ClassAttention(weight, last, **options)

class WhereFound(ClassAttention):
    "Class attention of the classes that the teacher finds in an image, with an IoU of a half at least."
    def question(self, step):
        classes, regions = super().question(step)
        labels = resize_mask(step.mask, regions.shape[-2:])
        answered, labelled = (of[:, None] == classes[..., None, None] for of in (step.teacher.logits.argmax(1), labels))
        either = (answered | labelled) & (labels != VOID)[:, None]
        found = (answered & labelled).sum((2, 3)) >= .5 * either.sum((2, 3))
        return classes.where(found, -1), regions & found[..., None, None]

def student(head, known=18):
    "A student whose first eleven blocks are frozen; the first `known` of its blocks start from ImageNet's weights."
    backbone, trained = build_backbone('mobilenet_v2', 16), build_backbone('mobilenet_v2', 16, weights/'mobilenetv2_imagenet.pth')
    for block, of in list(zip(*(list(getattr(b, 'features', b)) for b in (backbone, trained))))[:known]: block.load_state_dict(of.state_dict())
    return HeadStart(SegmentationModel(backbone, head(), align_corners=True), n=11)

def pspnet_head(): return PSPHead(320, 21)
def deeplab_head(): return ASPPHead(320, 21, rates=(6, 12, 18))
def teacher(): return HeadStart(deeplabv3_mobilenetv2_voc(weights/'deeplabv3_mobilenetv2_voc.pth'), n=11, half=1).eval()

def recipe_of_photos():
    return PoolRecipe(tree, epochs=20, size=257, bs=8, lr=1e-3, resize=400, scale=(.75, 1.25), amp='bf16', n_train=100, pool=pool)

def four(): return {'none': [], 'signed class attention': attention(Relative(1.)), 'channel KD': ChannelKD(),
                    'channel KD + signed class attention': [ChannelKD(), attention(Relative(1.))]}

def photographs(setting, methods, head=pspnet_head, known=18, **changes):
    return Study(here/'voc.csv', setting, replace(recipe_of_photos(), **changes), lambda: student(head, known), teacher(), methods, score=evaluate_pool)

def hundred():
    return photographs('pspnet, 100 images', four() | {
        'signed class attention, any class': attention(Relative(1.), region='all', max_classes=4, absent=True),
        'attention transfer': AttentionTransfer(layers=last), 'pixel KD': PixelKD(), 'shuffled maps': ShuffledAttention(Relative(1.), last),
        'pixel KD + signed class attention': [PixelKD(), attention(Relative(1.))],
        'channel KD + as by default': [ChannelKD(), ClassAttention(layers=last)],
        'channel KD + attention transfer': [ChannelKD(), AttentionTransfer(layers=last)],
        'signed, two stages': ClassAttention(Relative(1.), {'backbone.2': 'backbone.2', **last}),
        'signed, share 3': attention(Relative(3.)), 'signed, where found': WhereFound(Relative(1.), last)})

def deeplab():
    return photographs('deeplabv3, 100 images', four() | {
        'attention transfer': AttentionTransfer(layers=last), 'pixel KD': PixelKD(),
        'channel KD + attention transfer': [ChannelKD(), AttentionTransfer(layers=last)]}, deeplab_head)

# --- photographs without labels ---
class Mixed(Crops):
    "All images of the pool, labels for the first `n` only."
    def __init__(self, pool, n):
        super().__init__(pool)
        self.labelled = set(Crops(pool, n).images)
    def __getitem__(self, i):
        x, mask = super().__getitem__(i)
        return x, mask if self.images[i] in self.labelled else torch.full_like(mask, VOID)

@dataclass
class MixedRecipe(PoolRecipe):
    n_labelled: int = 100
    def crops(self): return Mixed(self.contents(), self.n_labelled)

def filled(step):
    "The step with the teacher's answers in place of the labels of images that have none."
    unlabelled = (step.mask == VOID).flatten(1).all(1)[:, None, None]
    answers = resize(step.teacher.logits.detach().float(), step.mask.shape[-2:]).argmax(1)
    return replace(step, mask=torch.where(unlabelled, answers, step.mask))

class Attention(ClassAttention):
    def forward(self, step): return super().forward(filled(step))

class Channels(ChannelKD):
    def forward(self, step): return super().forward(filled(step))

class PseudoLabels(Term):
    "The plainest use: cross-entropy with the teacher's answers on images without labels."
    name = 'pseudo_labels'
    def forward(self, step):
        labelled = ~(step.mask == VOID).flatten(1).all(1)
        return SegLoss()(step.student.logits, filled(step).mask.masked_fill(labelled[:, None, None], VOID))

def unlabelled():
    made = photographs('pspnet, 100 images and 211 without labels', {
        'none': [], 'channel KD': Channels(), 'signed class attention': Attention(Relative(1.), last), 'pseudo-labels': PseudoLabels(1.)})
    return replace(made, recipe=MixedRecipe(**asdict(made.recipe) | dict(n_train=None)))

# --- all of them ---
SETTINGS = {
    'methods': drawings, '25 epochs': short_drawings, 'pspnet, 100 images': hundred,
    'pspnet, 50 images, 40 epochs': lambda: photographs('pspnet, 50 images, 40 epochs', four(), n_train=50, epochs=40),
    'pspnet, 311 images, 7 epochs': lambda: photographs('pspnet, 311 images, 7 epochs', four(), n_train=None, epochs=7),
    'pspnet, 100 images, 60 epochs': lambda: photographs('pspnet, 100 images, 60 epochs', {
        'none': [], 'channel KD': ChannelKD(), 'attention transfer': AttentionTransfer(layers=last)}, epochs=60),
    'deeplabv3, 100 images': deeplab,
    'pspnet, half untrained, 100 images': lambda: photographs('pspnet, half untrained, 100 images', dict(list(four().items())[:3]), known=11),
    'pspnet, 100 images and 211 without labels': unlabelled}

def study_of(setting, out=None):
    "The study of a setting, its pool filled where it needs one."
    made = SETTINGS[setting]()
    if isinstance(made.recipe, PoolRecipe):
        fill_pool(pool, Recipe(tree, size=257, bs=8, resize=400, scale=(.75, 1.25)), student(pspnet_head), teacher(), n=8)
    return replace(made, file=out or made.file)

def row(args):
    made = study_of(args.setting)
    again = row_of(made, args.method, args.seed, *train(made, args.method, args.seed))
    kept = read_runs(made.file, args.setting).query('method == @args.method and seed == @args.seed').miou
    print(f"{args.method}, seed {args.seed}: mIoU {again['miou']:.4f} in {again['seconds']:.0f} s; kept: {', '.join(f'{of:.4f}' for of in kept) or 'none'}")

def show(args):
    for file in ('toy.csv', 'voc.csv'):
        runs = read_runs(here/file).groupby(['setting', 'method'], sort=False)
        print(runs.agg(seeds=('seed', 'nunique'), seconds=('seconds', 'median')).to_string())

def check(args):
    photos = (weights/'mobilenetv2_imagenet.pth').exists()
    for setting in SETTINGS if photos else ('methods', '25 epochs'):
        made = SETTINGS[setting]()
        run_study(made, sorted(set.intersection(*(set(of) for _, of in read_runs(made.file, setting).groupby('method').seed))))
        print(f'{setting}: each row is what its method is')

def main():
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = made.add_subparsers(dest='what', required=True)
    which.add_parser('list').set_defaults(run=show)
    which.add_parser('check').set_defaults(run=check)
    one = which.add_parser('row')
    one.add_argument('setting', choices=SETTINGS), one.add_argument('method'), one.add_argument('seed', type=int)
    one.set_defaults(run=row)
    more = which.add_parser('go')
    more.add_argument('setting', choices=SETTINGS), more.add_argument('--seeds', type=int, default=5)
    more.add_argument('--out', type=Path, help='another file than that of the setting')
    more.set_defaults(run=lambda args: print(run_study(study_of(args.setting, args.out), range(args.seeds))[['method', 'seed', 'miou']].to_string()))
    args = made.parse_args()
    torch.set_num_threads(1)
    args.run(args)

if __name__ == '__main__': main()
