"""Class attention maps against the definition, against three other libraries, and on networks that others made."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from camkd_nb.attention import class_attention
from camkd_nb.layers import Taps
from camkd_nb.heads import ASPPHead
from camkd_nb.methods import METHODS
from camkd_nb.models import SegmentationModel, deeplabv3, pspnet
from camkd_nb.readings import map_forward
from camkd_nb.tensors import logits_of

n_classes, classes = 6, [0, 2, 5]


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def random_norms(model):
    "In float64, as rounding depends on the processor, and with statistics as after some training, so that eval mode is not the identity"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=.2), nn.init.uniform_(m.running_var, .5, 1.5), nn.init.uniform_(m.weight, .5, 1.5)
    return model.double().eval()


def batch(n=2, side=65):
    coarse = torch.randint(0, n_classes, (n, 1, 4, 4)).float()
    return torch.randn(n, 3, side, side, dtype=torch.float64), F.interpolate(coarse, (side, side))[:, 0].long()


def by_definition(model, x, mask, layer, c):
    "The map of one class of one image from the whole graph, in plain PyTorch"
    kept = {}
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.update(A=o.clone()) or kept['A'].clone())
    logits = logits_of(model(x))
    handle.remove()
    gradient, = torch.autograd.grad(logits[0, c][mask[0] == c].sum(), kept['A'])
    return (gradient.mean((2, 3), keepdim=True) * kept['A']).sum(1).relu()[0].detach()


def difference(ours, theirs): return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def make_pspnet(): return random_norms(pspnet('resnet18', n_classes, output_stride=16))
def make_deeplabv3(): return random_norms(deeplabv3('mobilenet_v2', n_classes, output_stride=16))


networks = pytest.mark.parametrize('make, layers', [
    (make_pspnet, ['backbone.layer2', 'backbone.layer3', 'backbone.layer4', 'head.project']),
    (make_deeplabv3, ['backbone.features.6', 'backbone.features.13', 'backbone.features.17', 'head.concat_projection'])])
# a batch norm with an in-place ReLU behind it
inplace = (make_pspnet, 'backbone.layer4.0.bn1')


class ClassScores(nn.Module):
    "What the other libraries ask for: one score for each class of each image"
    def __init__(self, model, mask): super().__init__(); self.model, self.mask = model, mask
    def forward(self, x):
        logits = logits_of(self.model(x))
        return torch.stack([(logits[:, c] * (self.mask == c)).sum((1, 2)) for c in range(logits.shape[1])], 1)


def by_captum(model, x, mask, layer):
    LayerGradCam = pytest.importorskip('captum.attr').LayerGradCam
    cam = LayerGradCam(ClassScores(model, mask), model.get_submodule(layer))
    return torch.cat([cam.attribute(x, target=c, relu_attributions=True).detach() for c in classes], 1)


def by_torchcam(model, x, mask, layer):
    GradCAM = pytest.importorskip('torchcam.methods').GradCAM
    wrapped = ClassScores(model, mask)
    with GradCAM(wrapped, wrapped.model.get_submodule(layer)) as cam:
        return torch.stack([cam([c] * len(x), wrapped(x), normalized=False)[0].detach() for c in classes], 1)


def by_grad_cam(model, x, mask, layer, monkeypatch):
    base_cam = pytest.importorskip('pytorch_grad_cam.base_cam')
    from pytorch_grad_cam import GradCAM
    monkeypatch.setattr(base_cam, 'scale_cam_image', lambda cam, size=None: cam)  # the map before its normalisation
    with GradCAM(ClassScores(model, mask), [model.get_submodule(layer)]) as cam:
        maps = [torch.tensor(cam(x, [lambda scores, c=c: scores[c]] * len(x))) for c in classes]
    model.zero_grad(), model.requires_grad_(True)
    return torch.stack(maps, 1)


@networks
def test_agrees_with_the_definition(make, layers):
    model, (x, mask) = make(), batch()
    ours = class_attention(model, x, mask, layers, classes=classes).maps
    for layer in layers:
        theirs = torch.stack([torch.stack([by_definition(model, x[i:i+1], mask[i:i+1], layer, c) for c in classes]) for i in range(len(x))])
        assert theirs.max() > 0 and difference(ours[layer], theirs) < 1e-10


@networks
def test_agrees_with_captum(make, layers):
    model, (x, mask) = make(), batch()
    ours = class_attention(model, x, mask, layers, classes=classes).maps
    for layer in layers: assert difference(ours[layer], by_captum(model, x, mask, layer)) < 1e-10


@networks
def test_agrees_with_torchcam(make, layers):
    model, (x, mask) = make(), batch()
    ours = class_attention(model, x, mask, layers, classes=classes).maps
    for layer in layers: assert difference(ours[layer], by_torchcam(model, x, mask, layer)) < 1e-10


@networks
def test_agrees_with_pytorch_grad_cam(make, layers, monkeypatch):
    model, (x, mask) = make(), batch()
    ours = class_attention(model, x, mask, layers, classes=classes).maps
    for layer in layers: assert difference(ours[layer], by_grad_cam(model, x, mask, layer, monkeypatch)) < 1e-10


def test_right_before_an_inplace_activation_as_captum_is():
    (make, layer), (x, mask) = inplace, batch()
    model = make()
    ours = class_attention(model, x, mask, [layer], classes=classes).maps[layer]
    safe = copy.deepcopy(model)
    for m in safe.modules():
        if isinstance(m, nn.ReLU): m.inplace = False
    truth = class_attention(safe, x, mask, [layer], classes=classes).maps[layer]
    assert difference(ours, truth) < 1e-10
    assert difference(by_captum(model, x, mask, layer), truth) < 1e-10


def test_others_are_wrong_before_an_inplace_activation(monkeypatch):
    (make, layer), (x, mask) = inplace, batch()
    model = make()
    ours = class_attention(model, x, mask, [layer], classes=classes).maps[layer]
    assert difference(by_torchcam(model, x, mask, layer), ours) > .1
    assert difference(by_grad_cam(model, x, mask, layer, monkeypatch), ours) > .1


class TimmBackbone(nn.Module):
    "The last feature map of a timm network"
    def __init__(self, name, **options):
        super().__init__()
        self.net = pytest.importorskip('timm').create_model(name, pretrained=False, features_only=True, **options)
    def forward(self, x): return self.net(x)[-1]


def from_torchvision(name):
    from torchvision.models import segmentation
    options = {} if name.startswith('lraspp') else {'aux_loss': True}
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=n_classes, **options)


def from_smp(name): return getattr(pytest.importorskip('segmentation_models_pytorch'), name)('resnet18', encoder_weights=None, classes=n_classes)


def from_timm(name):
    backbone = TimmBackbone(name, output_stride=16)
    return SegmentationModel(backbone, ASPPHead(backbone.net.feature_info.channels()[-1], n_classes, width=32, rates=()))


@pytest.mark.parametrize('make, name, layers', [
    (from_torchvision, 'deeplabv3_resnet50', ['backbone.layer3', 'classifier.0.convs.1']),
    (from_torchvision, 'lraspp_mobilenet_v3_large', ['backbone.12', 'classifier.cbr']),
    (from_torchvision, 'fcn_resnet50', ['backbone.layer3', 'backbone.layer4']),
    (from_smp, 'DeepLabV3Plus', ['encoder.layer3', 'decoder.aspp']),
    (from_smp, 'PSPNet', ['encoder.layer2', 'decoder.conv']),
    (from_smp, 'Unet', ['encoder.layer4', 'decoder.blocks.2']),
    (from_timm, 'resnet18', ['backbone.net.layer3', 'backbone.net.layer4']),
    (from_timm, 'mobilenetv3_small_050', ['backbone.net.blocks.3', 'backbone.net.blocks.5'])])
def test_works_on_someone_elses_network(make, name, layers):
    model, (x, mask) = random_norms(make(name)).train(), batch(side=64)
    result = class_attention(model, x, mask, layers, classes=list(range(n_classes)))
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    model.eval()
    assert result.logits.shape == (2, n_classes, 64, 64)
    for layer in layers:
        theirs = torch.stack([by_definition(model, x[1:], mask[1:], layer, c) for c in range(n_classes)])
        assert theirs.max() > 0 and difference(result.maps[layer][1], theirs) < 1e-10


@pytest.mark.parametrize('method', METHODS)
def test_image_does_not_see_its_neighbours(method):
    model, (x, mask) = make_pspnet().train(), batch(4)
    a = class_attention(model, x, mask, ['backbone.layer3'], method=method, classes=classes).maps['backbone.layer3']
    x[1:], mask[1:] = torch.randn_like(x[1:]), mask[1:].flip(0)
    b = class_attention(model, x, mask, ['backbone.layer3'], method=method, classes=classes).maps['backbone.layer3']
    assert a[0].max() > 0 and difference(b[0], a[0]) < 1e-10


@pytest.mark.parametrize('fails', [False, True])
def test_network_comes_back_as_it_was(fails):
    model, (x, mask) = make_pspnet().train(), batch()
    model.backbone.layer1.eval().requires_grad_(False)
    model(x).sum().backward()
    handle = model.backbone.layer3.register_forward_hook(lambda *args: None)
    if fails: model.head.logits = nn.Conv2d(1, 1, 1)
    def state():
        return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
                [None if p.grad is None else p.grad.clone() for p in model.parameters()], [b.clone() for b in model.buffers()],
                [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()], torch.is_grad_enabled())
    before = state()
    if fails:
        with pytest.raises(RuntimeError): class_attention(model, x, mask, ['backbone.layer3'])
    else: class_attention(model, x, mask, ['backbone.layer3'])
    for a, b in zip(before, state()):
        if isinstance(a, list) and any(isinstance(t, torch.Tensor) for t in a):
            assert all((s is None and t is None) or torch.equal(s, t) for s, t in zip(a, b))
        else: assert a == b
    handle.remove()


def ways_to_compile():
    def wrapped(model): return torch.compile(model, backend='eager')
    def in_place(model): model.compile(backend='eager'); return model
    def backbone_only(model): model.backbone = torch.compile(model.backbone, backend='eager'); return model
    return [wrapped, in_place, backbone_only]


@pytest.mark.parametrize('compile', ways_to_compile())
def test_compiled_network_gives_the_same_maps(compile):
    model, (x, mask) = make_pspnet(), batch()
    layers = ['backbone.layer3', 'backbone.layer4']
    truth, logits = class_attention(model, x, mask, layers), model(x).detach()
    compiled = compile(model)
    assert difference(compiled(x), logits) < 1e-10  # compiled once before the reading, and used again after it
    for name, ours in class_attention(compiled, x, mask, layers).maps.items(): assert difference(ours, truth.maps[name]) < 1e-10
    assert difference(compiled(x), logits) < 1e-10


@pytest.mark.parametrize('end', [
    lambda z, x: F.interpolate(z, x.shape[-2:], mode='bilinear', align_corners=True),
    lambda z, x: F.interpolate(z, scale_factor=16.5, mode='bilinear'),
    lambda z, x: F.interpolate(z, x.shape[-2:], mode='bilinear', antialias=True),
    lambda z, x: F.interpolate(z, x.shape[-2:], mode='bicubic'),
    lambda z, x: F.interpolate(z, x.shape[-2:], mode='bilinear') * 2,
    lambda z, x: {'out': F.interpolate(z, x.shape[-2:], mode='bilinear').contiguous(memory_format=torch.channels_last)}])
def test_every_ending_of_a_network_agrees_with_the_definition(end):
    class Net(SegmentationModel):
        def forward(self, x): return end(self.head(self.backbone(x)), x)
    whole = make_pspnet()
    model, x, layer = Net(whole.backbone, whole.head).eval(), torch.randn(1, 3, 65, 65, dtype=torch.float64), 'backbone.layer3'
    mask = torch.randint(0, n_classes, (1, *logits_of(model(x)).shape[-2:]))
    ours = class_attention(model, x, mask, [layer], classes=classes).maps[layer]
    theirs = torch.stack([by_definition(model, x, mask, layer, c) for c in classes])
    assert theirs.max() > 0 and difference(ours[0], theirs) < 1e-10


def test_whole_network_in_half_precision():
    model, (x, mask) = make_pspnet(), batch()
    truth = class_attention(model, x, mask, ['backbone.layer4'], classes=classes).maps['backbone.layer4']
    ours = class_attention(model.bfloat16(), x.bfloat16(), mask, ['backbone.layer4'], classes=classes).maps['backbone.layer4']
    assert ours.dtype == torch.float32 and ours.isfinite().all()
    assert F.cosine_similarity(ours.flatten(2), truth.flatten(2), dim=2).min() > .98


def test_channels_last_network():
    model, (x, mask) = make_deeplabv3(), batch()
    truth = class_attention(model, x, mask, ['backbone.features.13'], classes=classes).maps['backbone.features.13']
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert difference(class_attention(model, x, mask, ['backbone.features.13'], classes=classes).maps['backbone.features.13'], truth) < 1e-10


def test_frozen_network_records_nothing_before_the_first_tap():
    model, (x, _) = make_pspnet().requires_grad_(False), batch()
    recording = {}
    handles = [m.register_forward_hook(lambda m, i, o, name=name: recording.update({name: o.requires_grad})) for name, m in model.backbone.named_children()]
    map_forward(model, x, ['backbone.layer3', 'backbone.layer4'])
    for handle in handles: handle.remove()
    assert [name for name, on in recording.items() if on] == ['layer3', 'layer4'] or [name for name, on in recording.items() if on] == ['layer4']


def test_a_loss_on_the_maps_trains_the_layers_before_the_tap():
    model, (x, mask) = make_pspnet(), batch()
    class_attention(model, x, mask, ['backbone.layer3']).maps['backbone.layer3'].sum().backward()
    assert model.backbone.layer2[0].conv1.weight.grad.abs().max() > 0
    assert model.backbone.layer4[0].conv1.weight.grad is None


def test_a_tuple_of_two_from_a_layer_is_refused():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, n_classes, 1)
        def forward(self, x): return self.conv(x), x
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.two = Two()
        def forward(self, x): return self.two(x)[0]
    with pytest.raises(ValueError, match=r"layer 'two' gives several tensors, 0: .*: say which, as in Tap\('two', item=1\)"):
        class_attention(Net().double(), *batch(), ['two'])


def test_taps_restore_the_gradient_mode():
    model, (x, _) = make_pspnet().requires_grad_(False), batch(1)
    torch.set_grad_enabled(False)
    try:
        with Taps(model, ['backbone.layer3'], start_graph=True): assert model(x).requires_grad
        assert not torch.is_grad_enabled()
    finally: torch.set_grad_enabled(True)


@pytest.mark.parametrize('without', [torch.no_grad, torch.inference_mode])
def test_maps_without_gradients_have_no_graph(without):
    model, (x, mask) = make_pspnet(), batch(side=33)
    expected = class_attention(model, x, mask, ['backbone.layer4'], classes=classes).maps['backbone.layer4']
    with without(): maps = class_attention(model, x, mask, ['backbone.layer4'], classes=classes).maps['backbone.layer4']
    assert expected.requires_grad and not maps.requires_grad and torch.equal(maps, expected)
