"""A training process that is killed with signal 9, and started again."""
import os
import signal

import pytest
import torch
from warm import Warm

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='forks and signals')


@pytest.fixture(scope='module')
def start():
    warm = Warm('resume_worker')
    def start(*args):
        [status], output = warm.run(*args)
        return status, output
    yield start
    warm.close()


@pytest.fixture(scope='module')
def folder(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    status, output = start(folder, 'whole')
    assert status == 0, output
    return folder


@pytest.mark.parametrize('how, epoch', [('epoch', 1), ('saving', 0)])
def test_resumed_fit_ends_like_the_whole_one(start, folder, how, epoch):
    assert start(folder, how)[0] == -signal.SIGKILL
    checkpoint = folder / 'models/checkpoint.pth'
    assert torch.load(checkpoint, weights_only=True)['epoch'] == epoch
    status, output = start(folder, 'resume')
    assert status == 0 and f'going on after epoch {epoch}' in output, output
    whole, resumed = (torch.load(folder / f'{name}.result', weights_only=False) for name in ('whole', 'resume'))
    for part in ('parameters', 'adapter'): assert torch.equal(whole[part], resumed[part])
    assert resumed['epochs'] == 4 and whole['hypers'] == resumed['hypers']
    assert not checkpoint.exists()
