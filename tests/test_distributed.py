"""Distillation in two processes, as torchrun, fastai and Accelerate do it, against one process on the joined batches."""
import os
import socket

import pytest
import torch
from warm import Warm

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='forks')


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def start():
    pytest.importorskip('accelerate')
    warm = Warm('distributed_worker')
    def start(out, how, n, fails=False):
        statuses, output = warm.run(out, how, n, n=n, MASTER_ADDR='localhost', MASTER_PORT=str(free_port()))
        assert all((status != 0) == fails for status in statuses), output
    yield start
    warm.close()


@pytest.mark.parametrize('parameters', ['used', 'unused'])
def test_two_processes_are_one(start, tmp_path, parameters):
    start(tmp_path / 'one', parameters, 1)
    start(tmp_path / 'two', parameters, 2)
    one, first, second = (torch.load(tmp_path / name) for name in ('one.0', 'two.0', 'two.1'))
    assert torch.equal(first['parameters'], second['parameters'])
    assert first['weights'] == second['weights'] and 0 < first['weights']['channel_kd'] == pytest.approx(one['weights']['channel_kd'], rel=.02)
    # A term counts the classes of its own process that the teacher sees at all, hence not to the last bit.
    assert (first['parameters'] - one['parameters']).abs().max() < 1e-4
    assert torch.equal(first['adapter'], second['adapter'])
    assert torch.equal(first['first'], one['first']) and (first['adapter'] - one['adapter']).norm() < 1e-3 * (one['adapter'] - one['first']).norm()
    joined = [(a + b) / 2 for a, b in zip(first['losses'], second['losses'])]
    assert joined == pytest.approx(one['losses'], rel=2e-3) and len(joined) == 4
    for state in (first, second):
        assert state['hooks'] == 0 and state['groups'] == 1 and state['wrapped'] == one['wrapped']
    assert not list(tmp_path.rglob('*.pth'))  # the first process kept a checkpoint, and took it away at the end


def test_two_processes_go_on_after_they_died(start, tmp_path):
    start(tmp_path / 'whole', 'used', 2)
    start(tmp_path / 'again', 'dies', 2, fails=True)
    assert [p.name for p in tmp_path.rglob('*.pth')] == ['again.pth']
    start(tmp_path / 'again', 'used', 2)
    whole, first, second = (torch.load(tmp_path / name) for name in ('whole.0', 'again.0', 'again.1'))
    for part in ('parameters', 'adapter'): assert torch.equal(first[part], second[part]) and torch.equal(first[part], whole[part])
