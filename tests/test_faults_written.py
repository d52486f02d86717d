"""What is written appears whole, what the dead have left goes, and a command line that is wrong says so first."""
import hashlib, os, shutil, signal, subprocess, sys, tarfile, time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from camkd_nb import demo

from camkd_nb.evaluate import evaluate
from camkd_nb.files import draft_mark, remove_left_overs
from camkd_nb.toyvoc import toy_voc
from camkd_nb.weights import read_state

root = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != 'posix', reason='signals and locks of POSIX')


def start(code, *args): return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def hidden(folder): return sorted(path.name for path in folder.iterdir() if path.name[0] == '.')


draws = "import sys; from camkd_nb.toyvoc import toy_voc; print(toy_voc(sys.argv[1], n_train=int(sys.argv[2]), n_valid=5, size=32))"


@posix
def test_drawings_by_several_processes(tmp_path):
    "Two that draw one tree get it; one that is killed leaves a draft, which the next one removes, but not that of a living one"
    killed = start(draws, tmp_path/'long', 100_000)
    while not hidden(tmp_path): time.sleep(.05)
    both = [start(draws, tmp_path/'toy', 60) for _ in range(2)]
    assert [one.communicate(timeout=300)[0] for one in both] == [f'{tmp_path}/toy\n'] * 2
    assert len(hidden(tmp_path)) == 1  # of the one that lives
    killed.send_signal(signal.SIGKILL), killed.communicate()
    assert len(hidden(tmp_path)) == 1
    toy_voc(tmp_path/'next', n_train=2, n_valid=1, size=16)
    assert hidden(tmp_path) == [] and sorted(os.listdir(tmp_path)) == ['next', 'toy']


fetches = "import sys; from camkd_nb.download import voc_download; print(voc_download(sys.argv[1], urls=[sys.argv[2]], md5=sys.argv[3], progress=False))"


@posix
def test_two_downloads_at_once(tmp_path):
    "Both end with the tree, and nothing else is left"
    tree = toy_voc(tmp_path/'toy', n_train=300, n_valid=5, size=32)
    with tarfile.open(tmp_path/'voc.tar', 'w') as tar: tar.add(tree, 'VOCdevkit/VOC2012')
    checksum = hashlib.md5((tmp_path/'voc.tar').read_bytes()).hexdigest()
    both = [start(fetches, tmp_path/'data', (tmp_path/'voc.tar').as_uri(), checksum) for _ in range(2)]
    assert [one.communicate(timeout=300)[0] for one in both] == [f'{tmp_path}/data/VOCdevkit/VOC2012\n'] * 2
    assert os.listdir(tmp_path/'data') == ['VOCdevkit']
    assert len(os.listdir(tmp_path/'data/VOCdevkit/VOC2012/JPEGImages')) == 305


class Constant(nn.Module):
    "Background everywhere, until it stops"
    def __init__(self, n): super().__init__(); self.n = n
    def forward(self, x):
        self.n -= 1
        if self.n < 0: raise KeyboardInterrupt
        return torch.eye(7)[:1, :, None, None].expand(len(x), 7, *x.shape[-2:])


def test_predictions_appear_whole(tmp_path):
    tree = toy_voc(tmp_path/'toy', n_train=2, n_valid=4, size=16)
    with pytest.raises(KeyboardInterrupt): evaluate(Constant(2), tree, save_to=tmp_path/'out', progress=False)
    assert [path for path in (tmp_path/'out').rglob('*') if path.is_file()] == []
    evaluate(Constant(9), tree, save_to=tmp_path/'out', progress=False)
    assert len(list((tmp_path/'out').rglob('*.png'))) == 4 and [path for path in (tmp_path/'out').rglob('.*')] == []


def test_drafts_of_others_stay(tmp_path):
    "What belongs to a living process, to another machine, or to nobody that we know"
    own, dead = draft_mark(), subprocess.run([sys.executable, '-c', 'import sys; sys.path[0] = sys.argv[1]; from camkd_nb.files import draft_mark; print(draft_mark())', str(root)], capture_output=True, text=True).stdout.strip()
    names = [f'.a.{own}.part', f'.b.{own}', '.c.part', '.config-1234', '.d.abcdef-999999999-00000000']
    for name in (*names, f'.e.{dead}.part', f'.f.{dead}'): (tmp_path/name).mkdir()
    remove_left_overs(tmp_path)
    assert hidden(tmp_path) == names
    shutil.rmtree(tmp_path)
    remove_left_overs(tmp_path)  # a folder that is not there has none


def line_of(capsys, *words):
    "What the command says to wrong arguments: one line, status 2, and nothing trained"
    with mock.patch('camkd_nb.demo.compare', side_effect=AssertionError('trained')), pytest.raises(SystemExit) as left: demo.main([*words])
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.count('\n') == 1 and said.err.startswith('camkd-demo: ')
    return said.err


@pytest.fixture
def tree(tmp_path): return toy_voc(tmp_path/'toy', n_train=16, n_valid=4, size=32)


def test_damaged_teachers(capsys, tmp_path, tree):
    "Cut, of another network, a whole checkpoint, with code in it, not there: each is named, and nobody is told to read it unprotected"
    from camkd_nb.models import toy_student, toy_teacher
    torch.save(toy_teacher().state_dict(), whole := tmp_path/'whole.pth')
    torch.save(toy_student().state_dict(), tmp_path/'other.pth')
    torch.save({'epoch': 3, 'model': toy_teacher().state_dict()}, tmp_path/'more.pth')
    torch.save(toy_student(), tmp_path/'code.pth')
    torch.save([torch.ones(3)], tmp_path/'list.pth')
    (tmp_path/'cut.pth').write_bytes(whole.read_bytes()[:-1000])
    flipped = bytearray(whole.read_bytes()); flipped[len(flipped) // 2] ^= 1
    (tmp_path/'flipped.pth').write_bytes(flipped)
    (tmp_path/'text.pth').write_text('hello')
    (tmp_path/'empty.pth').write_bytes(b'')
    for name in ('cut', 'other', 'more', 'code', 'list', 'flipped', 'text', 'empty', 'nowhere'):
        said = line_of(capsys, '--data', str(tree), '--size', '32', '--teacher', f'toy_teacher={tmp_path}/{name}.pth', '--out', str(tmp_path/'o.png'))
        assert 'weights_only' not in said and (f'{name}.pth' in said or name == 'other' and 'toy_teacher' in said), said
    read_state(whole)


def test_arguments_are_tried_first(capsys, tmp_path, tree):
    "Before the teacher is scored, even"
    for words, part in (('--out x', '--out'), (f'--out {tmp_path}', '--out'), (f'--out {tmp_path}/none/a.png', '--out'), ('--lr nan', '--lr'), ('--lr inf', '--lr'),
                        ('--weight nan', '--weight'), ('--scale 1 nan', '--scale'), ('--device gpu', '--device'), ('--valid vall', 'vall'), ('--lr fast', '--lr'), (f'--save {tree}', '--save')):
        with mock.patch('camkd_nb.demo._examine', side_effect=AssertionError('asked')): assert part in line_of(capsys, '--data', str(tree), *words.split())


def test_no_home(capsys, tmp_path, monkeypatch):
    for name in ('CAMKD_CACHE', 'XDG_CACHE_HOME'): monkeypatch.delenv(name, raising=False)
    with mock.patch('pathlib.Path.home', side_effect=RuntimeError('Could not determine home directory.')):
        assert 'set CAMKD_CACHE' in line_of(capsys, '--out', str(tmp_path/'o.png'))
    (tmp_path/'file').write_text('x')
    monkeypatch.setenv('CAMKD_CACHE', str(tmp_path/'file/cache'))
    assert 'set CAMKD_CACHE' in line_of(capsys, '--out', str(tmp_path/'o.png'))


def test_a_stopped_picture_leaves_the_old_one(capsys, tmp_path, tree):
    "And what is said of it is true"
    (tmp_path/'o.png').write_text('old')
    words = ['--data', str(tree), '--size', '32', '--bs', '4', '--epochs', '1', '--out', str(tmp_path/'o.png')]
    halves = []
    def half(draft, content):
        halves.append(draft.write_text('half'))
        raise KeyboardInterrupt
    with mock.patch('pathlib.Path.write_bytes', half), pytest.raises(SystemExit) as left: demo.main(words)
    assert halves
    said = capsys.readouterr()
    assert left.value.code == 130 and said.err == 'camkd-demo: stopped, all seeds finished, no picture written\n' and 'mIoU in points' in said.out
    assert (tmp_path/'o.png').read_text() == 'old' and hidden(tmp_path) == []
    demo.main(words)
    assert (tmp_path/'o.png').read_bytes()[1:4] == b'PNG'


def test_the_list_that_is_scored(capsys, tmp_path, tree):
    "Scores with --valid are those of that list, also where it has a single image"
    (tree/'ImageSets/Segmentation/one.txt').write_text('val_000002\n')
    demo.main(['--data', str(tree), '--size', '32', '--bs', '4', '--epochs', '1', '--valid', 'one', '--out', str(tmp_path/'o.png'), '--save', str(tmp_path/'kept')])
    said = capsys.readouterr().out
    from camkd_nb.models import toy_student
    model = toy_student()
    model.load_state_dict(torch.load(tmp_path/'kept/student-seed0.pth', weights_only=True))
    score, whole = (100 * evaluate(model, tree, split, progress=False).miou for split in ('one', 'val'))
    assert said.splitlines()[-2].split()[1] == f'{score:.1f}' != f'{whole:.1f}'
