"""Files cut short, disks that are full, processes that are killed: what is finished stays, and what is not is said."""
import json, os, subprocess, sys, warnings
from pathlib import Path

import pytest
from torch import nn

from camkd_nb.rows import COLUMNS, append_row
from camkd_nb.study import Study, read_runs, run_study
from camkd_nb.training import Recipe

root = Path(__file__).resolve().parents[1]


def row(seed, **other):
    "A row as `run_study` writes it, with all that makes CSV difficult"
    return {'setting': 'pspnet, "100" images', 'method': 'größer\nals', 'seed': seed, 'miou': .29901, 'seconds': 137.7, 'device': 'cpu',
            'class_iou': json.dumps({'Schaf': .5}), 'terms': '{}', 'options': json.dumps({'recipe': {'tree': '画像'}}), 'versions': 'camkd_nb 0.0.1, torch 2.14.1, fastai 2.8'} | other


def file_of(folder, *rows):
    for one in rows: append_row(folder/'runs.csv', one)
    return folder/'runs.csv'


def quietly(read, file):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return read(file)


def python(code, *args, **env):
    "Run in a process of its own, from the root"
    return subprocess.run([sys.executable, '-W', 'error::EncodingWarning', '-c', code, *map(str, args)], capture_output=True, text=True, encoding='utf-8', cwd=root, env=os.environ | env, timeout=300)


plain = dict(setting='s', method='none', class_iou='[0.5, 0.5]', options='{}', versions='{}')  # no field but one in quotes
quoted = dict(setting='"', method=',', versions='a "quoted" text, "twice"\r\n')


@pytest.mark.parametrize('other', [{}, plain, quoted], ids=['real', 'plain', 'quoted'])
def test_every_cut_of_the_last_row(tmp_path, other):
    "The rows before it stay, it counts wholly or not at all, and one that is added is read"
    whole = file_of(tmp_path, *(row(seed, **other) for seed in range(3))).read_bytes()
    start, file = len(file_of(tmp_path/'two', row(0, **other), row(1, **other)).read_bytes()), tmp_path/'cut.csv'
    for n in range(start, len(whole) + 1):
        file.write_bytes(whole[:n])
        before = quietly(read_runs, file)
        append_row(file, row(9, **other))
        after = quietly(read_runs, file)
        kept = [0, 1] if n < len(whole) - 1 or other and n < len(whole) else [0, 1, 2]
        assert [before.seed.tolist(), after.seed.tolist()] == [kept, [*kept, 9]], whole[:n]
        for runs in (before, after): assert runs.to_dict('records') == [row(seed, **other) for seed in runs.seed]
        assert before.seed.dtype == after.seed.dtype == 'int64'


def test_a_cut_row_is_named(tmp_path):
    file = file_of(tmp_path, row(0, **plain), row(1, **plain))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.warns(UserWarning, match=r'runs\.csv, line 3 is not a whole row'): read_runs(file)
    append_row(file, row(1, **plain))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # nothing of the cut row is left
        assert read_runs(file).seed.tolist() == [0, 1]


def test_every_hole_of_forty_bytes(tmp_path):
    "An editor takes something out of the middle: rows that it did not touch stay, and what is read was written"
    whole = file_of(tmp_path, *(row(seed) for seed in range(4))).read_bytes()
    ends = [len(file_of(tmp_path/f'{n}', *(row(seed) for seed in range(n))).read_bytes()) for n in range(1, 5)]
    header, file = whole.index(b'\n') + 1, tmp_path/'hole.csv'
    starts = [header, *ends[:-1]]
    for at in range(len(whole) - 40):
        file.write_bytes(whole[:at] + whole[at + 40:])
        untouched = [seed for seed, (start, end) in enumerate(zip(starts, ends)) if end <= at or start > at + 40]
        runs = quietly(read_runs, file)
        assert set(untouched) <= set(runs.seed), at
        append_row(file, row(9))
        assert {*untouched, 9} <= set(quietly(read_runs, file).seed), at


@pytest.mark.parametrize('change', [lambda text: text.rstrip(), lambda text: text.replace('\n', '\r\n'), lambda text: '\ufeff' + text, lambda text: text + '\n\n'],
                         ids=['no last line end', 'Windows', 'byte order mark', 'empty lines'])
def test_what_editors_do(tmp_path, change):
    "All rows stay, without a warning, and another is added"
    file = file_of(tmp_path, row(0, method='none'), row(1, method='none'))
    with open(file, encoding='utf-8', newline='') as opened: text = opened.read()
    with open(file, 'w', encoding='utf-8', newline='') as opened: opened.write(change(text))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_runs(file).to_dict('records') == [row(0, method='none'), row(1, method='none')]
        append_row(file, row(2, method='none'))
        assert read_runs(file).seed.tolist() == [0, 1, 2]


@pytest.mark.parametrize('more', [b',', b',,,'])
def test_empty_columns_of_a_spreadsheet(tmp_path, more):
    file = file_of(tmp_path, row(0, **plain), row(1, **plain))
    file.write_bytes(file.read_bytes().replace(b'\n', more + b'\n'))
    append_row(file, row(2, **plain))
    assert read_runs(file).to_dict('records') == [row(seed, **plain) for seed in range(3)]


def test_other_separators_are_named(tmp_path):
    file = file_of(tmp_path, row(0, **plain))
    file.write_bytes(before := file.read_bytes().replace(b',', b';'))
    for use in (lambda: read_runs(file), lambda: append_row(file, row(1))):
        with pytest.raises(ValueError, match='with commas between its columns'): use()
    assert file.read_bytes() == before


def test_other_bytes(tmp_path):
    "Another encoding, or zeros where the disk lost a block, cost that row alone"
    file = file_of(tmp_path, *(row(seed, **plain) for seed in range(3)))
    lines = file.read_bytes().splitlines(keepends=True)
    for bad in (lines[2].replace(b'none', b'gr\xf6\xdfer'), b'\0' * len(lines[2]), lines[2].replace(b'none', b'n\0ne')):
        file.write_bytes(lines[0] + lines[1] + bad + lines[3])
        assert set(quietly(read_runs, file).seed) - {2} <= {0} and 0 in set(quietly(read_runs, file).seed)


def test_columns_in_another_order(tmp_path):
    file = tmp_path/'runs.csv'
    file.write_text(','.join([*COLUMNS[::-1], 'note']) + '\n', encoding='utf-8')
    append_row(file, row(4))
    assert read_runs(file)[COLUMNS].to_dict('records') == [row(4)]


def test_any_locale(tmp_path):
    "UTF-8 where the system's texts are ASCII"
    code = 'import json, sys; from camkd_nb.rows import append_row; append_row(sys.argv[1], json.loads(sys.argv[2]))'
    done = python(code, tmp_path/'runs.csv', json.dumps(row(0)), LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    assert done.returncode == 0, done.stderr
    done = python('import sys; from camkd_nb.study import read_runs; print(ascii(read_runs(sys.argv[1]).method[0]))', tmp_path/'runs.csv', LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    assert done.stdout.strip() == ascii(row(0)['method'])


full_disk = """import json, resource, sys
from camkd_nb.rows import append_row
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
for _ in range(int(sys.argv[3])):
    try: append_row(sys.argv[1], json.loads(sys.argv[4]))
    except OSError as error: print(error.errno, flush=True)
"""


@pytest.mark.skipif(os.name != 'posix', reason='limits on files')
@pytest.mark.parametrize('room', [0, 1, 100, 150])
def test_full_disk(tmp_path, room):
    "So much room, and no more: the file is as before, and takes the row when there is room"
    file = file_of(tmp_path, row(0))
    before = file.read_bytes()
    done = python(full_disk, file, len(before) + room, 2, json.dumps(row(1)))
    assert (done.stdout.split(), done.stderr) == (['27', '27'], '')
    assert file.read_bytes() == before
    append_row(file, row(1))
    assert read_runs(file).seed.tolist() == [0, 1]


many = """import json, sys
from camkd_nb.rows import append_row
one = json.loads(sys.argv[3])
for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 40): append_row(sys.argv[1], one | {'seed': seed})
"""


def test_processes_take_turns(tmp_path):
    "Four write at once, from the first row on: each row is there once"
    file, long = tmp_path/'runs.csv', json.dumps(row(0, options=json.dumps({'text': 'x' * 20_000})))
    workers = [subprocess.Popen([sys.executable, '-c', many, str(file), str(100 * k), long], cwd=root) for k in range(4)]
    assert [worker.wait(300) for worker in workers] == [0] * 4
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        runs = read_runs(file)
    assert sorted(runs.seed) == [100 * k + n for k in range(4) for n in range(40)]
    assert file.read_bytes().count(b'setting,method') == 1


@pytest.mark.parametrize('file, keep', [('no/file/runs.csv', None), ('runs.csv', 'no/folder')], ids=['rows', 'students'])
def test_a_study_finds_out_before_it_trains(tmp_path, monkeypatch, file, keep):
    (tmp_path/'no').write_text('a file, not a folder')
    monkeypatch.setattr('camkd_nb.study.train', lambda *args: pytest.fail('it trained'))
    study = Study(tmp_path/file, 's', Recipe(tmp_path), nn.Identity, nn.Identity(), {'none': ()})
    with pytest.raises(OSError, match='/no'): run_study(study, [0], keep=keep and tmp_path/keep)


def test_seeds_given_twice_are_trained_once(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr('camkd_nb.study.train', lambda study, name, seed: trained.append(seed) or (nn.Identity(), 1., {}))
    monkeypatch.setattr('camkd_nb.study.row_of', lambda study, name, seed, *others: row(seed, setting='s', method=name))
    study = Study(tmp_path/'runs.csv', 's', Recipe(tmp_path), nn.Identity, nn.Identity(), {'none': ()})
    assert run_study(study, [0, 1, 0, 1]).seed.tolist() == trained == [0, 1]
