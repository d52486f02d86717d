"""`voc_check` finds what training would not notice: a right tree has no problem, a spoilt one has one line for each kind."""
import numpy as np
import pytest
import torch
from little_tree import exif_of, make_tree, photo, save_mask, save_photo, shape
from PIL import Image

from camkd_nb.check import voc_check
from camkd_nb.figures import show_attention
from camkd_nb.panels import largest_class
from camkd_nb.voc import voc_palette

rng = np.random.default_rng(0)


def problems(root): return [str(problem) for problem in voc_check(root, progress=False).problems]


def only(root, *words):
    "The one problem of a tree, which holds all words"
    found = problems(root)
    assert len(found) == 1 and all(word in found[0] for word in words), found


def noisy(file): save_photo(file, np.clip(photo + rng.integers(0, 40, photo.shape), 0, 255).astype(np.uint8))


def with_palette(colours, values=shape):
    def save(file):
        picture = Image.fromarray(values)
        picture.putpalette([number for colour in colours for number in colour])
        picture.save(file)
    return save


@pytest.mark.parametrize('ids', [('a', 'b', 'c'), ('img (1)', 'img (2)', 'img (3)'), ('x/a', 'x/b', 'y/c')])
def test_nothing_wrong(tmp_path, ids):
    root = make_tree(tmp_path, ids)
    for folder in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        for name in ('._a.jpg', '._train.txt', '.DS_Store', 'Thumbs.db'): (root / folder / name).write_bytes(b'\0\5\x16\7\xff')
    found = voc_check(root, progress=False)
    assert found.problems == [] and found.splits == {'train': 2, 'val': 1} and found.images.tolist() == [3, 3]
    assert 'times as much as beside them (median of 3 pairs' in str(found)


@pytest.mark.parametrize('values', [shape * 255, (1 - shape) * 255])
def test_objects_saved_as_255(tmp_path, values):
    only(make_tree(tmp_path, mask=lambda file: save_mask(file, values)), 'no mask holds thing (1 of 2 classes', 'mapping={255: 1}')


def test_without_names(tmp_path):
    only(make_tree(tmp_path, classes=None), 'no mask holds bicycle', '19 of 21 classes; the largest value is 1', 'no classes.txt')


def test_names_of_classes_nobody_has(tmp_path):
    only(make_tree(tmp_path, classes='background\nthing\ncup\n'), 'classes.txt: no mask holds cup')
    (tmp_path / 'labels.txt').write_text('background\nthing\n')
    assert 'labels.txt: its class names are not those of classes.txt' in problems(tmp_path)[0]


def test_a_second_list_of_names_that_cannot_be_read(tmp_path):
    "Training does not read it"
    root = make_tree(tmp_path)
    (root / 'labels.txt').write_text('1 thing\n2 cup\n')
    only(root, 'labels.txt: the numbers before the names are not 0, 1, 2')


def test_a_class_that_only_validation_has(tmp_path):
    root = make_tree(tmp_path)
    for id in 'ab': save_mask(root / f'SegmentationClass/{id}.png', shape * 0)
    only(root, 'train.txt: no mask of this list holds thing')


def test_void_that_is_an_object(tmp_path):
    cup = shape.copy()
    cup[25:38, 35:55] = 255
    only(make_tree(tmp_path, mask=lambda file: save_mask(file, cup)), 'a.png and 2 more', 'fills areas', 'mapping={255: index}')


def test_void_that_is_a_rim(tmp_path):
    cup = shape.copy()
    cup[4:21, 4:31] = 255
    cup[7:18, 7:28] = 1
    assert problems(make_tree(tmp_path, mask=lambda file: save_mask(file, cup))) == []


def test_palettes_in_another_order(tmp_path):
    only(make_tree(tmp_path, mask=with_palette([(128, 0, 0), (0, 0, 0)])), "VOC's colours in another order: 0 is drawn as 1, 1 is drawn as 0")


def test_palettes_of_others(tmp_path):
    assert problems(make_tree(tmp_path / 'own', mask=with_palette([(9, 9, 9), (250, 200, 0)]))) == []
    root = make_tree(tmp_path / 'mixed', mask=with_palette(voc_palette().tolist()))
    with_palette([(0, 0, 0), (0, 128, 0)])(root / 'SegmentationClass/b.png')
    only(root, 'SegmentationClass/b.png: its palette gives a class another colour', 'voc_gather(..., colours=...)')


def test_photos_whose_size_does_not_tell(tmp_path):
    def save(file): save_photo(file, np.ascontiguousarray(np.rot90(photo, 2)), exif=exif_of(3))
    only(make_tree(tmp_path, photo=save), 'a.jpg and 2 more', 'orientation tag 3')


def test_photos_on_their_side(tmp_path):
    "The mask as shown is right; the mask as stored is named"
    def save(file): save_photo(file, np.ascontiguousarray(np.rot90(photo)), exif=exif_of(6))
    assert problems(make_tree(tmp_path / 'shown', photo=save)) == []
    stored = make_tree(tmp_path / 'stored', photo=save, mask=lambda file: save_mask(file, np.ascontiguousarray(np.rot90(shape))))
    only(stored, 'lies on its side', 'without that tag')


def test_copies_across_splits(tmp_path):
    root = make_tree(tmp_path, ('a', 'b', 'c', 'd'), photo=noisy)
    assert problems(root) == []
    (root / 'JPEGImages/d.jpg').write_bytes((root / 'JPEGImages/a.jpg').read_bytes())
    only(root, 'JPEGImages/d.jpg: an image of val is in train, too, under another name', 'JPEGImages/a.jpg')


def test_masks_of_other_photos(tmp_path):
    def median(root): return float(voc_check(root, progress=False).notes[0].split('change ')[1].split()[0])
    right = median(make_tree(tmp_path / 'right', photo=noisy))
    turned = median(make_tree(tmp_path / 'turned', photo=noisy, mask=lambda file: save_mask(file, shape[::-1, ::-1].copy())))
    assert right > 1.3 > 1.15 > turned


def test_many_of_one_kind_are_one_line(tmp_path):
    root = make_tree(tmp_path, [f'i{k}' for k in range(30)], mask=lambda file: save_mask(file, shape * 11))
    found = voc_check(root, progress=False).problems
    assert len(found) == 2 and len(found[0].files) == 30 and 'and 29 more, such as' in str(found[0]) and 'voc_gather(..., void=11)' in str(found[0])


def test_one_bad_file_is_not_the_end(tmp_path, monkeypatch):
    root = make_tree(tmp_path, ('a', 'b', 'c', 'd'))
    (root / 'JPEGImages/a.jpg').write_bytes(b'no picture')
    save_photo(root / 'JPEGImages/b.png')
    (root / 'SegmentationClass/c.png').unlink()
    (root / 'ImageSets/Segmentation/other.txt').write_bytes(b'\xe9\n')
    (root / 'ImageSets/Segmentation/more.txt').write_text('../x\n')
    found = problems(root)
    assert len(found) == 5 and all(any(word in line for line in found) for word in ('other.txt: line 1', 'more.txt: line 1', 'a.jpg: not a readable', 'b.jpg and b.png have one id', 'c.png: missing'))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert any('MAX_IMAGE_PIXELS' in line for line in problems(root))


def test_transparent_pixels(tmp_path):
    only(make_tree(tmp_path, photo=lambda file: save_photo(file, np.dstack([photo, shape * 255]))), 'transparent pixels')


def test_sets_without_background(tmp_path):
    root = make_tree(tmp_path, classes='sky\nroad\n')
    save_mask(root / 'SegmentationClass/a.png', shape * 0)
    found = voc_check(root, progress=False)
    assert found.empty == [] and [text.get_text() for text in found.show().axes[0].get_yticklabels()] == ['sky', 'road']
    (root / 'classes.txt').write_text('background\nroad\n')
    found = voc_check(root, progress=False)
    assert found.empty == ['SegmentationClass/a.png'] and [text.get_text() for text in found.show().axes[0].get_yticklabels()] == ['road']


def test_figures_of_sets_without_background():
    net, x = torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 8, 8)
    mask = torch.tensor([[[0, 1, 2, 0]] * 4]).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for names, drawn in ((['sky', 'road', 'car'], ['sky', 'road', 'car']), (['background', 'road', 'car'], ['road', 'car'])):
        figure = show_attention({'net': net}, x, mask, vocab=names)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == drawn
    assert largest_class(mask[0], None) == 0 and largest_class(mask[0]) in (1, 2)
