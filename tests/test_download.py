"""`voc_download` and `voc_add_sbd` against a local server that misbehaves in every way that was thought of."""
import gzip
import hashlib
import http.server
import io
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from camkd_nb.check import voc_check
from camkd_nb.download import voc_add_sbd, voc_download
from camkd_nb.toyvoc import toy_voc
from camkd_nb.voc import voc_items, write_mask

base = 'VOCdevkit/VOC2012'
root = Path(__file__).resolve().parents[1]


class Server:
    "Serves `data`; the next answers break off after the numbers of bytes in `cuts`"
    def __init__(self, data, ranges=True, lie=0):
        self.data, self.ranges, self.lie, self.cuts, self.asked = data, ranges, lie, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == '/gone': return self.send_error(404)
                wanted = int((self.headers['Range'] or 'bytes=0-')[6:-1])
                outer.asked.append(wanted)
                start = wanted if outer.ranges else 0
                if start >= len(outer.data) > 0: return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header('Content-Length', str(len(outer.data) - start + outer.lie))
                self.end_headers()
                self.wfile.write(outer.data[start:][:outer.cuts.pop(0) if outer.cuts else None])

            def log_message(self, *args): pass

        self.http = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f'http://localhost:{self.http.server_port}/voc.tar'


@pytest.fixture
def serve():
    servers = []
    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]
    yield start
    for server in servers: server.http.shutdown()


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    tree, buffer = toy_voc(tmp_path_factory.mktemp('toy'), n_train=8, n_valid=4, size=64), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar: tar.add(tree, base)
    return buffer.getvalue()


def md5(data): return hashlib.md5(data).hexdigest()
def fetch(dest, server, data, **kwargs): return voc_download(dest, urls=[server.url], md5=md5(data), progress=False, **kwargs)
def left(dest): return sorted(p.relative_to(dest).as_posix() for p in dest.glob('*'))


def test_whole(tmp_path, serve, archive):
    server = serve(archive)
    tree = fetch(tmp_path, server, archive)
    assert tree == tmp_path / base and len(voc_items(tree, 'train')) == 8
    assert voc_check(tree, progress=False).problems == [] and left(tmp_path) == ['VOCdevkit']
    assert fetch(tmp_path, server, archive) == tree and server.asked == [0]


def test_goes_on_after_a_cut(tmp_path, serve, archive):
    server = serve(archive)
    server.cuts = [10_000]
    assert fetch(tmp_path, server, archive).is_dir() and server.asked == [0, 10_000]


def test_goes_on_in_a_later_call(tmp_path, serve, archive):
    server = serve(archive)
    server.cuts = [10_000, 5_000]
    with pytest.raises(ConnectionError, match='Call again to go on'): fetch(tmp_path, server, archive)
    assert left(tmp_path) == ['VOC2012.tar.part']
    assert fetch(tmp_path, server, archive).is_dir() and server.asked == [0, 10_000, 15_000]


def test_a_server_that_cannot_continue_starts_again(tmp_path, serve, archive):
    server = serve(archive, ranges=False)
    server.cuts = [10_000]
    assert voc_check(fetch(tmp_path, server, archive), progress=False).problems == []


def test_a_truncated_file_is_not_unpacked(tmp_path, serve, archive):
    server = serve(archive[:-5_000], lie=5_000)
    with pytest.raises(ConnectionError, match='the connection ended after'): fetch(tmp_path, server, archive)
    assert not (tmp_path / base).exists()


def test_another_file_is_removed(tmp_path, serve, archive):
    server = serve(archive[:-1] + b'x')
    with pytest.raises(ConnectionError, match='another checksum'): fetch(tmp_path, server, archive)
    assert left(tmp_path) == []


def test_the_next_mirror_is_tried(tmp_path, serve, archive):
    server = serve(archive)
    gone = server.url.replace('voc.tar', 'gone')
    assert voc_download(tmp_path, urls=[gone, server.url], md5=md5(archive), progress=False).is_dir()


def test_nobody_answers(tmp_path):
    with pytest.raises(ConnectionError, match='put the archive at'):
        voc_download(tmp_path, urls=['http://localhost:9/voc.tar'], md5='0' * 32, progress=False)


def member(name, **fields):
    info = tarfile.TarInfo(name)
    for key, value in fields.items(): setattr(info, key, value)
    return info


@pytest.mark.parametrize('evil', [member('../outside'), member('/absolute/../../outside'), member(f'{base}/link', type=tarfile.SYMTYPE, linkname='/etc'),
                                  member(f'{base}/up', type=tarfile.SYMTYPE, linkname='../../../..'), member(f'{base}/device', type=tarfile.CHRTYPE)])
def test_a_hostile_archive_leaves_nothing(tmp_path, serve, archive, evil):
    buffer = io.BytesIO(archive)
    with tarfile.open(fileobj=buffer, mode='a') as tar: tar.addfile(evil)
    data, dest = buffer.getvalue(), tmp_path / 'in'
    with pytest.raises(ValueError, match='would write outside'): fetch(dest, serve(data), data)
    assert left(dest) == ['VOC2012.tar'] and left(tmp_path) == ['in']


def test_an_archive_without_the_tree(tmp_path, serve):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar: tar.addfile(member('readme'))
    data = buffer.getvalue()
    with pytest.raises(ValueError, match='holds no folder'): fetch(tmp_path, serve(data), data)
    assert not (tmp_path / base).exists()


@pytest.mark.parametrize('written', [str.upper, lambda md5: f'  {md5}\n', lambda md5: f'{md5[:16]} {md5[16:]}'], ids=['capitals', 'ends', 'groups'])
def test_a_checksum_as_people_write_it(tmp_path, serve, archive, written):
    assert voc_download(tmp_path, urls=[serve(archive).url], md5=written(md5(archive)), progress=False).is_dir()


def test_no_checksum_at_all(tmp_path, serve, archive):
    server = serve(archive)
    with pytest.raises(ValueError, match="md5='crc 12': give the 32"): voc_download(tmp_path, urls=[server.url], md5='crc 12', progress=False)
    assert server.asked == [] and left(tmp_path) == []


def packed(*members, archive=b'', mode='w'):
    buffer = io.BytesIO(archive)
    with tarfile.open(fileobj=buffer, mode='a' if archive else mode) as tar:
        for one in members: tar.addfile(one, io.BytesIO(bytes(one.size)))
    return buffer.getvalue()


deep = [member('/'.join([base, *['d'] * n]), type=tarfile.DIRTYPE, mode=0o755) for n in range(1, 1001)]
unfit = {
    'a thousand folders, one by one': (deep, 'folders in one another'),
    'a thousand folders in one name': ([member(base + '/dir' * 1000)], 'folders in one another'),
    'a long name': ([member(f'{base}/' + 'n' * 300)], 'cannot be unpacked'),
    'a link to nothing': ([member(f'{base}/link', type=tarfile.SYMTYPE, linkname='nobody')], 'link leads to nobody'),
    'a link to itself': ([member(f'{base}/link', type=tarfile.SYMTYPE, linkname='link')], 'link leads to link'),
    'a hard link to nothing': ([member(f'{base}/link', type=tarfile.LNKTYPE, linkname=f'{base}/nobody')], 'nobody'),
    'a link to what is not kept': ([member('other'), member(f'{base}/link', type=tarfile.SYMTYPE, linkname='../../other')], 'which is not in the tree'),
    'a file for a folder': ([member(f'{base}/JPEGImages')], 'cannot be unpacked'),
}


@pytest.mark.parametrize('name', unfit)
def test_an_archive_that_makes_no_tree(tmp_path, serve, archive, name):
    "The error names the archive and says what to do, also in a second call, and nothing is half unpacked"
    members, what = unfit[name]
    data = packed(*members, archive=archive)
    for _ in range(2):
        with pytest.raises(ValueError, match=what) as said: fetch(tmp_path, serve(data), data)
        assert str(said.value).startswith('VOC2012.tar: ') and f'remove {tmp_path}/VOC2012.tar' in str(said.value)
        assert left(tmp_path) == ['VOC2012.tar']


def test_no_archive_or_no_tree(tmp_path, serve, archive):
    "With the right checksum all the same"
    squeezed = gzip.compress(archive)
    wrong = bytearray(squeezed); wrong[len(wrong) // 2] ^= 255
    link = packed(member('tree/a'), member('VOCdevkit', type=tarfile.DIRTYPE, mode=0o755), member(base, type=tarfile.SYMTYPE, linkname='../tree'))
    cases = {b'hello': 'no tar', b'': 'no tar', b'<html>' * 999: 'no tar', squeezed[:-len(squeezed) // 3]: 'archive', bytes(wrong): 'archive',
             packed(member(f'{base}/JPEGImages/a.jpg')): 'lacks SegmentationClass, ImageSets', packed(member(base)): 'no folder', link: 'lacks JPEGImages'}
    for n, (data, what) in enumerate(cases.items()):
        with pytest.raises(ValueError, match=what) as said: fetch(tmp_path / str(n), serve(data), data)
        assert 'remove' in str(said.value) and left(tmp_path / str(n)) == ['VOC2012.tar']


def test_links_inside_the_tree_are_fine(tmp_path, serve, archive):
    "Links to files, to folders and through them, soft and hard"
    links = [member(f'{base}/again', type=tarfile.SYMTYPE, linkname='JPEGImages'), member(f'{base}/list', type=tarfile.SYMTYPE, linkname='again/../ImageSets'),
             member(f'{base}/hard', type=tarfile.LNKTYPE, linkname=f'{base}/ImageSets/Segmentation/train.txt')]
    data = packed(*links, archive=archive)
    tree = fetch(tmp_path, serve(data), data)
    assert len(list((tree / 'again').iterdir())) == 12 and (tree / 'list/Segmentation/train.txt').read_text() == (tree / 'hard').read_text()


def test_no_room(tmp_path, serve, archive, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(1, 1, len(archive)))
    server = serve(archive)
    with pytest.raises(OSError, match='Make room'): fetch(tmp_path, server, archive)
    assert left(tmp_path) == []


def test_an_archive_put_there_by_hand(tmp_path, serve, archive):
    server = serve(archive)
    (tmp_path / 'VOC2012.tar').write_bytes(archive[:-1] + b'x')
    with pytest.raises(ValueError, match='its checksum is not'): fetch(tmp_path, server, archive)
    (tmp_path / 'VOC2012.tar').write_bytes(archive)
    assert fetch(tmp_path, server, archive).is_dir() and server.asked == []


@pytest.fixture
def sbd(tmp_path, archive):
    "A tree whose val image 'c' must stay out of the list, and an archive in SBD's layout with masks for two of three photos"
    root = tmp_path / 'VOC2012'
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'): (root / folder).mkdir(parents=True)
    for id in 'abc': Image.new('RGB', (8, 6)).save(root / f'JPEGImages/{id}.jpg')
    for id in 'ac': write_mask(np.ones((6, 8), int), root / f'SegmentationClass/{id}.png')
    for split, id in (('train', 'a'), ('val', 'c')): (root / f'ImageSets/Segmentation/{split}.txt').write_text(id)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for id in 'bc':
            savemat(tmp_path / f'{id}.mat', {'GTcls': {'Segmentation': np.full((6, 8), 2, np.uint8)}})
            tar.add(tmp_path / f'{id}.mat', f'benchmark_RELEASE/dataset/cls/{id}.mat')
    return root, buffer.getvalue()


def test_sbd_adds_and_never_replaces(sbd, serve):
    root, data = sbd
    server = serve(data)
    server.cuts = [100]
    before = {file: (root / f'SegmentationClass/{file}').read_bytes() for file in ('a.png', 'c.png')}
    listed = voc_add_sbd(root, urls=[server.url], md5=md5(data), progress=False)
    assert server.asked == [0, 100] and listed.read_text().split() == ['a', 'b']
    assert all((root / f'SegmentationClass/{file}').read_bytes() == old for file, old in before.items())
    assert {problem.what[:7] for problem in voc_check(root, progress=False).problems} == {'no mask'}  # of most classes
    assert not (root / 'SBD.tgz').exists()
    assert voc_add_sbd(root) == listed and server.asked == [0, 100]


def test_sbd_goes_on_after_a_stop(sbd, serve, monkeypatch):
    root, data = sbd
    server = serve(data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr('camkd_nb.download.write_mask', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        voc_add_sbd(root, urls=[server.url], md5=md5(data), progress=False)
    assert not (root / 'ImageSets/Segmentation/trainaug.txt').exists()
    assert voc_add_sbd(root, urls=[server.url], md5=md5(data), progress=False).read_text().split() == ['a', 'b']
    assert server.asked == [0]


def test_sbd_wants_the_whole_tree(sbd, serve):
    root, data = sbd
    (root / 'JPEGImages/b.jpg').unlink()
    with pytest.raises(ValueError, match='lacks b.jpg'): voc_add_sbd(root, urls=[serve(data).url], md5=md5(data), progress=False)


def test_an_archive_that_is_not_sbd(sbd, serve):
    "No tar, no masks, a cut one, a file that is no mask: the tree stays as it was"
    root, data = sbd
    before = sorted(root.rglob('*'))
    broken = packed(member('dataset/cls/b.mat'), mode='w:gz')
    for wrong, what in ((b'hello', 'no tar'), (packed(member('readme')), 'holds no masks'), (data[:-40], 'archive'), (broken, 'b.mat is no mask')):
        with pytest.raises(ValueError, match=what) as said: voc_add_sbd(root, urls=[serve(wrong).url], md5=md5(wrong), progress=False)
        assert str(said.value).startswith('SBD.tgz: ') and f'remove {root}/SBD.tgz' in str(said.value)
        (root / 'SBD.tgz').unlink()
        assert sorted(root.rglob('*')) == before
    with pytest.raises(ValueError, match='no mask'):  # the one before is not kept either
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode='w') as tar:
            tar.add(root.parent / 'b.mat', 'cls/b.mat'), tar.addfile(member('cls/a.mat'))
        (root / 'SegmentationClass/a.png').unlink()
        voc_add_sbd(root, urls=[serve(buffer.getvalue()).url], md5=md5(buffer.getvalue()), progress=False)
    assert [file.name for file in (root / 'SegmentationClass').iterdir()] == ['c.png']


def test_what_a_killed_process_left_is_removed(tmp_path, serve, archive):
    (tmp_path / '.unpacking-dead/VOCdevkit').mkdir(parents=True)
    fetch(tmp_path, serve(archive), archive)
    assert left(tmp_path) == ['VOCdevkit']


@pytest.mark.parametrize('module', ['voc', 'check', 'download'])
def test_data_can_be_checked_without_torch(module):
    code = f"import camkd_nb.{module}, sys; assert not {{'torch', 'torchvision', 'fastai'}} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=root)
