"""A fit that may kill itself: in the middle of an epoch, or while it writes its checkpoint. Forked for `test_resume.py`."""
import os
import signal
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.torch_core import set_seed
from hint import Hint

from camkd_nb.checkpoint import Checkpoint
from camkd_nb.data import voc_dls
from camkd_nb.distill import Distill
from camkd_nb.losses import ClassAttention
from camkd_nb.metrics import MeanIoU, SegLoss
from camkd_nb.models import toy_student, toy_teacher
from camkd_nb.terms import Relative
from camkd_nb.toyvoc import toy_voc


def die(): os.kill(os.getpid(), signal.SIGKILL)


class Killed(Callback):
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (2, 1): die()


def killed_while_saving():
    "The second checkpoint is written but for its end, and never gets its name"
    save, count = torch.save, []
    def half(state, name):
        save(state, name)
        count.append(name)
        if len(count) == 2:
            os.truncate(name, os.path.getsize(name) // 2)
            die()
    torch.save = half


def main(folder, how):
    folder = Path(folder)
    set_seed(0, reproducible=True)
    dls = voc_dls(toy_voc(folder / 'toy', n_train=32, n_valid=8, size=64), size=64, bs=8)
    learn = Learner(dls, toy_student(7), loss_func=SegLoss(), metrics=MeanIoU(), path=folder, model_dir=how if how == 'whole' else 'models')
    hint = Hint()
    terms = [ClassAttention(Relative(.3, steps=10)), hint]  # killed while the relative weight is still being measured
    cbs = [Distill(toy_teacher(pretrained=True), terms), EarlyStoppingCallback(patience=9)]
    if how == 'epoch': cbs += [Checkpoint(), Killed()]
    if how == 'saving': cbs += [Checkpoint()]; killed_while_saving()
    if how == 'resume': cbs += [Checkpoint()]
    learn.fit_one_cycle(4, 5e-3, cbs=cbs)
    parameters, adapter = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (learn.model, hint))
    torch.save(dict(parameters=parameters, adapter=adapter, epochs=len(learn.recorder.values), hypers=[dict(h) for h in learn.opt.hypers]), folder / f'{how}.result')

