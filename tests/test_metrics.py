"""The loss and the metrics against PyTorch's and torchmetrics', in any precision and form, and what they refuse."""
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback  # noqa: F401, gives `Learner` its no_bar
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import TensorMask
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from camkd_nb.metrics import ConfusionMatrix, MeanIoU, SegLoss
from camkd_nb.voc import VOID


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def four_classes():
    mask = torch.randint(0, 4, (2, 8, 8))
    mask[:, :3] = VOID
    return torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True), mask


def many_classes():
    z, mask = torch.randn(4, 21, 16, 16), torch.randint(0, 21, (4, 16, 16))
    mask[torch.rand(mask.shape) < .2] = VOID
    return z, mask


def close(a, b, eps=1e-3): return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=eps, atol=eps)


weights = pytest.mark.parametrize('weight', [None, torch.tensor([1., 2., 3., 4.])])


@weights
def test_loss_and_gradient_are_those_of_pytorch(weight):
    z, mask = four_classes()
    ours, theirs = SegLoss(weight)(z, mask), F.cross_entropy(z.float(), mask, weight=weight, ignore_index=VOID)
    assert close(ours, theirs)
    a, b = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
    assert close(a / b.abs().max(), b / b.abs().max())


@weights
def test_sum_is_that_of_pytorch(weight):
    z, mask = four_classes()
    theirs, total = F.cross_entropy(z.float(), mask, weight=weight, ignore_index=VOID, reduction='sum'), SegLoss(weight, reduction='sum')
    assert close(total(z, mask) / theirs, 1)
    assert close(total({'out': z, 'aux': z}, mask) / theirs, 1.4)
    assert total(z, torch.full_like(mask, VOID)) == 0


def test_void_has_no_gradient():
    z, mask = four_classes()
    assert not torch.autograd.grad(SegLoss()(z, torch.full_like(mask, VOID)), z)[0].any()
    gradient, = torch.autograd.grad(SegLoss()(z, mask), z)
    assert not gradient[:, :, :3].any() and gradient[:, :, 3:].all()


def test_loss_of_each_image():
    z, mask = four_classes()
    losses = SegLoss(reduction='none')(z, torch.stack([mask[0], torch.full_like(mask[1], VOID)]))
    assert close(losses, torch.stack([SegLoss()(z[:1], mask[:1]), torch.tensor(0.)]))


def test_mixed_precision_gives_float32():
    z, mask = four_classes()
    with torch.autocast('cpu', torch.bfloat16): loss = SegLoss()(z.bfloat16(), mask)
    assert loss.dtype == torch.float32 and close(loss, SegLoss()(z, mask), 2e-2)


def test_what_fastai_asks_of_a_loss_takes_a_dict():
    (z, _), loss_func = four_classes(), SegLoss()
    assert close(loss_func.activation({'out': z}).sum(1), torch.ones(2, 8, 8))
    assert torch.equal(loss_func.decodes(loss_func.activation(z)), z.argmax(1))


def test_loss_refuses_by_name():
    z, mask = four_classes()
    for message, args in (('the logits have (2, 2) pixels and the mask has (8, 8)', (z[..., :2, :2], mask)),
                          ('found the label 5 with 4 classes', (z, mask.clamp(max=5))),
                          ('logits[None] and mask[None]', (z[0], mask[0]))):
        with pytest.raises(ValueError) as error: SegLoss()(*args)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="reduction='max': choose 'mean', 'sum' or 'none'"): SegLoss(reduction='max')
    total = SegLoss()
    total.reduction = 'max'
    with pytest.raises(ValueError, match="reduction='max'"): total(z, mask)


def test_counts_do_not_depend_on_batches_and_forms():
    z, mask = many_classes()
    at_once, one_by_one = ConfusionMatrix(21).update({'out': z}, TensorMask(mask)), ConfusionMatrix(21)
    for logits, labels in zip(z, mask): one_by_one.update(logits.argmax(0), labels)
    halves = [ConfusionMatrix(21).update(z[part], mask[part]) for part in (slice(0, 2), slice(2, 4))]
    assert torch.equal(at_once.matrix, one_by_one.matrix) and torch.equal((halves[0] + halves[1]).matrix, at_once.matrix)


def test_matrix_refuses_by_name():
    z, mask = many_classes()
    pred, truth = torch.tensor([[[0, 1, 1], [1, 0, 2]]]), torch.tensor([[[0, 0, 1], [1, 2, VOID]]])
    three = ConfusionMatrix(3).update(pred, truth)
    for message, ask in (('the logits have 21 classes, the confusion matrix has 20', lambda: ConfusionMatrix(20).update(z, mask.clamp(max=19))),
                         ('found the label 2 with 2 classes', lambda: ConfusionMatrix(2).update(pred, truth.clamp(max=1))),
                         ('one prediction a label', lambda: ConfusionMatrix(3).update(pred[:, :1], truth)),
                         ('2 names for 3 classes', lambda: three.table(['cat', 'dog'])),
                         ('21 and 3 classes: add matrices', lambda: ConfusionMatrix(21).update(z, mask) + three)):
        with pytest.raises(ValueError) as error: ask()
        assert message in str(error.value)


def test_scores_are_those_of_torchmetrics():
    "Classes 15 to 17 are neither true nor predicted: out of the mean in both, 0 in the list of torchmetrics and NaN in ours"
    z, mask = many_classes()
    few, z = mask.where((mask < 15) | (mask == VOID), 0), z.index_fill(1, torch.arange(15, 18), -100.)
    ours = ConfusionMatrix(21).update(z, few)
    assert close(ours.miou() / MulticlassJaccardIndex(21, ignore_index=VOID)(z, few), 1)
    assert close(ours.pixel_accuracy() / MulticlassAccuracy(21, average='micro', ignore_index=VOID)(z, few), 1)
    each = MulticlassJaccardIndex(21, ignore_index=VOID, average=None)(z, few)
    assert ours.iou()[15:18].isnan().all() and close(ours.iou().nan_to_num(0) / each.max(), each / each.max())
    assert each.mean() < .9 * ours.miou()


def test_predictions_and_losses_of_a_learner():
    truth = torch.zeros(2, 1, 100, dtype=torch.int64)
    truth[0, :, :90], truth[1, :, :10] = 1, 1
    pred = truth.clone()
    pred[1] = 0
    logits = F.one_hot(pred, 2).movedim(-1, 1).float()
    hand_on = nn.Conv2d(2, 2, 1, bias=False)
    nn.init.dirac_(hand_on.weight)
    dl = DataLoader(list(zip(logits, truth)), bs=1)
    learn = Learner(DataLoaders(dl, dl), hand_on, loss_func=SegLoss(), metrics=MeanIoU())
    with learn.no_bar(), learn.no_logging(): _, _, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
    assert torch.equal(decoded, pred) and close(losses, torch.stack([SegLoss()(logits[i:i+1], truth[i:i+1]) for i in range(2)]))
