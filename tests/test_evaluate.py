"""`evaluate` on real Pascal VOC: the scores that others measured, and an independent count of the predictions it saves.

Needs the real images and the weights of a network trained on them; skipped where they are absent.
"""
import os
from pathlib import Path

import pytest, torch
from torchmetrics.classification import MulticlassJaccardIndex

from camkd_nb.evaluate import evaluate
from camkd_nb.models import deeplabv3_mobilenetv2_voc
from camkd_nb.voc import VOID, read_mask, voc_items, voc_real

voc = voc_real()
weights = voc and Path(os.environ.get('CAMKD_WEIGHTS') or voc.parents[1]/'weights')/'deeplabv3_mobilenetv2_voc.pth'
pytestmark = pytest.mark.skipif(not (weights and weights.exists()), reason='no real VOC 2012 with trained weights: set CAMKD_VOC to its folder')


@pytest.fixture(scope='module')
def teacher(): return deeplabv3_mobilenetv2_voc(weights)


def test_native_size_and_saved_predictions(teacher, tmp_path):
    "Two evaluations by others gave 0.7258; torchmetrics counts the saved pictures to the same figures, class by class"
    result = evaluate(teacher, voc, save_to=tmp_path, progress=False)
    assert result.miou == pytest.approx(.7258, abs=.003)
    folder, items = tmp_path/'results/VOC2012/Segmentation/comp6_val_cls', voc_items(voc, 'val')
    assert {file.name for file in folder.iterdir()} == {truth.name for _, truth in items}
    independent = MulticlassJaccardIndex(21, average='none', ignore_index=VOID)
    for _, truth in items: independent.update(*(torch.tensor(read_mask(file))[None].long() for file in (folder/truth.name, truth)))
    assert independent.compute().tolist() == pytest.approx(result.table.iou.tolist(), abs=1e-3)
    assert independent.compute().mean().item() == pytest.approx(result.miou, abs=1e-3)


def test_padded_square(teacher):
    "Images resized to long side 513 and padded with grey to a square; answers resized back to the mask"
    assert evaluate(teacher, voc, size=513, pad=True, progress=False).miou == pytest.approx(.7401, abs=.003)
