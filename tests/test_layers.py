"Other people's networks: which layer is chosen, what its output means, and what is refused."
import warnings
from collections import OrderedDict

import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from camkd_nb.attention import class_attention
from camkd_nb.distiller import Distiller
from camkd_nb.layers import Taps, find_layers
from camkd_nb.layouts import Tap
from camkd_nb.losses import ClassAttention
from camkd_nb.backbones import toy_backbone
from camkd_nb.heads import ASPPHead
from camkd_nb.models import toy_student, toy_teacher
from camkd_nb.stages import last_stages, layer_lines

n_classes, seed = 7, 0


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(seed)


def up(z, x): return F.interpolate(z, x.shape[-2:], mode='bilinear')
def smp(architecture, encoder, **options):
    library = pytest.importorskip('segmentation_models_pytorch')
    return getattr(library, architecture)(encoder, encoder_weights=None, classes=n_classes, **options)


class Wrapped(nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)


class Named(Wrapped):
    "As networks of Hugging Face are wrapped"
    def forward(self, x): return {'out': up(self.net(pixel_values=x).logits, x)}


class Stem(Wrapped):
    "A change of colours comes first"
    def __init__(self, net): super().__init__(net); self.colours = nn.Conv2d(3, 3, 1)
    def forward(self, x): return self.net(self.colours(x))


class Flat(nn.Module):
    "No part is called a backbone, and pyramid pooling comes between it and the classifier"
    def __init__(self):
        super().__init__()
        for name, part in toy_backbone(4, 1).named_children(): self.add_module(name, part)
        self.context, self.last = ASPPHead(32, 16, width=8, rates=(1, 2)), nn.Conv2d(16, n_classes, 1)
    def forward(self, x):
        y = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return up(self.last(self.context(y)), x)


class Plain(nn.Module):
    "One convolution and a norm over channels that come last"
    def __init__(self): super().__init__(); self.patch, self.norm, self.head = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), nn.Conv2d(16, n_classes, 1)
    def forward(self, x): return self.head(self.norm(self.patch(x).movedim(1, -1)).movedim(-1, 1))


class Resizing(Wrapped):
    def forward(self, x): return up(self.net(F.interpolate(x, (64, 64))), x)


class Branch(nn.Module):
    "A deeper branch that the logits do not use"
    def __init__(self): super().__init__(); net = toy_student(); self.backbone, self.head = net.backbone, nn.Conv2d(16, n_classes, 1)
    def forward(self, x):
        y = self.backbone.layer2(self.backbone.layer1(self.backbone.stem(x)))
        self.unused = self.backbone.layer4(self.backbone.layer3(y))
        return up(self.head(y), x)


def colours(n):
    net = toy_student()
    net.backbone.stem[0] = nn.Conv2d(n, 8, 3, 2, 1)
    return net


def segformer():
    transformers = pytest.importorskip('transformers')
    config = transformers.SegformerConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16, num_labels=n_classes)
    return transformers.SegformerForSemanticSegmentation(config)


def beit(kind='Beit', **options):
    transformers = pytest.importorskip('transformers')
    config = getattr(transformers, f'{kind}Config')(image_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, out_indices=[1, 2, 3, 4], num_labels=n_classes, **options)
    return getattr(transformers, f'{kind}ForSemanticSegmentation')(config)


@pytest.mark.parametrize('make, last', [
    (lambda: smp('Unet', 'efficientnet-b0'), 'encoder._blocks.15'),
    (lambda: smp('Unet', 'tu-mobilenetv3_small_050'), 'encoder.model.blocks.5'),
    (lambda: smp('PSPNet', 'mobilenet_v2'), 'encoder.features.6'),
    (lambda: smp('PAN', 'resnet18'), 'encoder.layer4'),
    (lambda: Wrapped(smp('FPN', 'mit_b0')), 'net.encoder.norm4'),
    (lambda: AveragedModel(toy_teacher()), 'backbone.layer4'),
    (lambda: torch.compile(Wrapped(toy_teacher())), 'net.backbone.layer4'),
    (lambda: Stem(toy_teacher()), 'net.backbone.layer4'),
    (lambda: Resizing(toy_student()), 'net.backbone.layer4'),
    (Flat, 'layer4'), (Branch, 'backbone.layer2'), (Plain, 'norm'),
    (lambda: colours(1), 'backbone.layer4'), (lambda: colours(4), 'backbone.layer4'), (lambda: colours(12), 'backbone.layer4'),
    (lambda: Named(segformer()), 'net.segformer.stages.3'),
    (beit, 'beit.layers.2'),
    (lambda: beit('Data2VecVision'), 'data2vec_vision.encoder.layer.2'),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Conv2d(8, n_classes, 1)), '1'),
], ids=lambda made: made if isinstance(made, str) else '')
def test_the_last_stage_is_found(make, last):
    assert last_stages(make().train()) == [last]


def test_default_layers_leave_no_trace():
    net, state = toy_student().train(), torch.get_rng_state()
    net.backbone.layer1.eval()
    last_stages(net)
    assert torch.equal(torch.get_rng_state(), state) and net.training and not net.backbone.layer1.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()) and all(p.grad is None for p in net.parameters())


def test_what_was_chosen_can_be_told():
    net = toy_student()
    assert layer_lines(net, last_stages(net)) == {'backbone.layer4': "'backbone.layer4', 64 × 8 × 12 at stride 8"}


def test_where_nothing_is_sure_the_layers_are_listed():
    with pytest.raises(ValueError, match=r"name its layers yourself, as in layers=\['0'\].*\n +'0': shape \(2, 8, 16, 24\), stride 4"):
        last_stages(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, n_classes, 1)), n=2)


class Layer(nn.Module):
    "Turns a map into a layout and does nothing else"
    def __init__(self, layout): super().__init__(); self.layout = layout
    def forward(self, y):
        tokens = y.flatten(2).transpose(1, 2)
        if self.layout == 'channels last': return y.permute(0, 2, 3, 1)
        if self.layout == 'tokens': return tokens
        if self.layout == 'prefix': return torch.cat([tokens[:, :2] * 2, tokens], 1)
        if self.layout == 'tuple': return (tokens, 3)
        if self.layout == 'object': return {'last_hidden_state': tokens, 'hidden_states': (tokens[:, :1], tokens)}
        if self.layout == 'sequence first': return tokens.transpose(0, 1)
        if self.layout == 'windows': return y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, y.shape[1])
        return y.new_ones(len(y), 64, y.shape[1])  # queries

def back(t, layout, shape):
    if layout == 'channels last': return t.permute(0, 3, 1, 2)
    if layout == 'sequence first': t = t.transpose(0, 1)
    if layout == 'tuple': t = t[0]
    if layout == 'object': t = t['hidden_states'][1]  # not the one that is tapped, but the same tensor
    if layout == 'windows': return t.view(shape[0], shape[2] // 2, shape[3] // 2, 2, 2, shape[1]).permute(0, 5, 1, 3, 2, 4).reshape(shape)
    if layout == 'queries': return t.mean(1)[:, :, None, None].expand(shape)
    return t[:, t.shape[1] - shape[2] * shape[3]:].transpose(1, 2).reshape(shape)


class Net(nn.Module):
    "Eight channels, stride 8: for images of 64 × 64 pixels the three sides of a map are alike"
    def __init__(self, layout):
        super().__init__()
        self.stem, self.layer, self.head, self.layout = nn.Conv2d(3, 8, 8, 8), Layer(layout), nn.Conv2d(8, n_classes, 3, padding=1), layout
    def forward(self, x):
        y = self.stem(x)
        return up(self.head(back(self.layer(y), self.layout, y.shape)), x)


def images(*size): return torch.randn(2, 3, *size).double()


@pytest.mark.parametrize('size', [(64, 64), (64, 96), (72, 56)], ids=str)
@pytest.mark.parametrize('layout', ['channels last', 'tokens', 'prefix', 'tuple', 'object'])
def test_every_layout_gives_the_same_maps(layout, size):
    "Its layer does nothing to the values, so that its maps are those of the convolution before"
    net, x = Net(layout).double(), images(*size)
    for options in (dict(), dict(second_order=True), dict(method='hirescam'), dict(method='activation')):
        got = class_attention(net, x, None, ['layer', 'stem'], classes=[1, 2], region='all', signed=True, **options).maps
        assert (got['layer'] - got['stem']).abs().max() < 1e-10


def test_a_gradient_through_a_token_layer_is_the_layers_own():
    net, x, mask = Net('prefix').double(), images(64, 96), torch.ones(2, 64, 96, dtype=torch.long)
    grads = []
    for path in ('layer', 'stem'):
        net.zero_grad()
        class_attention(net, x, mask, [path], second_order=True, signed=True).maps[path].pow(2).sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*grads))


@pytest.mark.parametrize('layout, said', [('windows', 'tap the block around it'), ('sequence first', 'tap the block around it'), ('queries', r"as in Tap\('layer', prefix=1\)")])
def test_what_is_no_grid_of_places_is_refused(layout, said):
    with pytest.raises(ValueError, match=said): class_attention(Net(layout).double(), images(64, 64), None, ['layer'], classes=[1], region='all')


def test_a_tap_says_what_cannot_be_known():
    net, x = Net('queries').double(), images(64, 64)
    got = class_attention(net, x, None, [Tap('layer', grid=(8, 8))], classes=[1], region='all')
    assert got.maps['layer'].shape == (2, 1, 8, 8)  # taken at its word


def test_any_name_of_a_layer_works_and_wrappers_may_be_left_out():
    net = AveragedModel(Wrapped(toy_teacher()))
    net.module.short = net.module.net.backbone.layer4
    for name in ('module.net.backbone.layer4', 'net.backbone.layer4', 'short', 'module.short'):
        assert find_layers(net, [name])[name] is net.module.short


class Collects(nn.Module):
    "Takes its features from a hook that was there first"
    def __init__(self, net):
        super().__init__()
        self.net, self.kept = net, None
        self.net.backbone.layer4.register_forward_hook(lambda module, inputs, output: setattr(self, 'kept', output), always_call=True)
    def forward(self, x): self.net.backbone(x); return up(self.net.head(self.kept), x)


def test_a_network_may_collect_its_features_by_hooks():
    net, x = toy_student().double(), images(64, 64)
    plain = class_attention(net, x, None, ['backbone.layer4'], classes=[1], region='all').maps['backbone.layer4']
    hooked = class_attention(Collects(net), x, None, ['net.backbone.layer4'], classes=[1], region='all').maps['net.backbone.layer4']
    assert (plain - hooked).abs().max() < 1e-10


class Saving(nn.Module):
    def __init__(self, reentrant): super().__init__(); net = toy_student(); self.backbone, self.head, self.reentrant = net.backbone, net.head, reentrant
    def deep(self, y): return self.backbone.layer4(self.backbone.layer3(y))
    def forward(self, x):
        y = self.backbone.layer2(self.backbone.layer1(self.backbone.stem(x)))
        return up(self.head(self.deep(y) if self.reentrant is None else checkpoint(self.deep, y, use_reentrant=self.reentrant)), x)


def one_step(reentrant, layer):
    torch.manual_seed(seed)
    net, teacher, x = Saving(reentrant).train(), toy_teacher(), torch.randn(2, 3, 64, 64)
    distiller = Distiller(net, teacher, ClassAttention(layers={layer: 'backbone.layer4'}))
    distiller.step(x, torch.ones(2, 64, 64, dtype=torch.long), lambda z, mask: F.cross_entropy(z, mask)).total.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_checkpointed_layers_are_taught_or_refused():
    inside, before = one_step(None, 'backbone.layer3'), one_step(None, 'backbone.layer2')
    assert (one_step(False, 'backbone.layer3') - inside).norm() < 1e-3 * inside.norm()
    assert (one_step(True, 'backbone.layer2') - before).norm() < 1e-3 * before.norm()
    with pytest.raises(ValueError, match='checkpointed with use_reentrant=True'): one_step(True, 'backbone.layer3')


def test_layers_of_a_traced_network_are_refused_and_a_traced_part_is_tapped():
    x = torch.randn(2, 3, 64, 64)
    net = nn.Sequential(OrderedDict(backbone=nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), head=nn.Conv2d(8, n_classes, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced, net.backbone = torch.jit.trace(net, x), torch.jit.trace(net.backbone, x)
    with pytest.raises(TypeError, match='TorchScript'): last_stages(traced)
    with pytest.raises(TypeError, match='TorchScript'): class_attention(traced, x, None, ['backbone.0'])
    assert last_stages(net) == ['backbone']


def test_a_probe_of_a_shape_comes_once():
    net, runs = Net('channels last').double(), []
    net.stem.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        with Taps(net, ['layer']) as taps: net(images(64, 64))
        assert taps.activations['layer'].shape == (2, 8, 8, 8)
    assert len(runs) == 4


class Tokens(nn.Module):
    "A block on tokens that stand in an order of its own"
    orders = {'rows': lambda t: t.flatten(1, 2), 'columns': lambda t: t.transpose(1, 2).flatten(1, 2),
              'windows': lambda t: t.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(1, 4),
              'class token last': lambda t: torch.cat([t.flatten(1, 2), t[:, :1, 0]], 1)}
    def __init__(self, order):
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 16), nn.Conv2d(16, n_classes, 1)
        self.order = self.orders[order]
    def forward(self, x):
        places = self.patch(x).permute(0, 2, 3, 1)
        tokens = self.block(self.order(places))
        numbers = torch.arange(places[0, ..., 0].numel()).view(1, *places.shape[1:3], 1)
        stand = self.order(numbers).flatten()[:numbers.numel()].argsort()
        return self.head(tokens[:, stand].transpose(1, 2).unflatten(2, places.shape[1:3]))


@pytest.mark.parametrize('order', Tokens.orders)
def test_order_of_tokens(order):
    "Tokens that do not stand row by row are refused, and no stem takes their place"
    net, x = Tokens(order), torch.randn(2, 3, 64, 96)
    if order == 'rows':
        found, = last_stages(net)
        assert (found, found.prefix) == ('block', 0)
        return
    with Taps(net, ['block']) as taps: net(x)
    with pytest.raises(ValueError, match='do not stand row by row'): taps.activations
    with pytest.raises(ValueError, match='shows no 1 stages'): last_stages(net)


class SequenceFirst(nn.Module):
    "Blocks on (N, B, K), which no tap reads"
    def __init__(self):
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 16, 8, 8), nn.Conv2d(16, n_classes, 1)
        self.block = nn.TransformerEncoderLayer(16, 2, 16)
    def forward(self, x):
        y = self.patch(x)
        return self.head(self.block(y.flatten(2).permute(2, 0, 1)).permute(1, 2, 0).unflatten(2, y.shape[2:]))


def test_stem_before_blocks_that_cannot_be_read():
    with pytest.raises(ValueError, match='shows no 1 stages'): last_stages(SequenceFirst())


def test_scripted_parts():
    net = nn.Sequential(OrderedDict(backbone=nn.Conv2d(3, 8, 4, 4), act=nn.ReLU(), head=nn.Conv2d(8, n_classes, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net.act = torch.jit.script(net.act)
        assert last_stages(net)[0] == 'backbone'
        net.backbone = torch.jit.script(net.backbone)
    with pytest.raises(TypeError, match="part 'backbone' of the network is a TorchScript"): last_stages(net)


@pytest.mark.parametrize('change', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_weights(change):
    "A backbone whose convolutions have no weight of their own is found"
    net = toy_student()
    for part in list(net.modules()):
        if isinstance(part, nn.Conv2d): change(part)
    assert last_stages(net) == last_stages(toy_student())
