"""Pictures, lists and arrays are read exactly, or refused by name: never misread."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from little_tree import exif_of, make_tree, photo, save_mask, save_photo, shape
from PIL import Image

from camkd_nb.data import voc_dls
from camkd_nb.evaluate import evaluate, predict
from camkd_nb.photos import read_photo
from camkd_nb.samples import VOCImage, VOCMask
from camkd_nb.trees import voc_ids
from camkd_nb.voc import read_image, read_mask, voc_classes, voc_items

turned = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: np.rot90,
          7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
rng = np.random.default_rng(0)
odd = rng.integers(0, 256, (6, 9, 3)).astype(np.uint8)  # no symmetry


@pytest.mark.parametrize('tag', [1, *turned, 0, 9])
@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
def test_orientation(tmp_path, tag, suffix):
    "As stored under the tag, read as shown, from a file, its bytes and an opened picture; a tag of no meaning turns nothing"
    file = tmp_path / f'x.{suffix}'
    Image.fromarray(np.ascontiguousarray(turned.get(tag, np.asarray)(odd))).save(file, exif=exif_of(tag), **{'lossless': True} if suffix == 'webp' else {})
    for source in (file, file.read_bytes(), Image.open(file)): assert (read_photo(source) == odd).all()


def test_a_phone_file_with_a_preview_is_read(tmp_path):
    Image.fromarray(odd).save(tmp_path / 'x.mpo', save_all=True, append_images=[Image.fromarray(odd[:3])])
    assert read_image(tmp_path / 'x.mpo').shape == odd.shape


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB', 'I;16', 'PA'])
def test_modes(tmp_path, mode):
    picture = Image.new(mode, (5, 4), 30000 if mode == 'I;16' else 0 if mode != 'I;16' else None)
    read = read_photo(picture)
    assert read.shape == (4, 5, 3) and read.dtype == np.uint8 and len(np.unique(read.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize('name, values, expected', [
    ('16 bits', np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]), ('floats', np.array([[0, .5, 1]], np.float32), [0, 128, 255])])
def test_deep_photos(tmp_path, name, values, expected):
    Image.fromarray(values).save(tmp_path / 'x.tif')
    assert read_image(tmp_path / 'x.tif')[0, :, 0].tolist() == expected


@pytest.mark.parametrize('values', [np.array([[0, 4095]], np.uint16), np.array([[0, 255]], np.float32), np.array([[0, 70000]], np.int32),
                                    np.array([[0, np.nan]], np.float32), np.array([[-1, 1]], np.float32)])
def test_unknown_ranges_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / 'x.tif')
    with pytest.raises(ValueError, match='x.tif'): read_image(tmp_path / 'x.tif')
    with pytest.raises(ValueError, match='the photo'): read_photo(values)


def chunk(name, data): return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def test_broken_files_are_named(tmp_path, monkeypatch):
    save_photo(tmp_path / 'whole.png')
    data = (tmp_path / 'whole.png').read_bytes()
    text = chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(2_000_000)))
    (tmp_path / 'text.png').write_bytes(data[:33] + text + data[33:])
    for name, content in (('cut', data[:-40]), ('empty', b''), ('words', b'no picture'), ('header', data[:20])): (tmp_path / f'{name}.png').write_bytes(content)
    for name in ('cut', 'empty', 'words', 'header', 'text'):
        for read in (read_image, read_mask):
            with pytest.raises(ValueError, match=f'{name}.png: not a readable image'): read(tmp_path / f'{name}.png')
    with pytest.raises(ValueError, match='save it again without texts'): read_image(tmp_path / 'text.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(ValueError, match='whole.png.*MAX_IMAGE_PIXELS'): read_image(tmp_path / 'whole.png')


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
@pytest.mark.parametrize('mode', ['L', 'P'])
def test_masks_of_few_bits(tmp_path, bits, mode):
    values = (np.arange(12).reshape(3, 4) % 2**bits).astype(np.uint8)
    picture = Image.fromarray(values)
    if mode == 'P': picture.putpalette(bytes(range(48)))
    picture.save(tmp_path / 'x.png', bits=bits)
    opened = Image.open(tmp_path / 'x.png')
    opened.load()
    for source in (tmp_path / 'x.png', Image.open(tmp_path / 'x.png'), opened): assert (read_mask(source) == values).all()


def test_masks_that_are_none(tmp_path):
    Image.fromarray(shape).save(tmp_path / 'jpeg.png', format='JPEG')
    Image.fromarray(photo).save(tmp_path / 'rgb.png')
    for mode in ('LA', 'RGBA'): Image.fromarray(photo).convert(mode).save(tmp_path / f'{mode}.png')
    Image.fromarray(shape.astype(np.uint16) * 26001).save(tmp_path / 'ids.png')
    for name, words in (('jpeg', 'format JPEG'), ('rgb', r'voc_gather\(..., colours='), ('LA', "mode 'LA'"), ('RGBA', "mode 'RGBA'"), ('ids', 'up to|to 26001')):
        with pytest.raises(ValueError, match=f'{name}.png.*({words})'): read_mask(tmp_path / f'{name}.png')
    Image.fromarray(shape.astype(np.uint16)).save(tmp_path / 'deep.png')
    assert (read_mask(tmp_path / 'deep.png') == shape).all()


net = torch.nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
net.weight.copy_(torch.eye(3)[..., None, None])


def test_arrays_of_any_layout():
    "Whatever is not refused gives the same answer"
    colours = rng.integers(0, 256, (7, 11, 3)).astype(np.uint8)
    whole = predict(net, colours)
    same = [colours.transpose(2, 0, 1), colours / 255, (colours / 255).astype(np.float16), colours.astype(np.int64), np.dstack([colours, colours[..., :1]]), np.asfortranarray(colours),
            colours[::-1][::-1], torch.tensor(colours), torch.tensor(colours).permute(2, 0, 1), torch.tensor(colours / 255).permute(2, 0, 1).requires_grad_(), Image.fromarray(colours)]
    for given in same: assert (predict(net, given) == whole).mean() > .97  # float16 rounds colours
    grey = colours[..., 0]
    for given in (grey, grey[..., None], grey[None], torch.tensor(grey), Image.fromarray(grey)): assert (read_photo(given) == grey[..., None]).all()
    for wrong in (colours[None], torch.tensor(colours)[None], colours.astype(float), (torch.tensor(colours) / 255 - .45) / .22, colours[..., :2], colours[:0], colours.astype('U3'), colours.astype(np.uint16)):
        with pytest.raises(ValueError): predict(net, wrong)
    for wrong in (None, 3, [colours], object()):
        with pytest.raises(TypeError, match='give a file'): predict(net, wrong)


def test_items_of_memory():
    for given in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), torch.zeros(3, 4, 4), Image.new('CMYK', (4, 4))): assert VOCImage.create(given).mode == 'RGB'
    assert np.asarray(VOCMask.create(np.array([[0, 255]]))).dtype == np.uint8
    with pytest.raises(TypeError): VOCMask.create(np.array([[.5]]))


def listed(tmp_path, content):
    root = make_tree(tmp_path)
    (root / 'ImageSets/Segmentation/train.txt').write_bytes(content)
    return root


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
def test_lists_of_any_editor(tmp_path, encoding):
    root = listed(tmp_path, '# mine\r\n\r\n a \r\nb\t\r\n'.encode(encoding))
    assert voc_ids(root, 'train') == ['a', 'b'] and len(voc_items(root, 'train')) == 2


@pytest.mark.parametrize('content', ['é\n'.encode('latin-1'), 'a\nb'.encode('utf-16-le'), b'a\0b\n', b'#a\n'])
def test_lists_that_are_not_text_name_the_line(tmp_path, content):
    with pytest.raises(ValueError, match='train.txt, line 1'): voc_ids(listed(tmp_path, content), 'train')


@pytest.mark.parametrize('id', ['../x', '/x', 'a/../../x', 'C:/x', 'a\\b', './a', 'a/', '/data/a.jpg /data/a.png'])
def test_ids_stay_in_the_tree(tmp_path, id):
    with pytest.raises(ValueError, match='train.txt, line 2.*one id'): voc_items(listed(tmp_path, f'a\n{id}\n'.encode()), 'train')


@pytest.mark.parametrize('line, advice', [('a -1', 'second column'), ('a.jpg', 'no suffix'), ('z', 'take their ids out')])
def test_ids_without_files(tmp_path, line, advice):
    with pytest.raises(ValueError, match=advice): voc_items(listed(tmp_path, f'{line}\n'.encode()), 'train')


@pytest.mark.parametrize('suffix', ['.jpg', '.jpeg', '.JPG', '.png', '.webp', '.tif', '.bmp'])
def test_photos_of_any_suffix(tmp_path, suffix):
    root = make_tree(tmp_path, ('img (1)', 'city/0001', 'e\u0301'), suffix=suffix)
    (root / 'ImageSets/Segmentation/val.txt').write_text('é', encoding='utf-8')  # in one character, in the folder in two
    (root / 'JPEGImages/._img (1).jpg').write_bytes(b'\0')
    assert voc_dls(root, size=32, bs=2).train.one_batch()[0].shape == (2, 3, 32, 32) and len(voc_items(root, 'val')) == 1


def test_two_photos_of_one_id(tmp_path):
    root = make_tree(tmp_path)
    save_photo(root / 'JPEGImages/a.png')
    with pytest.raises(ValueError, match='JPEGImages/a: a.jpg and a.png have one id'): voc_items(root, 'train')


def test_masks_are_png(tmp_path):
    root = make_tree(tmp_path)
    (root / 'SegmentationClass/a.png').rename(root / 'SegmentationClass/a.jpg')
    with pytest.raises(ValueError, match='a.jpg is there, but a mask must be a PNG'): voc_items(root, 'train')


@pytest.mark.parametrize('name, text', [('class_names.txt', '_background_\nmug\n'), ('labels.txt', '__ignore__\n_background_\nmug\n'),
                                        ('labelmap.txt', '# label:color_rgb:parts:actions\n_background_:0,0,0::\nmug:128,0,0::\n')])
def test_names_of_other_tools(tmp_path, name, text):
    root = make_tree(tmp_path, classes=None)
    (root / name).write_text(text)
    assert voc_classes(root) == ['_background_', 'mug']


def test_names_that_are_not_text(tmp_path):
    root = make_tree(tmp_path)
    (root / 'classes.txt').write_bytes('background\nvélo\n'.encode('latin-1'))
    with pytest.raises(ValueError, match='classes.txt, line 2'): voc_classes(root)


def test_predictions_of_ids_in_folders_are_kept_apart(tmp_path):
    root = make_tree(tmp_path / 'tree', ('z', 'x/a', 'y/a'), classes='background\nthing\nmore\n')
    (root / 'ImageSets/Segmentation/val.txt').write_text('x/a\ny/a\n')
    evaluate(net, root, save_to=tmp_path / 'out', progress=False)
    assert len([*(tmp_path / 'out').rglob('a.png')]) == 2


def test_random_crops_are_not_averaged(tmp_path):
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner
    assert ProgressCallback  # its module gives `Learner` its `no_bar`
    learn = Learner(voc_dls(make_tree(tmp_path, classes='background\nthing\nmore\n'), size=32, bs=2), net, opt_func=None)
    with pytest.raises(ValueError, match=r'predict\(learn.model, photo, flip=True'), learn.no_bar(): learn.tta()
    with learn.no_bar(): assert learn.get_preds()[0].shape == (1, 3, 32, 32)
