"""What `show_attention` guarantees: it leaves networks as they were, draws any network, and refuses what cannot be drawn."""
import copy

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from camkd_nb.figures import show_attention
from camkd_nb.models import toy_student
from camkd_nb.tensors import denormalize
from camkd_nb.voc import VOID

layer, vocab = 'backbone.layer4', ['background', 'disk', 'square', 'triangle', 'star', 'ring', 'cross']


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def batch(n=2):
    mask = torch.zeros(n, 64, 64, dtype=torch.long)
    mask[:, :4], mask[:, 10:40, 10:40], mask[:, 45:60, 45:60] = VOID, 4, 5
    return torch.randn(n, 3, 64, 64), mask


def state(model):
    modes, hooks = [m.training for m in model.modules()], sum(len(m._forward_hooks) for m in model.modules())
    return modes, hooks, [p.grad for p in model.parameters()], [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist(), plt.get_fignums()


class Broken(nn.Module):
    def forward(self, x): raise RuntimeError('out of memory')


def partly_training():
    model = toy_student().train()
    model.head.eval()
    return model


@pytest.mark.parametrize('layers', [None, layer])
@pytest.mark.parametrize('signed', [False, True])
def test_nothing_stays_behind(layers, signed):
    (x, mask), model = batch(1), partly_training()
    before, weights = state(model), copy.deepcopy(model.state_dict())
    show_attention({'moving': model}, x, mask, layers, vocab=vocab, signed=signed and layers is not None)
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_nothing_stays_behind_an_error():
    (x, mask), model = batch(1), partly_training()
    model.head.dropout = Broken()
    before = state(model)
    with pytest.raises(RuntimeError, match='out of memory'): show_attention({'moving': model}, x, mask, layer, vocab=vocab)
    assert state(model) == before


class Foreign(nn.Module):
    "A dict of logits that are smaller than the picture"
    def __init__(self): super().__init__(); self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7)
    def forward(self, x): return {'out': F.avg_pool2d(self.net(x)['out'], 4)}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_network_and_size(dtype):
    x, mask = batch()
    figure = show_attention({'foreign': Foreign().to(dtype)}, x[:, :, :48], mask[:, :48], 'net.backbone.12', vocab=vocab)
    assert [ax.get_title()[:3] for ax in figure.axes[:6]] == ['', '', 'max', '', '', 'max']


def test_layers_of_other_names_and_a_saved_figure(tmp_path):
    (x, mask), student = batch(1), toy_student()
    figure = show_attention({'a': student, 'b': student}, x, mask, {'a': layer, 'b': 'head.project'}, classes='ring', vocab=vocab)
    figure.savefig(tmp_path / 'maps.pdf')
    assert (tmp_path / 'maps.pdf').stat().st_size > 10_000


def test_class_without_a_pixel():
    (x, mask), student = batch(1), toy_student()
    nn.init.constant_(student.head.logits.bias[3:4], -1e4)  # never answers triangle
    figure = show_attention({'student': student}, x, mask, classes='triangle', vocab=vocab)
    assert figure.axes[2].get_title() == 'no triangle'
    with pytest.raises(ValueError, match="no pixel of image 0 is labelled 'triangle', it has background, star, ring"):
        show_attention({'student': student}, x, mask, layer, classes='triangle', vocab=vocab)


def spoilt(mask, value): return mask.index_fill(0, torch.tensor(1), value)


x, mask = batch()
net = toy_student()
refusals = [
    ("student: SegmentationModel has no layer 'backbone.layer5'", dict(layers={'teacher': layer, 'student': 'backbone.layer5'})),
    ('layers names teacher and models teacher, student', dict(layers={'teacher': layer})),
    ("no class 'ting': did you mean 'ring'", dict(classes='ting')),
    ('3 classes for 2 images', dict(classes=[1, 2, 3])),
    ("'teacher' gives 7 classes and vocab names 8", dict(vocab=[*vocab, 'moon'])),
    ('give a dict', dict(models=net)),
    ("'teacher' is a str", dict(models={'teacher': 'resnet50'})),
    ('give a batch (B, 3, H, W)', dict(x=x[0])),
    ('images are a ndarray', dict(x=denormalize(x))),
    ('give one dotted path', dict(layers=['backbone.layer3', layer])),
    ('pictures of shape (4, 64, 64, 3) do not fit', dict(pictures=denormalize(torch.cat([x, x])))),
    ('mask of shape (4, 64, 64) does not fit', dict(mask=torch.cat([mask, mask]))),
    ('image 1: value 9 in the mask', dict(mask=spoilt(mask, 9))),
    ("use region='predicted'", dict(mask=None)),
    ('set mask[mask < 0] = 255', dict(mask=spoilt(mask, -1))),
    ('the mask is a ndarray', dict(mask=mask.numpy())),
    ('pictures / 255', dict(pictures=(255 * denormalize(x)).astype('uint8'))),
    ('signed=True is about maps', dict(layers=None, signed=True)),
]
of_wrong_type = {'give a dict', "'teacher' is a str", 'images are a ndarray', 'give one dotted path', 'the mask is a ndarray', 'pictures / 255'}


@pytest.mark.parametrize('message, changed', refusals, ids=[message for message, _ in refusals])
def test_bad_input_is_refused_by_name(message, changed):
    asked = dict(models={'teacher': net, 'student': net}, x=x, mask=mask, layers=layer, vocab=vocab)
    with pytest.raises(TypeError if message in of_wrong_type else ValueError) as error: show_attention(**{**asked, **changed})
    assert message in str(error.value)
