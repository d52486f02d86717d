"""`evaluate` on real Pascal VOC: an independent count of the predictions it saves, and the scores that others measured.

Needs the real images and the weights of a network trained on them; skipped where they are absent. All 1,449 photographs:

    CAMKD_ALL_PHOTOS=1 python -m pytest tests/test_evaluate.py    # two minutes
"""
import os
from pathlib import Path

import pytest, torch
from torchmetrics.classification import MulticlassJaccardIndex

from camkd_nb.evaluate import evaluate
from camkd_nb.published import deeplabv3_mobilenetv2_voc
from camkd_nb.trees import voc_real
from camkd_nb.voc import VOID, read_mask, voc_items

voc = voc_real()
weights = voc and Path(os.environ.get('CAMKD_WEIGHTS') or voc.parents[1]/'weights')/'deeplabv3_mobilenetv2_voc.pth'
pytestmark = pytest.mark.skipif(not (weights and weights.exists()), reason='no real VOC 2012 with trained weights: set CAMKD_VOC to its folder')
every = 1 if os.environ.get('CAMKD_ALL_PHOTOS') else 36  # 41 of them
scores = {1: (.7258, .7401), 36: (.5709, .6008)}[every]  # of all, two evaluations by others; of the 41, this one's


@pytest.fixture(scope='module')
def teacher(): return deeplabv3_mobilenetv2_voc(weights)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "The tree, with a list of every so many validation photographs"
    tree = tmp_path_factory.mktemp('data')/'VOC2012'
    (tree/'ImageSets/Segmentation').mkdir(parents=True)
    for name in ('JPEGImages', 'SegmentationClass'): (tree/name).symlink_to((voc/name).resolve())
    ids = (voc/'ImageSets/Segmentation/val.txt').read_text(encoding='utf-8').split()[::every]
    (tree/'ImageSets/Segmentation/val.txt').write_text('\n'.join(ids) + '\n', encoding='utf-8')
    return tree


def test_native_size_and_saved_predictions(teacher, tree, tmp_path):
    "torchmetrics counts the saved pictures to the same figures, class by class"
    result = evaluate(teacher, tree, save_to=tmp_path, progress=False)
    assert result.miou == pytest.approx(scores[0], abs=.003)
    folder, items = tmp_path/'results/VOC2012/Segmentation/comp6_val_cls', voc_items(tree, 'val')
    assert {file.name for file in folder.iterdir()} == {truth.name for _, truth in items}
    independent = MulticlassJaccardIndex(21, average='none', ignore_index=VOID)
    for _, truth in items: independent.update(*(torch.tensor(read_mask(file))[None].long() for file in (folder/truth.name, truth)))
    found = result.table.iou.notna().tolist()  # classes that the photographs or the predictions have
    counted = independent.compute()[torch.tensor(found)]
    assert counted.tolist() == pytest.approx(result.table.iou[found].tolist(), abs=1e-3)
    assert counted.mean().item() == pytest.approx(result.miou, abs=1e-3)


def test_padded_square(teacher, tree):
    "Images resized to long side 513 and padded with grey to a square; answers resized back to the mask"
    assert evaluate(teacher, tree, size=513, pad=True, progress=False).miou == pytest.approx(scores[1], abs=.003)
