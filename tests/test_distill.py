"""The callback among other callbacks, precisions, compilers and processes: what a notebook page has no room for."""
import gc
import subprocess
import sys

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import Learner
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import set_seed
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from camkd_nb.data import voc_dls
from camkd_nb.distill import CAMDistill, Distill
from camkd_nb.losses import IFV, AttentionTransfer, ChannelKD, ClassAttention, Distiller, PairwiseKD, PixelKD
from camkd_nb.metrics import MeanIoU, SegLoss
from camkd_nb.models import logits_of, toy_student, toy_teacher
from camkd_nb.toyvoc import toy_voc

every_term = [ClassAttention, PixelKD, AttentionTransfer, ChannelKD, PairwiseKD, IFV]


@pytest.fixture(scope='module')
def tree(tmp_path_factory): return toy_voc(tmp_path_factory.mktemp('toy'), n_train=32, n_valid=8, size=64)


@pytest.fixture(scope='module')
def teacher(): return toy_teacher(pretrained=True)


@pytest.fixture
def make(tree):
    def learner(student=None, **kwargs):
        set_seed(0, reproducible=True)
        dls = voc_dls(tree, size=64, bs=8, seed=0)
        set_seed(0)
        student = toy_student(7) if student is None else student() if not isinstance(student, nn.Module) else student
        return Learner(dls, student, loss_func=SegLoss(), metrics=MeanIoU(), **kwargs)
    return learner


def fit(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, **kwargs)
    return learn


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def column(learn, name): return [row[learn.recorder.metric_names.index(name) - 1] for row in learn.recorder.values]


class Autocast(Callback):
    "What `to_bf16` does on a GPU, on the CPU"
    order = 10
    def before_batch(self): self.context = torch.autocast('cpu', torch.bfloat16); self.context.__enter__()
    def after_loss(self): self.context.__exit__(None, None, None)
    def after_pred(self): self.learn.pred = self.pred.float()


def test_export_loads_in_a_fresh_process(make, teacher, tree, tmp_path):
    learn = fit(make(path=tmp_path, cbs=CAMDistill(teacher)))
    learn.export('student.pkl')
    image = next((tree / 'JPEGImages').glob('val*'))
    torch.save(learn.predict(image)[0].as_subclass(torch.Tensor), tmp_path / 'prediction.pth')
    code = f'''
import sys, torch
from fastai.learner import load_learner
learn = load_learner({str(tmp_path / "student.pkl")!r})
assert torch.equal(learn.predict({str(image)!r})[0].as_subclass(torch.Tensor), torch.load({str(tmp_path / "prediction.pth")!r}))
assert learn.distill.teacher is None
'''
    done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_learner_can_be_exported_and_fitted_again(make, teacher, tmp_path):
    class Stop(Callback):
        def after_pred(self):
            if self.training: raise KeyboardInterrupt
    learn = make(path=tmp_path, cbs=CAMDistill(teacher))
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=Stop())
    learn.export('interrupted.pkl'), torch.save(learn.model, tmp_path / 'student.pth')
    assert len(fit(learn).recorder.values) == 1


def in_place(model):
    model.compile(backend='aot_eager')
    return model
def wrapped(model): return torch.compile(model, backend='eager')


@pytest.mark.parametrize('compiled', [in_place, wrapped])
def test_a_compiled_student_trains_like_itself(make, teacher, compiled):
    torch.compiler.reset()
    plain = fit(make(), 2, cbs=CAMDistill(teacher, max_classes=None))
    learn = make()
    learn.model = compiled(learn.model)
    fit(learn, 2, cbs=CAMDistill(teacher, max_classes=None))
    torch.compiler.reset()
    assert column(learn, 'class_attention') == pytest.approx(column(plain, 'class_attention'), rel=1e-3)
    assert column(learn, 'train_loss') == pytest.approx(column(plain, 'train_loss'), rel=1e-3)


def test_trackers_stop_and_save(make, teacher, tmp_path):
    learn = make(path=tmp_path)
    trackers = [SaveModelCallback(monitor='mean_iou'), EarlyStoppingCallback(monitor='mean_iou', min_delta=2., patience=1), ReduceLROnPlateau(monitor='class_attention')]
    fit(learn, 9, cbs=[CAMDistill(teacher), *trackers])
    assert len(learn.recorder.values) == 2 and (tmp_path / 'models/model.pth').exists()


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_blended_masks_are_refused_by_name(make, teacher, mix):
    with pytest.raises(TypeError, match=f'{mix.__name__} blends'): fit(make(), cbs=[CAMDistill(teacher), mix()])


def test_a_cut_epoch_leaves_nothing(make, teacher):
    learn = fit(make(), 2, cbs=[CAMDistill(teacher), ShortEpochCallback(.5)])
    assert not any(m._forward_hooks for m in learn.model.modules())


def test_dictionary_outputs_on_both_sides(make):
    student = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7)
    source = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7)
    learn = make(student)
    fit(learn, cbs=Distill(source, [ClassAttention(layers=['backbone.16']), PixelKD()]))
    assert 0 < column(learn, 'class_attention')[0] <= 2


def test_channels_last_gives_the_same_terms(make, teacher):
    x, mask = (t.as_subclass(torch.Tensor) for t in make().dls.valid.one_batch())
    values = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        student = toy_student(7).to(memory_format=memory_format)
        distiller = Distiller(student, teacher.to(memory_format=memory_format), [term(1.) for term in every_term])
        with distiller: output = student(x.contiguous(memory_format=memory_format))
        values.append([value.item() for value, _ in distiller(x, mask, output).values()])
    teacher.to(memory_format=torch.contiguous_format)
    assert values[1] == pytest.approx(values[0], rel=1e-3)


def test_half_precision_stays_finite_for_200_steps(make, teacher):
    learn = make(cbs=[Distill(teacher, [term() for term in every_term]), Autocast()])
    fit(learn, 50)
    assert len(learn.recorder.losses) == 200 and torch.stack(learn.recorder.losses).isfinite().all()
    assert all(torch.tensor(row).isfinite().all() for row in learn.recorder.values)
    assert weights(learn).isfinite().all()


def test_memory_stays_flat(teacher):
    data = [(torch.randn(3, 33, 33), torch.randint(0, 7, (33, 33)))] * 2000
    learn = Learner(DataLoaders(DataLoader(data, bs=4), DataLoader(data[:4], bs=4)), toy_student(7), loss_func=SegLoss())
    live = {}
    class Count(Callback):
        def after_batch(self):
            if not self.training or self.iter not in (100, 499): return
            gc.collect()
            tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
            live[self.iter] = len(tensors), sum(t.grad_fn is not None for t in tensors), sum(t.nbytes for t in tensors)
    fit(learn, cbs=[CAMDistill(teacher, layers=['backbone.layer4']), Count()])
    assert live[499][0] - live[100][0] <= 800 + 8, live  # the recorder keeps a loss of each step, and one tensor behind it
    assert live[499][1] == live[100][1], live  # a tensor with a history would keep its whole graph
    assert live[499][2] - live[100][2] < 2**18, live  # bytes; a batch has 2**16
