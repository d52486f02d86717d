"""ONNX files answer as their networks do, or do not appear."""
import json
import sys
from functools import partial

import pytest
import torch
from fastai.layers import ToTensorBase
from torch import nn

from camkd_nb.attention import class_attention
from camkd_nb.export import OLDEST, compare, export_onnx, session_of
from camkd_nb.heads import ASPPHead, PSPHead
from camkd_nb.models import SegmentationModel
from camkd_nb.tensors import imagenet_stats, resize

sizes = (40, 48), (41, 65), (64, 32), (33, 100), (72, 72)

newer = pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2])) < OLDEST, reason=f'export_onnx needs PyTorch 2.9, not {torch.__version__}')


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def features(): return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(inplace=True))


def little(head=PSPHead):
    "A network of this package in miniature, with statistics of its own"
    model = SegmentationModel(features(), head(8, 4, width=8, dropout=.5))
    with torch.no_grad(): model(torch.randn(4, 3, 32, 32))
    return model


def opened(file):
    import onnx
    return session_of(onnx.load(file))


def normalised(image):
    mean, std = imagenet_stats(image)
    return (image - mean) / std


def state(model): return [(m.training, len(m._forward_hooks)) for m in model.modules()], [(p.requires_grad, p.grad, p.dtype) for p in model.parameters()]


@newer
@pytest.mark.parametrize('head', [partial(PSPHead, bins=(1, 3)), partial(ASPPHead, rates=(1,))], ids=['PSP', 'ASPP'])
def test_any_size(head, tmp_path):
    "Logits, at sizes that the export did not compare; the page does so with a real backbone"
    model = little(head)
    session = opened(export_onnx(model, tmp_path/'net.onnx'))
    for n, size in enumerate(sizes):
        image = torch.rand(1 + n % 3, 3, *size)
        with torch.no_grad(): want = resize(model.eval()(normalised(image)), size)
        compare(session, {'image': image}, {'logits': want})


@newer
def test_maps_of_any_size(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    before = state(model)
    session = opened(export_onnx(model, tmp_path/'net.onnx', maps='1', vocab=list('abcd')))
    assert state(model) == before and [file.name for file in tmp_path.iterdir()] == ['net.onnx']
    said = session.get_modelmeta().custom_metadata_map
    assert [json.loads(said[key]) for key in ('classes', 'layers')] == [list('abcd'), ['1']] and said['normalises'] == 'imagenet'
    for n, size in enumerate(sizes):
        image = torch.rand(2, 3, *size)
        region, chosen = image[:, 0] > .4, torch.tensor([n % 4, -1])
        want = class_attention(model, normalised(image), layers='1', region=region, classes=chosen[:, None], signed=True)
        asked, maps = {'image': image, 'region': region, 'class': chosen}, want.maps['1'].detach()
        compare(session, asked, {'logits': resize(want.logits, size), 'maps.1': maps})
        assert maps[0].any() and not maps[1].any()


@newer
def test_logits_of_the_size_of_some_images(tmp_path):
    "The example of the tracing is none of them"
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Upsample(scale_factor=2))
    session = opened(export_onnx(model, tmp_path/'net.onnx'))
    for size in sizes: compare(session, {'image': (image := torch.rand(1, 3, *size))}, {'logits': resize(model(normalised(image)).detach(), size)})


@newer
def test_maps_behind_a_pyramid(tmp_path):
    model, image = little(partial(PSPHead, bins=(3,))), torch.rand(1, 3, 33, 52)
    session = opened(export_onnx(model, tmp_path/'maps.onnx', (33, 52), maps='backbone.4'))
    region, chosen = image[:, 0] > .4, torch.tensor([1])
    want = class_attention(model, normalised(image), layers='backbone.4', region=region, classes=[1], signed=True).maps['backbone.4']
    compare(session, {'image': image, 'region': region, 'class': chosen}, {'maps.backbone.4': want.detach()})


class Named(nn.Module):
    "Logits at half the size, in a dict, beside those of an auxiliary head"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, groups=3), nn.Hardswish(), nn.Conv2d(6, 6, 3, 1, 1, groups=2), nn.Conv2d(6, 3, 1), ToTensorBase())
    def forward(self, x):
        assert x.dtype == self.net[0].weight.dtype
        z = self.net(x)
        return {'scores': z, 'aux': z[:, :2]}


@newer
def test_a_network_of_ones_own(tmp_path):
    "In half precision, inside a wrapper, compiled, with an output of its own"
    model = nn.DataParallel(Named().half())
    model.module.net.compile(backend='eager')
    before = state(model)
    session = opened(export_onnx(model, tmp_path/'own.onnx', (24, 30), output=lambda found: found['scores'], maps='net.1'))
    assert [one.shape for one in session.get_outputs()] == [[1, 3, 24, 30], [1, 1, 12, 15]]
    assert state(model) == before
    with pytest.raises(TypeError, match="keys \\['scores', 'aux'\\]"): export_onnx(model, tmp_path/'no.onnx', 24)
    assert [file.name for file in tmp_path.iterdir()] == ['own.onnx']


class Frozen(nn.Module):
    "Pools as a file for one size would"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)
    def forward(self, x):
        x = self.conv(x)
        return x + nn.functional.interpolate(torch.ops.aten._adaptive_avg_pool2d(x, (2, 2)), x.shape[-2:])


@newer
def test_wrong_files_do_not_appear(tmp_path):
    "And a file that was there stays"
    file, model = tmp_path/'net.onnx', Frozen()
    file.write_text('old')
    before = state(model)
    with pytest.raises(ValueError, match=r'would be wrong: its logits differ .* of a span of .* on an image of 64×96'): export_onnx(model, file)
    assert file.read_text() == 'old' and state(model) == before and list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="in place of aten.adaptive_max_pool2d, in layer '1'"): export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(3)), file)
    pool = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1))
    with pytest.raises(ValueError, match="operator 'max_pool2d_with_indices', which lies between '0' and the logits"): export_onnx(pool, file, 24, maps='0')
    assert file.read_text() == 'old'


@newer
@pytest.mark.parametrize('options, error, says', [
    (dict(file='net.pt'), ValueError, 'ends in .onnx'), (dict(file='missing/net.onnx'), ValueError, 'is no folder'), (dict(file='there.onnx'), ValueError, 'is a folder'),
    (dict(size=0), ValueError, 'side of a square'), (dict(size=(3, 4, 5)), ValueError, 'side of a square'), (dict(size='96'), ValueError, 'side of a square'),
    (dict(maps='backbone.33'), ValueError, "did you mean 'backbone.3'"), (dict(maps=[]), ValueError, 'no layers given'),
    (dict(vocab=['a', 'b']), ValueError, '2 names, and the network 4'), (dict(vocab='abcd'), TypeError, 'list of texts'),
    (dict(model=torch.zeros(1)), TypeError, 'is no network'), (dict(output=lambda z: z.argmax(1)), ValueError, 'give a batch'),
], ids=str)
def test_refused_before_any_work(options, error, says, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, 'export', None)
    (tmp_path/'there.onnx').mkdir()
    options = dict(model=little(), file='net.onnx') | options
    with pytest.raises(error, match=says): export_onnx(options.pop('model'), tmp_path/options.pop('file'), **options)


@newer
def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'pip install "camkd_nb\[export\]"'): export_onnx(little(), tmp_path/'net.onnx')


@newer
def test_a_network_that_takes_one_size(tmp_path):
    class Picky(nn.Conv2d):
        def forward(self, x):
            if x.shape[-2:] != (20, 28): raise ValueError('20 × 28 pixels, please')
            return super().forward(x)
    with pytest.raises(ValueError, match='fails on an image of 64×96 pixels: 20 × 28 pixels, please'): export_onnx(Picky(3, 2, 1), tmp_path/'net.onnx')


def test_an_old_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.8.1+cpu')
    with pytest.raises(ImportError, match=r'needs PyTorch 2\.9 or newer, and this is 2\.8\.1'): export_onnx(little(), tmp_path/'net.onnx')
    assert not list(tmp_path.iterdir())
