"The commands that the study's page gives: each script exists, and knows the options."
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest

root = Path(__file__).resolve().parents[1]
page = nbformat.read(root/'nbs/benchmarks/05_study.ipynb', as_version=4)
commands = [found for cell in page.cells if cell.cell_type == 'markdown' for found in re.findall(r'`python (nbs/results/\w+\.py) ([^`]*)`', cell.source)]


def test_every_script_has_its_command():
    assert {script for script, _ in commands} == {path.relative_to(root).as_posix() for path in (root/'nbs/results').glob('*.py')}


@pytest.mark.parametrize('script', sorted({script for script, _ in commands}))
def test_scripts_know_the_options_of_their_commands(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(root/'nbs/results')
    for what, options in {(rest.split()[0], tuple(re.findall(r'--[\w-]+', rest))) for name, rest in commands if name == script}:
        monkeypatch.setattr(sys, 'argv', [script, what, '--help'])
        with pytest.raises(SystemExit) as left: runpy.run_path(str(root/script), run_name='__main__')
        said = capsys.readouterr().out
        assert left.value.code == 0 and said.startswith('usage') and all(option in said for option in options)
