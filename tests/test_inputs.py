"""What people bring: losses, outputs, classes, masks and terms of their own; on networks of a thousand weights."""
import copy
import pickle
from functools import partial

import pretended
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from camkd_nb.checkpoint import Checkpoint
from camkd_nb.data import voc_dls
from camkd_nb.distill import CAMDistill, Distill
from camkd_nb.distiller import Distiller
from camkd_nb.losses import AttentionTransfer, ChannelKD, ClassAttention, PixelKD
from camkd_nb.metrics import ConfusionMatrix, SegLoss
from camkd_nb.rivals import DIST, IFV, FeatureKD, PairwiseKD, PseudoLabels
from camkd_nb.terms import Relative, Term
from camkd_nb.toyvoc import toy_voc
from camkd_nb.unlabelled import confident

layers, void = ['body'], 255


class Net(nn.Module):
    def __init__(self, n=3, large=True):
        super().__init__()
        self.body, self.head, self.large = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, n, 1), large

    def forward(self, x):
        z = self.head(self.body(x))
        return F.interpolate(z, x.shape[-2:], mode='bilinear') if self.large else z


class Returns(Net):
    "What a network returns, made of its logits by a function"
    def __init__(self, form, *args, **kwargs): super().__init__(*args, **kwargs); self.form = form
    def forward(self, x): return self.form(super().forward(x))


def network(kind=Net, *args, seed=0, **kwargs): torch.manual_seed(seed); return kind(*args, **kwargs)


x, mask = network(torch.randn, 4, 3, 16, 16), network(torch.randint, 0, 3, (4, 16, 16))
data = list(zip(x, mask))


def every_term(**weight): return [PixelKD(**weight), ChannelKD(**weight), DIST(**weight), *(term(layers=layers, **weight) for term in (ClassAttention, AttentionTransfer, PairwiseKD, IFV))]
def learner(student=None, loss=None, train=None, **kwargs):
    set_seed(0)
    return Learner(DataLoaders(train or DataLoader(data, bs=2), DataLoader(data, bs=4)), student or network(), loss_func=loss or SegLoss(), **kwargs)


def fit(learn, *cbs, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2, cbs=list(cbs))
    return learn


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])
def step(student, teacher, terms, mask=mask, loss=SegLoss(), x=x, **options): return Distiller(student, teacher, terms, **options).step(x, mask, loss)
def values(losses): return {name: value.item() for name, (value, _) in losses.terms.items()}


class Counts:
    "A loss with a state"
    def __init__(self, loss=F.cross_entropy): self.calls, self.loss = 0, loss
    def __call__(self, pred, y): self.calls += 1; return self.loss(pred, y)


def enlarged(pred, y): return F.cross_entropy(F.interpolate(pred, y.shape[-2:]), y)
def hardest(pred, y): return F.cross_entropy(pred, y, reduction='none').flatten().topk(99).values.mean()
def both(pred, y): return F.cross_entropy(pred['out'], y) + .4 * F.cross_entropy(pred['aux'], y)


@pytest.mark.parametrize('form, loss, options', [
    (None, partial(F.cross_entropy, ignore_index=void), {}), (None, CrossEntropyLossFlat(axis=1), {}), (None, hardest, {}), ('low', enlarged, {}),
    (lambda z: {'out': z, 'aux': z}, both, {}), (lambda z: (None, z), lambda pred, y: F.cross_entropy(pred[1], y), {'student_output': lambda pred: pred[1]}),
    (lambda z: {'logits': z, 'loss': z.pow(2).mean()}, lambda pred, y: pred['loss'], {})], ids=['partial', 'flattened', 'hardest', 'low', 'dict', 'tuple', 'its own'])
def test_the_loss_is_the_learners_business(form, loss, options):
    "It is called once a batch, and what trains without the callback trains with it"
    student, trained = (network(large=False) if form == 'low' else network(Returns, form) if form else network()), []
    for cbs in [], [CAMDistill(network(seed=1), layers, show_teacher=True, **options)]:
        loss_func = Counts(loss)
        learn = fit(learner(copy.deepcopy(student), loss_func), *cbs)
        trained.append(weights(learn.model))
        assert loss_func.calls == 3  # two batches of training, one of validation
    assert trained[1].isfinite().all() and not torch.equal(*trained) and learn.recorder.metric_names[-3:-1] == ['teacher_iou', 'student_iou']


def one_channel(pred, y): return F.binary_cross_entropy_with_logits(pred[:, 0], y.float().clamp(max=1))


def test_one_output_channel_is_made_two():
    binary = DataLoader([(a, b.clamp(max=1)) for a, b in data], bs=2)
    assert weights(fit(learner(network(Net, 1), one_channel, binary)).model).isfinite().all()
    with pytest.raises(ValueError, match='two classes give two.*student_output'): fit(learner(network(Net, 1), one_channel, binary), Distill(network(), PixelKD()))
    two = dict(student_output=lambda z: torch.cat([torch.zeros_like(z), z], 1), classes={0: 0, 1: 1, 2: 1})
    fit(learner(network(Net, 1), one_channel, binary), Distill(network(seed=1), [PixelKD(), ClassAttention(layers=layers)], **two))


class Restricted(nn.Module):
    "A network of other classes, from one that has more"
    def __init__(self, net, groups): super().__init__(); self.body, self.net, self.groups = net.body, net, groups
    def forward(self, x): z = self.net(x); return torch.stack([z[:, group].logsumexp(1) for group in self.groups], 1)


def test_a_mapping_is_two_networks_of_the_common_classes():
    "For every term; the student's class 1 is unknown to the teacher"
    student, teacher = network(Net, 4).double().eval(), network(Net, 5, seed=1).double()
    labels = network(torch.randint, 0, 4, (4, 16, 16))
    common = torch.tensor([0, void, 1, 2])[labels]
    ours = step(student, teacher, every_term(), labels, x=x.double(), classes={4: 0, 0: 2, 1: 3, 2: 3})
    theirs = step(Restricted(student, [[0], [2], [3]]).eval(), Restricted(teacher, [[4], [0], [1, 2]]), every_term(), common, x=x.double())
    assert values(ours) == pytest.approx(values(theirs), rel=1e-3)
    names = step(network(Net, 4).double().eval(), network(Net, 5, seed=1).double(), PixelKD(), labels, x=x.double(), classes=[['c', 'D_d', 'x', 'y', 'A'], ['a', 'b', 'C', 'd d']])
    assert names.terms['pixel_kd'][0] == step(student, teacher, PixelKD(), labels, x=x.double(), classes={4: 0, 0: 2, 1: 3}).terms['pixel_kd'][0]


def test_a_mapping_that_changes_nothing_changes_nothing():
    losses = [step(network().eval(), network(seed=1), every_term(), **options) for options in ({}, {'classes': {0: 0, 1: 1, 2: 2}})]
    assert values(losses[0]) == values(losses[1])
    with pytest.raises(ValueError, match='classes='): step(network(), network(Net, 5), PixelKD())
    with pytest.raises(ValueError, match='7 as a class of the teacher, which gives 3'): step(network(), network(), PixelKD(), classes={7: 0, 1: 1})


@pytest.mark.parametrize('term', every_term(), ids=lambda term: term.name)
@pytest.mark.parametrize('label', [-1, -100, 3, 100])
def test_every_term_refuses_labels_that_no_class_has(term, label):
    wrong = mask.clone()
    wrong[0, :2] = label
    with pytest.raises(ValueError, match=f'label {label} with 3 classes.*255 for void'): step(network(), network(), copy.deepcopy(term), wrong, loss=lambda pred, y: pred.mean())


def test_masks_of_any_integer_type_and_of_another_size():
    small, all_terms = mask[:, ::2, ::2], {}
    for kind in torch.uint8, torch.int16, torch.int32, torch.int64:
        losses = step(network().eval(), network(seed=1), every_term(), small.to(kind), loss=lambda pred, y: pred.mean())
        all_terms[kind] = values(losses)
    assert all(of == all_terms[torch.int64] for of in all_terms.values())


def frozen(net): net.body.requires_grad_(False); return net


@pytest.mark.parametrize('term', [AttentionTransfer(layers=layers), PairwiseKD(layers=layers), IFV(layers=layers), ClassAttention(layers=layers, second_order=False)], ids=lambda term: term.name)
def test_a_term_that_cannot_teach_says_so(term):
    with pytest.raises(ValueError, match=f"{term.name} cannot teach.*'body'.*frozen"): step(frozen(network()), network(), term)
    nothing = torch.full_like(mask, void)
    assert step(frozen(network()), network(), copy.deepcopy(term), nothing).terms[term.name][0] == 0


def test_what_still_teaches_a_frozen_backbone():
    "Class attention's second order, and the logits' terms"
    student = frozen(network())
    step(student, network(seed=1), [ClassAttention(layers=layers), PixelKD()]).total.backward()
    assert student.head.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="measured at 'body'"): step(student, network(), ClassAttention(Relative(1.), layers))


class Sometimes(DataLoader):
    "Each second batch has no labels"
    first = 0
    def __iter__(self): yield from (batch if (n + self.first) % 2 else batch[:1] for n, batch in enumerate(super().__iter__()))


class Steps(Callback):
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append((len(self.learn.yb), self.learn.loss_grad.item()))


@pytest.mark.parametrize('first', [0, 1])
@pytest.mark.parametrize('weight', [1., Relative(.5)], ids=['number', 'relative'])
def test_batches_without_labels_are_trained_on_the_terms_alone(first, weight):
    train = Sometimes(data, bs=1)
    train.first = first
    steps = Steps()
    learn = fit(learner(train=train), Distill(network(seed=1), PixelKD(weight)), steps)
    assert [n for n, _ in steps.seen] == [first, 1 - first] * 2 and len(learn.recorder.losses) == 2
    assert max(loss for n, loss in steps.seen if n == 0) < .5 < min(loss for n, loss in steps.seen if n)


class Normed(Term):
    "A term with a batch norm whose width is found"
    name = 'normed'
    def __init__(self): super().__init__(1., layers); self.adapter = nn.Sequential(nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d())
    def forward(self, step): return F.mse_loss(self.adapter(step.student.activations['body']), step.teacher.activations['body'].detach())


def test_a_search_for_a_learning_rate_changes_no_term():
    term = Normed()
    learn = learner(cbs=Distill(network(seed=1), term))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    norm = term.adapter[1]
    assert (norm.running_mean.abs().max(), norm.num_batches_tracked) == (0, 0)
    fit(learn)
    assert norm.num_batches_tracked == 2


def test_a_term_serves_one_pair_at_a_time():
    term = PixelKD()
    first, second = (Distiller(network(), network(seed=1), term) for _ in range(2))
    second.step(x, mask, SegLoss())
    with pytest.raises(ValueError, match='pixel_kd has begun with other networks'): first.step(x, mask, SegLoss())


def test_a_callback_serves_one_learner_once():
    distill = CAMDistill(network(seed=1), layers)
    learn, other = learner(cbs=distill), learner()
    with pytest.raises(ValueError, match='in the learner already'): fit(learn, distill)
    with pytest.raises(ValueError, match='two callbacks distil'): fit(learn, CAMDistill(network(seed=1), layers))
    with pytest.raises(ValueError, match='another learner'): fit(other, distill)
    fit(other), fit(learn)
    for copied in copy.deepcopy(CAMDistill(network(), layers)), pickle.loads(pickle.dumps(CAMDistill(network(), layers, student_output=lambda z: z))):
        with pytest.raises(ValueError, match='copied, pickled or exported'): fit(other, copied)


@pytest.mark.parametrize('returned, error', [(None, TypeError), (1., TypeError), (torch.zeros(4), ValueError)])
def test_terms_and_losses_are_one_number(returned, error):
    class Mine(PixelKD):
        def forward(self, step): return returned
    with pytest.raises(error, match='pixel_kd returned'): step(network(), network(), Mine())
    with pytest.raises(error, match='the task loss'): step(network(), network(), PixelKD(), loss=lambda pred, y: returned)
    if error is ValueError:
        with pytest.raises(ValueError, match="reduction='mean'"): fit(learner(loss=SegLoss(reduction='none')), Distill(network(), PixelKD()))


def test_precisions_may_differ():
    for student, teacher, images in (network().double(), network(seed=1), x.double()), (network(), network(seed=1).double(), x), (network(), network(seed=1).bfloat16(), x):
        losses = step(student, teacher, every_term(), x=images)
        losses.total.backward()
        assert all(torch.tensor(value).isfinite() for value in values(losses).values())


def test_wrapped_networks_and_modes_are_named():
    with pytest.raises(TypeError, match='the teacher is a DataParallel'): step(network(), nn.DataParallel(network()), AttentionTransfer(layers=layers))
    step(network(), nn.DataParallel(network()), PixelKD())
    with pytest.raises(TypeError, match='the student is a DataParallel'): step(nn.DataParallel(network()), network(), PixelKD())
    with torch.inference_mode(), pytest.raises(ValueError, match='inference_mode'): step(network(), network(), ClassAttention(layers=layers))


@pytest.mark.parametrize('classes', [None, {0: 0, 1: 1, 2: 1, 3: 2}], ids=['the same classes', 'a mapping'])
@pytest.mark.parametrize('weight', [1., Relative(.5)], ids=['number', 'relative'])
def test_no_step_after_the_first_waits_for_a_gpu(monkeypatch, classes, weight):
    "On a pretended one, where reading any value raises; it has no backward pass, so gradients are pretended too"
    monkeypatch.setattr(torch.autograd, 'grad', pretended.grad)
    with FakeTensorMode(), torch.device('cuda'):
        images, labels, loss, counts = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64), SegLoss(), ConfusionMatrix(3)
        distiller = Distiller(Net(), Net(5 if classes else 3), every_term(weight=weight), classes=classes)
        distiller.labels._begun = loss._checked = counts._watch._begun = True  # by a first batch
        for _ in range(2): losses = distiller.step(images, labels, loss)
        counts.update(losses.output, labels)
    assert len(losses.terms) == 7 and {value.device.type for value, _ in losses.terms.values()} == {'cuda'}


@pytest.mark.parametrize('labels', [None, confident(.4, 'photographs')], ids=['no labels', 'where the teacher is sure'])
def test_images_without_labels_and_every_nth_batch_wait_for_no_gpu_either(monkeypatch, labels):
    monkeypatch.setattr(torch.autograd, 'grad', pretended.grad)
    features = FeatureKD(layers=layers)  # with a lazy parameter, which cannot be pretended, and no parameter can be moved
    monkeypatch.setattr(FeatureKD, 'to', lambda self, device: self)
    with FakeTensorMode(), torch.device('cuda'):
        images, mask = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64)
        terms = [ClassAttention(layers=layers, every=2), ClassAttention(layers=layers, second_order=False, region='predicted'),
                 features, DIST(), IFV(layers=layers), PairwiseKD(layers=layers), AttentionTransfer(layers=layers)]
        features.projectors[0] = nn.Conv2d(8, 8, 1)
        distiller = Distiller(Returns(lambda z: [z]), Net(), terms, student_output=lambda output: output[0])
        distiller.labels._begun = True  # by a first batch
        for batch, found in zip(range(4), (7, 6, 7, 6)):
            with distiller: output = distiller.given(images)
            values = distiller(images, mask if batch < 2 else labels, output)
            assert len(values) == found and {value.device.type for value, _ in values.values()} == {'cuda'}


class Totals(Callback):
    order = 6
    def before_fit(self): self.seen = []
    def after_loss(self): self.training and self.seen.append((self.learn.loss_grad.item(), self.distill.smooth['unlabelled'].count))


@pytest.mark.parametrize('confidence', [None, .4])
def test_images_without_labels_add_the_terms_alone(confidence):
    "On the first batch: task plus terms plus the terms of the other images, by hand"
    others, teacher, totals = network(torch.randn, 4, 3, 16, 16, seed=5), network(seed=1), Totals()
    terms = lambda: [PixelKD(), ChannelKD()]
    fit(learner(train=DataLoader(data, bs=4)), Distill(teacher, terms(), unlabelled=DataLoader(list(others), bs=4), confidence=confidence), totals)
    student = network()
    answers = teacher.eval()(others).detach().softmax(1).max(1)
    labels = None if confidence is None else answers.indices.masked_fill(answers.values < confidence, void)
    first = step(student, teacher, terms()).total
    distiller = Distiller(student, teacher, terms())
    with distiller: output = student(others)
    second = sum(weight * value for value, weight in distiller(others, labels, output).values())
    assert totals.seen == [(pytest.approx((first + second).item(), rel=1e-3), 1)] and second > 0
    if labels is not None: assert 0 < (labels == void).float().mean() < 1


def test_pseudo_labels_are_for_images_without_labels():
    "The total is the task's loss plus that of the teacher's answers to the others; the column tells the second"
    others, teacher, totals = network(torch.randn, 4, 3, 16, 16, seed=5), network(seed=1), Totals()
    distill = Distill(teacher, PseudoLabels(2.), unlabelled=DataLoader(list(others), bs=4))
    learn = fit(learner(train=DataLoader(data, bs=4)), distill, totals)
    student, task = network(), SegLoss()
    images, masks = map(torch.stack, zip(*data[:4]))
    second = task(student(others), teacher.eval()(others).argmax(1)).item()
    assert totals.seen == [(pytest.approx(task(student(images), masks).item() + 2 * second, rel=1e-3), 1)]
    shown = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert (shown['pseudo_labels'], shown['unlabelled']) == (pytest.approx(second, rel=1e-3), pytest.approx(2 * second, rel=1e-3))
    assert distill.weights == {'pseudo_labels': 2.}
    with pytest.raises(ValueError, match="pseudo_labels is for images without labels: give unlabelled='folder'"):
        fit(learner(), Distill(teacher, [PixelKD(), PseudoLabels()]))


@pytest.mark.parametrize('labels, kept', [(None, [0, 1]), (confident(.5, 'photographs'), [0])])
def test_what_the_student_has_no_class_for_is_void_without_labels_too(labels, kept):
    "Three images of one answer each: the student's class 0, its class 1 without certainty, and a class that it lacks"
    answers = torch.tensor([[.8, .1, .1], [.25, .4, .35], [.3, .1, .6]]).log()[..., None, None]
    teacher = network(Returns, lambda z: answers.expand(3, 3, *z.shape[-2:]))
    distiller = Distiller(network(Net, 2), teacher, [PixelKD(), PseudoLabels()], classes={0: 0, 1: 1})
    x = torch.randn(3, 3, 16, 16)
    with distiller: output = distiller.student(x)
    values = distiller(x, labels, output)
    expected = F.cross_entropy(output[kept], torch.tensor(kept)[:, None, None].expand(-1, 16, 16))
    assert values['pseudo_labels'][0].item() == pytest.approx(expected.item(), rel=1e-3)
    assert distiller.compared.mask.amax((1, 2)).tolist() == [n if n in kept else void for n in (0, 1, 2)]


class Batches(Callback):
    order, seen = -90, 0
    def before_batch(self): self.seen += 1


def test_pseudo_labels_without_such_images_are_refused_before_the_first_batch(tmp_path):
    "Where the data itself says that it has labels"
    batches, learn = Batches(), Learner(voc_dls(toy_voc(tmp_path, n_train=4, n_valid=2, size=32), size=32, bs=4), network(Net, 7), loss_func=SegLoss())
    with pytest.raises(ValueError, match="(?s)before_fit.*pseudo_labels is for images without labels: give unlabelled='folder'"):
        fit(learn, Distill(network(Net, 7, seed=1), [PixelKD(), PseudoLabels()]), batches)
    assert batches.seen == 0


class TwoInputs(Net):
    def forward(self, x, more): return super().forward(x + 0 * more)


def test_a_student_of_two_inputs_cannot_take_images_alone():
    dls = DataLoaders(DataLoader([(image, image, mask) for image, mask in data], bs=4))
    dls.n_inp = 2
    learn = Learner(dls, network(TwoInputs), loss_func=SegLoss())
    others = DataLoader(list(torch.randn(4, 3, 16, 16)), bs=4)
    with pytest.raises(TypeError, match='batches with labels have 2 inputs .*more.*: let the others have a default'):
        fit(learn, Distill(network(seed=1), PixelKD(), unlabelled=others))


class Crops(Callback):
    "The sum of each training batch"
    def before_fit(self): self.seen = []
    def before_batch(self): self.training and self.seen.append(self.x.sum().item())


def test_the_learners_own_loader_can_be_read_a_second_time(tmp_path):
    "The batches with labels are those that they are without"
    def batches(own):
        learn = Learner(voc_dls(tree, size=32, bs=4, seed=0), network(Net, 7), loss_func=SegLoss())
        return fit(learn, Distill(network(Net, 7, seed=1), PixelKD(), unlabelled=learn.dls.train if own else None), crops := Crops(), epochs=2) and crops.seen
    tree = toy_voc(tmp_path, n_train=8, n_valid=2, size=32)
    assert batches(True) == batches(False)


class Dies(Callback):
    def before_batch(self):
        if self.training and self.epoch == 1: raise KeyboardInterrupt


def test_a_fit_with_images_without_labels_goes_on_as_if_nothing_had_happened(tmp_path):
    tree = toy_voc(tmp_path, n_train=12, n_valid=2, size=32)
    def train(name, *cbs, unlabelled=tree, confidence=None):
        set_seed(0)
        dls = voc_dls(tree, size=32, bs=4, seed=0, n_train=4)
        learn = Learner(dls, network(Net, 7), loss_func=SegLoss(), path=tmp_path)
        distill = Distill(network(Net, 7, seed=1), PixelKD(), unlabelled=unlabelled, confidence=confidence)
        return fit(learn, distill, Checkpoint(name), *cbs, epochs=3)
    whole = train('whole.pth')
    with pytest.raises(KeyboardInterrupt): train('again.pth', Dies())
    with pytest.raises(ValueError, match='other settings, confidence: None where this fit has 0.1'): train('again.pth', confidence=.1)
    with pytest.raises(ValueError, match='other settings, unlabelled: 14 files, .* where this fit has 1 files'):
        train('again.pth', unlabelled=sorted((tree/'JPEGImages').iterdir())[:1])
    again = train('again.pth')
    assert torch.equal(weights(again.model), weights(whole.model)) and again.recorder.values == whole.recorder.values
