"""Networks of every kind have the right sizes, learn in every part, and travel as any module."""
from copy import deepcopy
from io import BytesIO

import pytest
import torch
import torch.nn.functional as F

from camkd_nb.backbones import BACKBONES
from camkd_nb.heads import ASPPHead
from camkd_nb.models import build_model, deeplabv3, model_names, pspnet, toy_student, toy_teacher
from camkd_nb.tensors import resize

size = 65, 97  # multiples of no stride


def rounded_up(stride): return tuple(-(-side // stride) for side in size)
def millions(net): return sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize('stride', [8, 16, 32])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_sizes(backbone, stride):
    with torch.device('meta'), torch.no_grad():
        net = pspnet(backbone, output_stride=stride).eval()
        features = net.backbone(torch.empty(2, 3, *size))
        logits = [resize(head(features), size) for head in (net.head, ASPPHead(BACKBONES[backbone], 21))]
    assert features.shape == (2, BACKBONES[backbone], *rounded_up(stride))
    assert [z.shape for z in logits] == [(2, 21, *size)] * 2


@pytest.mark.parametrize('stride, rates', [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
def test_dilations_of_the_head_span_the_same_pixels(stride, rates):
    with torch.device('meta'): head = deeplabv3('mobilenet_v2', output_stride=stride).head
    assert [getattr(head, f'aspp{i}')[0].dilation for i in (1, 2, 3)] == [(rate, rate) for rate in rates]


def untrained(net, images=2, side=33):
    "Parameters without any gradient after a step, which would never learn"
    net.train()
    F.cross_entropy(net(torch.randn(images, 3, side, side)), torch.zeros(images, side, side).long()).backward()
    return [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize('make', [toy_teacher, toy_student, *(lambda build=build, name=name: build(name)
    for build in (pspnet, deeplabv3) for name in ('resnet18', 'mobilenet_v2', 'mobilenet_v3_small'))])
def test_every_parameter_learns(make): assert untrained(make()) == []


@pytest.mark.parametrize('build', [pspnet, deeplabv3])
def test_a_batch_of_one(build):
    net = build('resnet18')
    untrained(net, images=1)
    assert all(p.isfinite().all() for p in net.state_dict().values())


def test_copied_and_saved():
    model, x, buffer = pspnet('resnet18').eval(), torch.randn(1, 3, *size), BytesIO()
    torch.save(model, buffer); buffer.seek(0)
    with torch.no_grad():
        for other in (deepcopy(model), torch.load(buffer, weights_only=False)): assert other(x).equal(model(x))


def test_the_toy_pair():
    assert [round(millions(net), 3) for net in (toy_teacher(), toy_student())] == [.865, .119]
    assert toy_student(5)(torch.randn(2, 3, *size)).shape == (2, 5, *size)


def test_names():
    assert build_model('toy_student', 9).head.logits.out_channels == 9
    assert type(build_model('deeplabv3_mobilenet_v2').head) is ASPPHead
    assert {'toy_teacher', 'toy_student', 'pspnet_resnet18', 'deeplabv3_mobilenet_v3_small'} < set(model_names())


@pytest.mark.parametrize('make, said', [
    (lambda: pspnet('mobilenetv2'), "did you mean 'mobilenet_v2'"),
    (lambda: deeplabv3('resnet18', output_stride=12), 'must be 8, 16 or 32, got 12'),
    (lambda: pspnet('resnet18', n_classes=1), r'at least 2 \(background and one class\), got 1'),
    (lambda: build_model('psp_resnet50'), "did you mean 'pspnet_resnet50'"),
    (lambda: toy_teacher(21, pretrained=True), 'knows 7 classes'),
    (lambda: build_model('toy_student', pretrained=True), "'plain' or 'distilled'"),
    (lambda: toy_student(21, pretrained='plain'), 'knows 7 classes, not 21')])
def test_mistakes_are_named_when_the_network_is_built(make, said):
    with pytest.raises(ValueError, match=said): make()
