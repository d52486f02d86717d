"""One process of several: distils a small student on its share of each batch. Forked for `test_distributed.py`."""
import os
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL, rank_distrib
from fastai.learner import Learner
from fastai.optimizer import SGD
from hint import Hint
from torch import nn

from camkd_nb.checkpoint import Checkpoint
from camkd_nb.distill import Distill
from camkd_nb.losses import AttentionTransfer, ChannelKD, ClassAttention, PixelKD
from camkd_nb.metrics import SegLoss
from camkd_nb.models import toy_student, toy_teacher
from camkd_nb.terms import Relative


def broadcast_on_cpu(self, indices, rank):
    "fastai sends the order of the samples through a GPU; gloo sends it from the CPU"
    indices = torch.tensor(indices)
    dist.broadcast(indices, rank)
    return indices.tolist()


class Unused(nn.Module):
    "A student with parameters that no forward pass touches"
    def __init__(self, model):
        super().__init__()
        self.backbone, self.head, self.model, self.idle = model.backbone, model.head, model, nn.Linear(3, 3)
    def forward(self, x): return self.model(x)


class OnEveryBatch(Callback):
    "The loss of each training batch, and the adapter before the first"
    order = 6
    def before_fit(self): self.seen, self.adapter = [], flat(self.distill.terms['hint'])
    def after_loss(self):
        if self.training: self.seen.append(self.learn.loss_grad.item())


class Dies(Callback):
    def before_batch(self):
        if self.training and self.epoch == 1: os._exit(3)


def frozen_norms(model):
    "Batch norm that does not depend on the batch, so that two half batches are one batch"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum, m.training, m.train = 0., False, lambda mode=True, m=m: m
    return model


def flat(model): return torch.cat([p.detach().flatten() for p in model.parameters()])
def hooks(model): return sum(len(m._forward_hooks) for m in model.modules())


def main(out, how, world):
    "`how`: 'used', 'unused' parameters, or 'dies'"
    if int(world) > 1: dist.init_process_group('gloo')
    distil(out, how == 'unused', how == 'dies', int(world))
    if dist.is_initialized(): dist.destroy_process_group()


def distil(out, unused, dies, world):
    torch.manual_seed(0)
    student = frozen_norms(toy_student(7))
    if unused: student = Unused(student)
    images, masks = torch.randn(16, 3, 64, 64), torch.stack([torch.randperm(16) % 7 for _ in range(16)])
    masks = masks.reshape(16, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)  # every image has the same classes
    masks[:, :8, :8] = 255
    order = range(16) if world > 1 else [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]  # a batch of one process: those of two, joined
    data = [(images[i], masks[i]) for i in order]
    dls = DataLoaders(DataLoader(data, bs=8 // world, shuffle=False), DataLoader(data[:8], bs=8 // world))
    teacher = toy_teacher(7).eval()
    torch.manual_seed(1 + rank_distrib())  # the processes would make different adapters
    terms = [ClassAttention(.5, region='label', max_classes=None, layers=['backbone.layer3', 'backbone.layer4']), PixelKD(.5), AttentionTransfer(.5, ['backbone.layer4']),
             ChannelKD(Relative(.01, steps=3)), Hint(10.)]  # a fit that dies after two batches must go on measuring
    distill, batches = Distill(teacher, terms), OnEveryBatch()
    learn = Learner(dls, student, loss_func=SegLoss(), opt_func=SGD, lr=1e-3, path=Path(out).parent, cbs=[distill, batches])
    with learn.no_bar(), learn.no_logging():
        if world == 1: learn.fit(2)
        else:
            DistributedDL._broadcast = broadcast_on_cpu
            from accelerate import DistributedDataParallelKwargs
            handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if unused else []
            with learn.distrib_ctx(sync_bn=False, cpu=True, kwargs_handlers=handlers): learn.fit(2, cbs=[Checkpoint(f'{Path(out).stem}.pth'), *([Dies()] if dies else [])])
    torch.save(dict(weights=distill.weights, parameters=flat(learn.model), adapter=flat(terms[-1]), first=batches.adapter, groups=len(learn.opt.param_lists), losses=batches.seen,
                    hooks=hooks(learn.model) + hooks(teacher), wrapped=type(learn.model).__name__, columns=[list(row) for row in learn.recorder.values]), f'{out}.{rank_distrib()}')
