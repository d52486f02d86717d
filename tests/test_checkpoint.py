"""A checkpoint belongs to one fit: another one is refused by the name of the setting that differs, and what trains the same goes on."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Callback, Learner
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import SGD, OptimWrapper
from fastai.torch_core import set_seed
from torch import nn

from camkd_nb.checkpoint import Checkpoint
from camkd_nb.data import voc_dls
from camkd_nb.distill import Distill
from camkd_nb.losses import ClassAttention, PixelKD
from camkd_nb.metrics import MeanIoU, SegLoss
from camkd_nb.terms import Relative, Term
from camkd_nb.toyvoc import toy_voc


class Net(nn.Module):
    def __init__(self, drop=0.):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.Dropout(drop)), nn.Conv2d(4, 7, 1)
    def forward(self, x): return F.interpolate(self.head(self.body(x)), scale_factor=4)


class Hint(Term):
    name = 'hint'
    def __init__(self, weight=1., adapter=None, by=None):
        super().__init__(weight, {'body': 'body'})
        self.adapter, self.by = adapter or nn.Conv2d(4, 4, 1), by
    def forward(self, step): return (self.adapter(step.student.activations['body']) - step.teacher.activations['body'].detach()).pow(2).mean()


class Fails(Callback):
    order = 99
    def __init__(self, epoch=1): self.at = epoch
    def before_train(self):
        if self.epoch == self.at: raise ZeroDivisionError('on purpose')


def halves(model): return [list(model.body.parameters()), list(model.head.parameters())]
def two_stages(weight): return lambda progress: weight if progress < .41 else 0.


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return toy_voc(tmp_path_factory.mktemp('data')/'toy', n_train=8, n_valid=2, size=16)


def learner(folder, tree, net=None, data=(), frozen=False, **kwargs):
    set_seed(0)
    dls = voc_dls(tree, **dict(size=16, bs=4, seed=0, n_workers=0) | dict(data))
    learn = Learner(dls, net or Net(), **dict(loss_func=SegLoss(), path=folder, metrics=MeanIoU(), splitter=halves) | kwargs)
    if frozen: learn.freeze()
    return learn


def fit(learn, *cbs, terms=(), lr=1e-2, epochs=3, **kwargs):
    set_seed(1)
    teacher = Net()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, cbs=[*cbs, *([Distill(teacher, terms)] if terms else []), Checkpoint()], **kwargs)
    return learn


other = {  # a fit, another one, and what the error says
    'epochs': ({}, dict(epochs=4), 'epochs: 3 where this fit has 4'),
    'learning rate': ({}, dict(lr=2e-2), 'schedule, lr'),
    'weight decay': ({}, dict(wd=.3), 'wd: 0.01 where this fit has 0.3'),
    'decay of biases': ({}, dict(wd_bn_bias=True), 'wd_bn_bias: nothing where this fit has True'),
    'optimiser': ({}, dict(opt_func=SGD), 'optimiser: fastai.optimizer.Adam'),
    'partial optimiser': (dict(opt_func=partial(OptimWrapper, opt=torch.optim.Adam)), dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)), 'optimiser, opt'),
    'network': ({}, dict(net=Net(drop=.5)), 'network: Net'),
    'frozen': ({}, dict(frozen=True), 'frozen parameters: 0 where this fit has 2'),
    'groups': ({}, dict(splitter=lambda model: [list(model.parameters())]), 'schedule, lr'),
    'class weights': ({}, dict(loss_func=SegLoss(weight=[1.] * 7)), 'loss function, weight: None where'),
    'other class weights': (dict(loss_func=SegLoss(weight=[1.] * 7)), dict(loss_func=SegLoss(weight=[2.] + [1.] * 6)), 'loss function, weight: float32 (7,)'),
    'aux weight': ({}, dict(loss_func=SegLoss(aux_weight=.2)), 'loss function, aux_weight: 0.4 where this fit has 0.2'),
    'partial loss': (dict(loss_func=partial(F.cross_entropy, ignore_index=255)), dict(loss_func=partial(F.cross_entropy, ignore_index=255, label_smoothing=.1)),
                     'loss function, label_smoothing: nothing where'),
    'lambda loss': (dict(loss_func=lambda z, y: F.cross_entropy(z, y, ignore_index=255)), dict(loss_func=lambda z, y: 2 * F.cross_entropy(z, y, ignore_index=255)), 'loss function: <lambda>'),
    'crop': ({}, dict(data=dict(size=32)), 'data, transforms, JointAugment, size: 16 where this fit has 32'),
    'scale': ({}, dict(data=dict(scale=(1, 1))), 'data, transforms, JointAugment, scale'),
    'jitter': ({}, dict(data=dict(jitter=0.)), 'data, transforms, JointAugment, jitter'),
    'batch size': ({}, dict(data=dict(bs=2)), 'data, batch size: 4 where this fit has 2'),
    'loader seed': ({}, dict(data=dict(seed=1)), 'data, seed: 0 where this fit has 1'),
    'images': ({}, dict(data=dict(n_train=7)), 'data, training: 8 items'),
    'validation': ({}, dict(data=dict(valid='train')), 'data, validation'),
    'clip': (dict(cbs=lambda: [GradientClip(1.)]), dict(cbs=lambda: [GradientClip(2.)]), 'callbacks, GradientClip, max_norm: 1.0 where this fit has 2.0'),
    'no clip': (dict(cbs=lambda: [GradientClip(1.)]), {}, "callbacks, GradientClip: {'max_norm': 1.0, 'norm_type': 2.0} where this fit has nothing"),
    'accumulation': ({}, dict(cbs=lambda: [GradientAccumulation(8)]), 'callbacks, GradientAccumulation: nothing where'),
    'accumulated': (dict(cbs=lambda: [GradientAccumulation(8)]), dict(cbs=lambda: [GradientAccumulation(4)]), 'callbacks, GradientAccumulation, n_acc: 8 where this fit has 4'),
    'half': ({}, dict(cbs=lambda: [MixedPrecision('bf16')]), 'callbacks, MixedPrecision'),
    'patience': (dict(cbs=lambda: [EarlyStoppingCallback(patience=9)]), dict(cbs=lambda: [EarlyStoppingCallback(patience=8)]), 'callbacks, EarlyStoppingCallback, patience: 9'),
    'monitor': (dict(cbs=lambda: [SaveModelCallback()]), dict(cbs=lambda: [SaveModelCallback('mean_iou')]), 'callbacks, SaveModelCallback, comp'),
    'no terms': (dict(terms=lambda: PixelKD()), {}, 'terms, pixel_kd'),
    'another term': (dict(terms=lambda: PixelKD()), dict(terms=lambda: [PixelKD(), Hint()]), 'group'),
    'weight': (dict(terms=lambda: PixelKD(1.)), dict(terms=lambda: PixelKD(2.)), 'terms, pixel_kd, weight: 1.0 where this fit has 2.0'),
    'relative': (dict(terms=lambda: PixelKD(Relative(.3))), dict(terms=lambda: PixelKD(Relative(.4))), 'terms, pixel_kd, relative weight: 0.3'),
    'temperature': (dict(terms=lambda: PixelKD()), dict(terms=lambda: PixelKD(temperature=3.)), 'terms, pixel_kd, temperature'),
    'schedule': (dict(terms=lambda: PixelKD(two_stages(1.))), dict(terms=lambda: PixelKD(two_stages(2.))), 'terms, pixel_kd, weight: [1.0'),
    'schedule between': (dict(terms=lambda: PixelKD(lambda p: float(p < .41))), dict(terms=lambda: PixelKD(lambda p: float(p < .42))), 'terms, pixel_kd, function of the weight'),
    'option': (dict(terms=lambda: Hint(by=lambda a: a)), dict(terms=lambda: Hint(by=lambda a: 2 * a)), 'terms, hint, by: <lambda>'),
    'partial option': (dict(terms=lambda: Hint(by=partial(F.mse_loss, reduction='sum'))), dict(terms=lambda: Hint(by=F.mse_loss)), 'terms, hint, by'),
    'distance': (dict(terms=lambda: ClassAttention(layers=['body'])), dict(terms=lambda: ClassAttention(layers=['body'], distance=lambda a, b: (a - b).abs().mean())),
                 'terms, class_attention, distance: None where this fit has <lambda>'),
    'module': (dict(terms=lambda: Hint(adapter=nn.Conv2d(4, 4, 1))), dict(terms=lambda: Hint(adapter=nn.Conv2d(4, 4, 1, bias=False))), 'group'),
    'kernel': (dict(terms=lambda: Hint(adapter=nn.Conv2d(4, 4, 1))), dict(terms=lambda: Hint(adapter=nn.Conv2d(4, 4, 3, padding=1))), 'terms, hint, adapter, kernel_size'),
}


def run(folder, tree, change, *cbs):
    change = {name: value() if name in ('cbs', 'terms') else value for name, value in change.items()}
    about_fit = {name: change.pop(name) for name in ('terms', 'lr', 'epochs', 'wd') if name in change}
    own = change.pop('cbs', [])
    learn = learner(folder, tree, **change)
    before = state(learn)
    try: fit(learn, *own, *cbs, **about_fit)
    except (ZeroDivisionError, ValueError) as error: return learn, before, str(error)
    return learn, before, 'it went on'


def state(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@pytest.mark.parametrize('name', other)
def test_another_fit_is_refused_by_name(tmp_path, tree, name):
    one, two, said = other[name]
    run(tmp_path, tree, one, Fails())
    kept = (tmp_path/'models/checkpoint.pth').read_bytes()
    learn, before, error = run(tmp_path, tree, two)
    assert 'of a fit with other settings' in error and said in error
    assert torch.equal(state(learn), before) and len(learn.opt.hypers) == len(learn.opt.param_lists) == len(halves(learn.model)) - (name == 'groups')
    assert kept == (tmp_path/'models/checkpoint.pth').read_bytes()


same = {
    'the same': ({}, {}),
    'terms': (dict(terms=lambda: [Hint(two_stages(1.)), PixelKD(lambda p: p)]), dict(terms=lambda: [Hint(two_stages(1.)), PixelKD(lambda p: p)])),
    'workers': ({}, dict(data=dict(n_workers=1))),
    'table': ({}, dict(cbs=lambda: [CSVLogger()])),
    'tracker': ({}, dict(cbs=lambda: [SaveModelCallback(fname='other')])),
    'file of a tracker': (dict(cbs=lambda: [SaveModelCallback(fname='one')]), dict(cbs=lambda: [SaveModelCallback(fname='other', every_epoch=True)])),
    'clip': (dict(cbs=lambda: [GradientClip(1.)]), dict(cbs=lambda: [GradientClip(max_norm=1.)])),
    'class weights': (dict(loss_func=SegLoss([1.] * 7)), dict(loss_func=SegLoss(torch.ones(7)))),
    'own callback': (dict(cbs=lambda: [Fails(7)]), dict(cbs=lambda: [Fails(8)])),
}


@pytest.mark.parametrize('name', same)
def test_what_trains_the_same_goes_on(tmp_path, tree, name):
    one, two = same[name]
    run(tmp_path, tree, one, Fails())
    learn, _, error = run(tmp_path, tree, two)
    assert error == 'it went on' and [len(learn.recorder.values), learn.epoch] == [3, 2] and not (tmp_path/'models/checkpoint.pth').exists()


def test_one_learner_goes_on_in_one_process(tmp_path, tree):
    "Its loss, its transforms and its terms have been used by then"
    learn, cbs = learner(tmp_path, tree), dict(terms=[Hint(two_stages(1.))])
    for epoch in (1, 2):
        with pytest.raises(ZeroDivisionError): fit(learn, Fails(epoch), **cbs)
    fit(learn, **cbs)
    assert len(learn.recorder.values) == 3


def test_another_start_is_said(tmp_path, tree, capsys):
    "A fit without a seed may go on; it is told where what it goes on with began, and a learner that is fitted again knows"
    def started(learn, *cbs):
        with learn.no_bar(): learn.fit_one_cycle(3, 1e-2, cbs=[*cbs, Checkpoint()])
    learn = learner(tmp_path, tree)
    for epoch in (1, 2):
        with pytest.raises(ZeroDivisionError): started(learn, Fails(epoch))
    assert 'going on after epoch 0 of checkpoint.pth\n' in capsys.readouterr().out
    other = Net()
    nn.init.zeros_(other.head.weight)
    started(learner(tmp_path, tree, other))
    assert f'which began with other weights than this fit: if that has another seed or start, remove {tmp_path}' in capsys.readouterr().out


def test_other_images_under_the_same_names_are_other_data(tmp_path, tree):
    moved, redrawn = tmp_path/'moved', toy_voc(tmp_path/'redrawn', n_train=8, n_valid=2, size=16, seed=5)
    for file in sorted(tree.rglob('*')):
        if file.is_file(): (moved/file.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True), (moved/file.relative_to(tree)).write_bytes(file.read_bytes())
    run(tmp_path, tree, {}, Fails())
    assert 'other settings, data, training: 8 items' in run(tmp_path, redrawn, {})[2]
    assert run(tmp_path, moved, {})[2] == 'it went on'


@pytest.mark.parametrize('at', [0, .01, .3, .6, .9, .97, .995, 1])
def test_a_damaged_byte_is_named(tmp_path, tree, at):
    run(tmp_path, tree, {}, Fails())
    file = tmp_path/'models/checkpoint.pth'
    content = bytearray(file.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 4
    file.write_bytes(content)
    learn, before, error = run(tmp_path, tree, {})
    assert f'{file} is damaged' in error and 'remove it, and the fit begins anew' in error and torch.equal(state(learn), before)


def test_a_term_with_other_parameters_is_refused_before_anything_is_loaded(tmp_path, tree):
    "Its options say nothing of them"
    class Many(Hint):
        n = 1
        def __init__(self, weight=1.):
            super().__init__(weight, nn.Conv2d(4, 4, 1))
            self.more = nn.ParameterList([nn.Parameter(torch.zeros(count)) for _ in range(2)])
    for count in (2, 3):
        learn, before, error = run(tmp_path, tree, dict(terms=Many), *([Fails()] if count == 2 else []))
    assert 'does not fit the term hint, more.0: (2,) where this fit has (3,)' in error and torch.equal(state(learn), before)


@pytest.mark.parametrize('append', [False, True])
def test_the_rows_of_a_table_from_before_the_kill_are_kept(tmp_path, tree, append):
    csv, table = tmp_path/'history.csv', dict(cbs=lambda: [CSVLogger(append=append)])
    if append: csv.write_text('of an earlier fit\n')
    run(tmp_path, tree, table, Fails())
    begun = csv.read_text()
    run(tmp_path, tree, table)
    assert csv.read_text().startswith(begun)
    lines = csv.read_text().splitlines()
    assert [line.split(',')[0] for line in lines] == ['of an earlier fit'] * append + ['epoch', '0', '1', '2']


def test_a_refusal_keeps_the_rows_of_the_table(tmp_path, tree):
    table = dict(cbs=lambda: [CSVLogger()])
    run(tmp_path, tree, table, Fails())
    begun = (tmp_path/'history.csv').read_text()
    assert 'other settings' in run(tmp_path, tree, {**table, 'lr': 2e-2})[2]
    assert (tmp_path/'history.csv').read_text() == begun
