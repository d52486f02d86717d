"The script for people with a GPU runs on a CPU too, in small."
import os, re, subprocess, sys
from pathlib import Path

import pytest
import torch

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
import gpu_check


def test_every_table_is_made_on_a_cpu():
    done = subprocess.run([sys.executable, root/'tools/gpu_check.py', '--device', 'cpu', '--tiny'], capture_output=True,
                          text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    tables = done.stdout.split('\n### ')
    assert len(tables) == 1 + len(gpu_check.PARTS) and 'all right' in tables[-1]
    lines = [line for table in tables[1:] for line in table.splitlines()[4:] if line.startswith('|')]
    assert len(lines) > 60 and not [line for line in lines if 'failed' in line or 'wrong' in line]
    skipped = [line for line in lines if 'skipped' in line]
    assert len(skipped) == 4 and all('compil' in line for line in skipped)


def run(): return gpu_check.Run(torch.device('cpu'), tiny=True, part='a part')


def test_an_error_is_one_line_and_the_others_go_on(capsys):
    this = run()
    def broken(): raise ValueError('of two\nlines | with a bar')
    this.row('first', broken)
    this.row('second', lambda: ['well'])
    assert capsys.readouterr().out == '| first | **failed**: ValueError: of two lines / with a bar |\n| second | well |\n'
    assert this.failed == ['a part: first']


def test_a_late_line_is_skipped_and_nothing_has_failed(capsys):
    this = run()
    this.deadline = 0
    this.row('late', lambda: pytest.fail('it ran'))
    assert 'skipped' in capsys.readouterr().out and not this.failed


def test_a_wrong_result_fails():
    this, exact = run(), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    near, far = [exact * 1.0001], [exact.flip(2)]
    for mode in (gpu_check.Mode(tf32=False), gpu_check.Mode()):
        assert 'wrong' not in gpu_check.compared(this, mode, near, [exact])
        assert 'wrong' in gpu_check.compared(this, mode, far, [exact])
    assert re.search('wrong', gpu_check.compared(this, gpu_check.Mode(), [exact * torch.nan], [exact]))
    assert len(this.failed) == 3
