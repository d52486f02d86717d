"""A training process that is killed with signal 9, and started again."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

worker = Path(__file__).with_name('resume_worker.py')


def start(folder, how):
    env = {**os.environ, 'PYTHONPATH': str(worker.parents[1])}  # this checkout's package, not an installed one
    done = subprocess.run([sys.executable, worker, folder, how], env=env, text=True, capture_output=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    status, output = start(folder, 'whole')
    assert status == 0, output
    return folder


@pytest.mark.parametrize('how, epoch', [('epoch', 1), ('saving', 0)])
def test_resumed_fit_ends_like_the_whole_one(folder, how, epoch):
    assert start(folder, how)[0] == -signal.SIGKILL
    checkpoint = folder / 'models/checkpoint.pth'
    assert torch.load(checkpoint, weights_only=True)['epoch'] == epoch
    status, output = start(folder, 'resume')
    assert status == 0 and f'going on after epoch {epoch}' in output, output
    whole, resumed = (torch.load(folder / f'{name}.result', weights_only=False) for name in ('whole', 'resume'))
    for part in ('parameters', 'adapter'): assert torch.equal(whole[part], resumed[part])
    assert resumed['epochs'] == 4 and whole['hypers'] == resumed['hypers']
    assert not checkpoint.exists()
