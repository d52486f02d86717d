"""A file of eight bits: what it scores, what is refused, and what else may come in its way."""
import os, sys, warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from PIL import Image
from torch import nn

from camkd_nb.data import voc_dls
from camkd_nb.evaluate import evaluate, predict
from camkd_nb.export import export_onnx
from camkd_nb.models import toy_student
from camkd_nb.published import deeplabv3_mobilenetv2_voc
from camkd_nb.quantize import quantize_onnx
from camkd_nb.runtime import OnnxModel
from camkd_nb.toyvoc import TOY_CLASSES, toy_voc
from camkd_nb.trees import voc_real


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return toy_voc(tmp_path_factory.mktemp('data')/'toy', n_train=8, n_valid=12)


@pytest.fixture(scope='module')
def student(): return toy_student(pretrained='distilled').eval()


@pytest.fixture(scope='module')
def file(student, tmp_path_factory): return export_onnx(student, tmp_path_factory.mktemp('files')/'student.onnx', vocab=TOY_CLASSES)


@pytest.fixture(scope='module')
def small(file, tree):
    quantize_onnx(file, file.with_name('small.onnx'), tree, progress=False)
    return OnnxModel(file.with_name('small.onnx'))


def black(folder, n=4):
    folder.mkdir()
    for i in range(n): Image.new('RGB', (40, 48)).save(folder/f'{i}.png')
    return folder


def test_the_score_is_near(student, small, tree):
    whole, eight = (evaluate(model, tree, progress=False).miou for model in (student, small))
    assert abs(whole - eight) < .01 and whole > .5
    assert small.vocab == TOY_CLASSES and 'Quantize' in ' '.join(node.op_type for node in onnx.load(small.file).graph.node)


@pytest.mark.parametrize('shape', [(33, 70), (96, 96), (120, 50)])
def test_any_size(student, small, shape):
    "Drawings of other sizes get the network's answers, but for a few pixels"
    picture = np.asarray(Image.fromarray(np.kron(np.eye(4, dtype='uint8') * 200, np.ones((8, 8), 'uint8'))).convert('RGB').resize(shape))
    assert (predict(small, picture) == predict(student, picture)).mean() > .9


def test_a_loss_is_refused(file, tree, tmp_path):
    "And what stood there before still does"
    box, out = tmp_path/'box', tmp_path/'out.onnx'
    for part in ('ImageSets', 'SegmentationClass', 'JPEGImages'): (box/part).parent.mkdir(exist_ok=True), os.symlink(tree/part, box/part)
    (box/'JPEGImages').unlink(), (box/'JPEGImages').mkdir(), (box/'classes.txt').write_bytes((tree/'classes.txt').read_bytes())
    for photo in (tree/'JPEGImages').iterdir():
        if photo.name.startswith('val'): os.symlink(photo, box/'JPEGImages'/photo.name)
        else: Image.new('RGB', (96, 96)).save(box/'JPEGImages'/photo.name)
    out.write_text('mine')
    with pytest.raises(ValueError, match=r'mIoU .* in eight: a loss of .* more than most=1, and no file is written'): quantize_onnx(file, out, box, progress=False)
    assert out.read_text() == 'mine' and [path.name for path in tmp_path.iterdir() if path.name.startswith('.')] == []


def test_loaders_of_any_normalisation(file, tree, tmp_path):
    "Their own statistics are undone"
    plain, other = voc_dls(tree, bs=8), voc_dls(tree, bs=8)
    for dl in other:
        dl.after_batch.fs = type(dl.after_batch.fs)([Normalize.from_stats([.5] * 3, [.25] * 3) if isinstance(one, Normalize) else one for one in dl.after_batch.fs])
    with warnings.catch_warnings(action='error', category=UserWarning): first = quantize_onnx(file, tmp_path/'0.onnx', plain, n=4)
    with pytest.warns(UserWarning, match='have other statistics in their Normalize'): second = quantize_onnx(file, tmp_path/'1.onnx', other, n=4)
    assert abs(first.mIoU - second.mIoU).max() < .5


def test_loaders_without_normalisation(file, tree, tmp_path):
    dls = voc_dls(tree, bs=8)
    for dl in dls: dl.after_batch.fs = type(dl.after_batch.fs)([one for one in dl.after_batch.fs if not isinstance(one, Normalize)])
    with pytest.warns(UserWarning, match='have no Normalize'): assert quantize_onnx(file, tmp_path/'a.onnx', dls, n=8).mIoU['32 bits'] > 50
    for dl in dls: dl.after_batch.fs[0].div = 64.
    with pytest.raises(ValueError, match='not from 0 to 1'): quantize_onnx(file, tmp_path/'b.onnx', dls)


def test_a_fixed_size(tree, tmp_path):
    "Smaller pictures are filled up, larger ones get smaller"
    torch.manual_seed(0)
    file = export_onnx(nn.Conv2d(3, 7, 3, padding=1), tmp_path/'fixed.onnx', size=(64, 80))
    table = quantize_onnx(file, tmp_path/'small.onnx', tree, n=4, most=100, progress=False)
    assert list(table)[2] == 'ms at 64×64' and OnnxModel(tmp_path/'small.onnx').sides == [64, 80]
    assert 'same pixels (%)' in quantize_onnx(file, tmp_path/'p.onnx', black(tmp_path/'black'), most=100)
    with pytest.raises(ValueError, match=r'fixed.onnx takes 64×80 pixels, and the DataLoaders have 96×96: give voc_dls\(\.\.\., size=64\)'): quantize_onnx(file, tmp_path/'d.onnx', voc_dls(tree, bs=8))
    with pytest.raises(ValueError, match='^fixed.onnx takes 64×80 pixels, not 96×96: give size=64'): predict(OnnxModel(file), np.zeros((96, 96, 3), 'uint8'))


def test_masks_among_photographs(file, tree, tmp_path):
    for mode in ('L', 'P'):
        mixed = black(tmp_path/mode)
        (mixed/'masks').mkdir(), Image.fromarray(np.eye(48, dtype='uint8'), mode='L').convert(mode).save(mixed/'masks/a.png')
        with pytest.raises(ValueError, match='a.png looks like a mask'): quantize_onnx(file, tmp_path/'out.onnx', mixed)
    with pytest.raises(ValueError, match='one photograph. Give two'): quantize_onnx(file, tmp_path/'out.onnx', black(tmp_path/'one', n=1))


def test_what_is_no_source(file, tree, tmp_path):
    def refused(match, images, error=ValueError, given=file, out=tmp_path/'out.onnx', **options):
        with pytest.raises(error, match=match): quantize_onnx(given, out, images, progress=False, **options)
        assert not out.exists()
    (tmp_path/'empty').mkdir(), (tmp_path/'not.onnx').write_text('hello')
    refused('no photographs in it', tmp_path/'empty')
    refused('looks like a mask', tree/'SegmentationClass')
    refused('no such folder', tmp_path/'nowhere')
    refused('images is a list', [1], TypeError)
    refused('is no folder: make it', tree, out=tmp_path/'new/out.onnx')
    refused('n=0: give the number', tree, n=0)
    refused('is no ONNX file', tree, given=tmp_path/'not.onnx')
    refused('no such file', tree, FileNotFoundError, given=tmp_path/'missing.onnx')
    refused("no layer 'heads': did you mean 'head'", tree, keep='heads')
    refused("size='a'", tree, size='a')
    plain = DataLoader([(torch.rand(3, 8, 8), torch.zeros(8, 8).long())] * 4, bs=2)
    refused('cannot be read again', DataLoaders(plain, plain), TypeError)


def test_eight_bits_twice(small, tree, tmp_path):
    with pytest.raises(ValueError, match='has eight bits already'): quantize_onnx(small.file, tmp_path/'again.onnx', tree)
    with pytest.raises(ValueError, match='give another name'): quantize_onnx(small.file, small.file.parent/'..'/small.file.parent.name/'small.onnx', tree)


def test_without_the_extra(file, tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r'pip install "camkd_nb\[export\]"'): quantize_onnx(file, tmp_path/'out.onnx', tree)
    with pytest.raises(ImportError, match=r'pip install "camkd_nb\[export\]"'): OnnxModel(file)


@pytest.mark.skipif(not os.environ.get('CAMKD_SLOW'), reason='takes a minute: set CAMKD_SLOW=1')
def test_slow_on_real_photographs(tmp_path):
    real = voc_real()
    weights = real and Path(os.environ.get('CAMKD_WEIGHTS') or real.parents[1]/'weights')/'deeplabv3_mobilenetv2_voc.pth'
    if not (weights and weights.is_file()): pytest.skip('no Pascal VOC with weights beside it here')
    file = export_onnx(deeplabv3_mobilenetv2_voc(weights), tmp_path/'deeplab.onnx')
    table = quantize_onnx(file, tmp_path/'small.onnx', real, n=32, size=257, progress=False)
    assert table.mIoU['32 bits'] > 55 and table.mIoU['8 bits'] > table.mIoU['32 bits'] - 1
    assert table['file (MB)']['8 bits'] < 3
