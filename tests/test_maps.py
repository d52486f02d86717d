"""Maps in half precision, of gradients that are differentiated again, through checkpoints, and without waiting for a device."""
import copy, os
from pathlib import Path

import pretended
import pytest
import torch
import torch.nn.functional as F
from real_data import real_data_environment
from torch import nn
from torch.utils.checkpoint import checkpoint

from camkd_nb.attention import class_attention
from camkd_nb.evaluate import network_input
from camkd_nb.gradients import mean_gradients, scaled_gradients, score_gradients
from camkd_nb.layers import Taps
from camkd_nb.losses import ClassAttention
from camkd_nb.methods import METHODS, needs_gradients
from camkd_nb.metrics import SegLoss
from camkd_nb.models import toy_student
from camkd_nb.published import deeplabv3_mobilenetv2_voc
from camkd_nb.readings import map_forward
from camkd_nb.tensors import logits_of
from camkd_nb.terms import Side, Step
from camkd_nb.voc import read_image, read_mask

n_classes, layer = 7, 'backbone.layer4'


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def batch(side=64, n=2):
    coarse = torch.randint(0, n_classes, (n, 1, 4, 4)).float()
    return torch.randn(n, 3, side, side), F.interpolate(coarse, (side, side))[:, 0].long()


def step_of(student, teacher, x, mask, path=layer):
    with Taps(student, [path]) as taps: z = student(x)
    with torch.no_grad(): return Step(x, mask, Side(student, logits_of(z), taps.activations), Side(teacher, *map_forward(teacher, x, [layer])))


def same(a, b, eps=1e-10): return (a - b).abs().max() <= eps * b.abs().max() and b.abs().max() > 0


# Half precision

class Sums(nn.Module):
    "A network whose gradients overflow float16 on a large image: global pooling in front of the last layers"
    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = nn.Conv2d(3, 8, 3, 4, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()), nn.Conv2d(8, n_classes, 1)
        nn.init.constant_(self.last.weight, 2.), nn.init.normal_(self.last.weight, 1.)
    def forward(self, x):
        h = self.mix(self.stem(x))
        return F.interpolate(self.last(h + h.mean((2, 3), keepdim=True)), x.shape[-2:], mode='bilinear')


@pytest.mark.parametrize('method', [m for m in METHODS if needs_gradients(METHODS[m])])
@pytest.mark.parametrize('how', ['autocast', 'half'])
@pytest.mark.parametrize('second_order', [False, True])
def test_maps_of_large_images_are_finite_in_float16(method, how, second_order):
    model, x, mask = Sums(), torch.randn(1, 3, 513, 513), torch.zeros(1, 513, 513, dtype=torch.long)
    mask[:, 3:6, 3:6] = 4
    ask = dict(layers='stem', method=method, second_order=second_order, signed=True, classes=[0, 4])
    truth = class_attention(model, x, mask, **ask).maps['stem']
    if how == 'half': model, x = model.half(), x.half()
    with torch.autocast('cpu', torch.float16, enabled=how == 'autocast'): maps = class_attention(model, x, mask, **ask).maps['stem']
    assert maps.dtype == torch.float32 and maps.isfinite().all()
    assert F.cosine_similarity(maps.flatten(2), truth.flatten(2), dim=2).min() > .99
    F.normalize(maps.flatten(2), dim=2)[..., ::3].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_photographs_in_float16():
    real_data_environment()
    voc = Path(os.environ.get('CAMKD_VOC') or 'absent')
    weights = voc.parents[1]/'weights/deeplabv3_mobilenetv2_voc.pth' if voc.is_dir() else voc
    if not weights.exists(): pytest.skip(f'no weights of the teacher at {weights}: CAMKD_VOC names no tree that has them beside it')
    model = deeplabv3_mobilenetv2_voc(weights).eval().requires_grad_(False)
    x = network_input(read_image(voc/'JPEGImages/2007_000033.jpg'), 513, torch.zeros(1))  # not finite without a scale
    mask = torch.as_tensor(read_mask(voc/'SegmentationClass/2007_000033.png'))[None]
    path = 'backbone.features.17'
    with torch.autocast('cpu', torch.float16): half = class_attention(model, x, mask, path, signed=True, classes=[1])
    whole = class_attention(model, x, mask, path, signed=True, classes=[1])
    assert F.cosine_similarity(half.maps[path].flatten(2), whole.maps[path].flatten(2), dim=2).min() > .97


def test_a_gradient_scaler_skips_no_step_for_the_term():
    teacher, (x, mask) = toy_student().eval().requires_grad_(False), batch()
    def scales(term):
        torch.manual_seed(0)
        student = toy_student()
        optimizer, scaler, kept = torch.optim.SGD(student.parameters(), 1e-3), torch.amp.GradScaler('cpu'), []
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast('cpu', torch.float16):
                step = step_of(student, teacher, x, mask)
                loss = SegLoss()(step.student.logits, mask) + (.2 * term(step) if term else 0)
            scaler.scale(loss).backward(), scaler.step(optimizer), scaler.update()
            kept.append(scaler.get_scale())
        return kept
    assert scales(ClassAttention(layers=layer)) == scales(None)


# Second derivatives

class Gated(nn.Module):
    "Operators of MobileNetV3 and of transformers that have no second derivative in PyTorch"
    def __init__(self, inplace):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.layer4 = nn.Conv2d(3, 8, 8, 8)
        self.gate, self.attend, self.last = nn.Sequential(nn.Hardswish(inplace), nn.Conv2d(8, 8, 1), nn.Hardsigmoid(inplace)), nn.MultiheadAttention(8, 2, batch_first=True), nn.Conv2d(8, n_classes, 1)
    def forward(self, x):
        h = self.backbone(x)
        tokens = (h * self.gate(h.clone())).flatten(2).transpose(1, 2)
        return self.last(self.attend(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, h.shape[-2:]))


@pytest.mark.parametrize('inplace', [False, True])
def test_hard_gates_and_fused_attention_are_trained_through_their_gradients(inplace):
    model, (x, mask) = Gated(inplace).double(), batch(32)
    ask = dict(layers=layer, signed=True, classes=[0, 3], region='all')
    with pytest.raises(RuntimeError, match='not implemented'):  # what happens without the replacements
        z, recorded = map_forward(model, x.double(), [layer])
        torch.autograd.grad(torch.autograd.grad(z.pow(2).sum(), recorded[layer], create_graph=True)[0].sum(), list(model.parameters()), allow_unused=True)
    def loss(weight):
        with torch.no_grad(): model.gate[1].weight.copy_(weight)
        return class_attention(model, x.double(), mask, second_order=True, **ask).maps[layer].pow(2).sum()
    weight = model.gate[1].weight.detach().clone()
    loss(weight).backward()
    nudge = torch.randn_like(weight) * 1e-6
    slope = (loss(weight + nudge) - loss(weight - nudge)).item() / 2
    assert slope == pytest.approx((model.gate[1].weight.grad * nudge).sum().item(), rel=1e-5)


def test_a_network_without_second_derivatives_is_named_before_backward():
    from torchvision.ops import DeformConv2d
    class Head(nn.Module):
        def __init__(self, width): super().__init__(); self.offset, self.deform = nn.Conv2d(width, 18, 1), DeformConv2d(width, n_classes, 3, padding=1)
        def forward(self, x): return self.deform(x, self.offset(x))
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = toy_student().backbone
            with torch.no_grad(): self.head = Head(self.backbone(torch.zeros(2, 3, 64, 64)).shape[1])
        def forward(self, x): return F.interpolate(self.head(self.backbone(x)), x.shape[-2:], mode='bilinear')
    model, (x, mask) = Net(), batch()
    teacher = toy_student().eval().requires_grad_(False)
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=r"layer 'head.deform' \(DeformConv2d\); give second_order=False"):
            ClassAttention(layers=layer)(step_of(model, teacher, x, mask))
    ClassAttention(layers=layer, second_order=False)(step_of(model, teacher, x, mask)).backward()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# Heads that read the graph of a layer in more than one way

class NoWayBack(torch.autograd.Function):
    "A sum whose second part gets no gradient"
    @staticmethod
    def forward(ctx, x, y): return x + y
    @staticmethod
    def backward(ctx, g): return g, None


def hooked(x):
    x.register_hook(lambda g: 2 * g)
    return x


HEADS = {  # of the layer, a map from in front of it, and weights (4, 4, 1, 1)
    'a mean used twice': lambda a, early, w: F.conv2d(m := a.mean((2, 3), keepdim=True), w) * m.sigmoid() + F.conv2d(a, w),
    'weights made of the layer': lambda a, early, w: F.conv2d(a, w * a.mean((2, 3), keepdim=True)[:1].tanh()),
    'a bias made of the layer': lambda a, early, w: F.conv2d(a, w, a.mean((0, 2, 3)).tanh()),
    'an earlier map beside it': lambda a, early, w: F.conv2d(torch.cat([early, a], 1), torch.cat([w, w.tanh()], 1)),
    'an earlier map enlarged': lambda a, early, w: F.conv2d(torch.cat([F.interpolate(early[..., :2, :2], (5, 6), mode='bilinear'), a], 1), torch.cat([w, w], 1)),
    'a function with no way back': lambda a, early, w: NoWayBack.apply(F.conv2d(a, w), F.conv2d(a, 2 * w)),
    'a hook': lambda a, early, w: F.conv2d(hooked(a), w)}


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('second_order', [False, True])
def test_means_are_those_of_the_gradient(head, second_order):
    x, w = torch.randn(2, 4, 5, 6).double(), torch.randn(4, 4, 1, 1).double().requires_grad_()
    ask = dict(classes=torch.tensor([[1, 2], [3, -1]]), regions=torch.rand(2, 2, 5, 6) > .5)
    def derivatives(means):
        early = F.conv2d(x, w)
        a = early.tanh()
        m = means(HEADS[head](a, early, w).tanh().expand(-1, -1, 5, 6), {'a': a}, **ask, second_order=second_order, keep_graph=True)
        return [m, *(torch.autograd.grad((m * m.detach().cos()).sum(), [w, a]) if second_order else [])]
    def plain(*args, **kwargs): return torch.stack([g['a'].mean((2, 3)) for g in score_gradients(scaled_gradients(*args, **kwargs))], 1)
    for ours, truth in zip(derivatives(lambda *args, **kwargs: mean_gradients(*args, **kwargs)['a']), derivatives(plain), strict=True): assert same(ours, truth)


# Checkpoints

class Saving(nn.Module):
    "A student whose head is computed again in the backward pass, with dropout and a batch norm in it"
    def __init__(self, reentrant):
        super().__init__()
        net = toy_student()
        self.backbone, self.head, self.reentrant = net.backbone, nn.Sequential(net.head, nn.BatchNorm2d(n_classes), nn.SiLU(), nn.Dropout2d(), nn.Conv2d(n_classes, n_classes, 1)), reentrant
    def forward(self, x):
        h = self.backbone(x)
        z = self.head(h) if self.reentrant is None else checkpoint(self.head, h, use_reentrant=self.reentrant)
        return F.interpolate(z, x.shape[-2:], mode='bilinear')


@pytest.mark.parametrize('second_order', [False, True])
@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointed_parts_behind_the_tap(reentrant, second_order):
    plain, teacher, (x, mask) = Saving(None).double().train(), toy_student().double().eval().requires_grad_(False), batch()
    x = x.double()
    saving = copy.deepcopy(plain)
    saving.reentrant = reentrant
    nothing = copy.deepcopy(plain.state_dict())
    def learn(model):
        model.load_state_dict(nothing)
        term = ClassAttention(layers=layer, second_order=second_order)
        with Taps(model, [layer]) as taps: model.backbone(x)  # what is trained besides is not the question here
        with torch.no_grad(): teaching = Side(teacher, *map_forward(teacher, x, [layer]))
        term(Step(x, mask, Side(model, teaching.logits, taps.activations), teaching)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), model.state_dict()
    (ours, after), (truth, expected) = learn(saving), learn(plain)
    assert same(ours, truth) and all(torch.equal(after[k], expected[k]) for k in after)


# Endings of a network, besides those in test_attention.py

@pytest.mark.parametrize('end', [
    lambda z, x: F.interpolate(z, x.shape[-2:], mode='nearest'),
    lambda z, x: F.interpolate(z, x.shape[-2:], mode='bicubic', align_corners=True),
    lambda z, x: F.interpolate(z, z.shape[-2:], mode='bilinear'),
    lambda z, x: F.interpolate(z, (70, 70), mode='bilinear')[:, :, 3:67, 3:67],
    lambda z, x: F.interpolate(F.interpolate(z, (20, 20), mode='bilinear'), x.shape[-2:], mode='bilinear'),
    lambda z, x: F.interpolate(z, x.shape[-2:], mode='bilinear').permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    lambda z, x: F.interpolate(z.contiguous(memory_format=torch.channels_last), x.shape[-2:], mode='bilinear')])
def test_endings_agree_with_the_definition(end):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.net = toy_student(); self.backbone, self.head = self.net.backbone, self.net.head
        def forward(self, x): return end(self.head(self.backbone(x)), x)
    model, (x, _) = Net().double().eval(), batch(64, 1)
    mask = torch.randint(0, n_classes, (1, *model(x.double()).shape[-2:]))
    ours = class_attention(model, x.double(), mask, layer, classes=[1, 2]).maps[layer][0]
    with Taps(model, [layer], start_graph=True) as taps: z = model(x.double())
    for c, one in zip([1, 2], ours):
        g, = torch.autograd.grad(z[0, c][mask[0] == c].sum(), taps.activations[layer], retain_graph=True)
        assert same(one, (g.mean((2, 3), keepdim=True) * taps.activations[layer]).sum(1).relu()[0].detach()) or not one.any()


# Small objects

@pytest.mark.parametrize('stride', [1, 4, 8, 16])
def test_small_objects_have_the_map_of_the_cells_they_touch(stride):
    model = nn.Sequential(nn.Conv2d(3, 8, stride, stride), nn.SiLU(), nn.Conv2d(8, n_classes, 1)).double()
    x, mask = torch.randn(1, 3, 64, 64, dtype=torch.float64), torch.zeros(1, 64, 64, dtype=torch.long)
    mask[:, 32:35, 32:35], mask[:, 50, 1] = 3, 5
    ours = class_attention(model, x, mask, '1')
    assert sorted(ours.classes[0].tolist()) == [0, 3, 5]
    cells = F.max_pool2d((mask == 5).double(), stride)[0] > 0
    with Taps(model, ['1'], start_graph=True) as taps: z = model(x)
    g, = torch.autograd.grad(z[0, 5][cells].sum(), taps.activations['1'])
    truth = (g.mean((2, 3), keepdim=True) * taps.activations['1']).sum(1).relu()[0].detach()
    assert same(ours.maps['1'][0, ours.classes[0].tolist().index(5)], truth) or not truth.any()


def test_masks_of_other_sizes_and_types():
    model, (x, mask) = toy_student().eval(), batch()
    truth = class_attention(model, x, mask, layer)
    for other in (mask.to(torch.uint8), mask.int(), mask.short()): assert torch.equal(class_attention(model, x, other, layer).maps[layer], truth.maps[layer])
    small = class_attention(model, x, mask[:, ::4, ::4], layer)  # logits larger than the mask
    assert torch.equal(small.maps[layer], class_attention(model, x, mask[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2), layer).maps[layer])
    for wrong, word in ((mask.float(), 'float32'), (mask == 1, 'bool')):
        with pytest.raises(TypeError, match=word): class_attention(model, x, wrong, layer)
    mask[1, 0, 0] = -1
    with pytest.raises(ValueError, match='image 1 holds -1'): class_attention(model, x, mask, layer)


# A device that one waits for

@pytest.mark.filterwarnings('ignore:Accessing the data pointer')
@pytest.mark.parametrize('options', [{}, dict(max_classes=1, second_order=False), dict(region='predicted'), dict(method='hirescam'), dict(method='mask')])
def test_the_term_never_waits_for_a_device(options, monkeypatch):
    "On a pretended GPU everything that would wait raises; PyTorch's backward pass needs a real one, and is left out"
    from torch._subclasses.fake_tensor import FakeTensorMode
    monkeypatch.setattr(torch.autograd, 'grad', pretended.grad)
    with FakeTensorMode(), torch.device('cuda'):
        student, teacher, (x, mask) = toy_student(), toy_student().eval().requires_grad_(False), batch()
        value = ClassAttention(layers=layer, **options)(step_of(student, teacher, x, mask))
    assert value.device.type == 'cuda'
