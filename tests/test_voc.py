"What reading and writing masks promises beside its page."
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from camkd_nb.voc import VOID, check_mask, read_image, read_mask, voc_palette, write_mask

mask = np.array([[0, 4, VOID]], np.uint8)


def test_void_is_pale_and_aeroplanes_are_38_in_grey():
    assert voc_palette()[VOID].tolist() == [224, 224, 192]
    assert Image.new('RGB', (1, 1), tuple(voc_palette()[1].tolist())).convert('L').getpixel((0, 0)) == 38


def test_a_mask_is_read_from_files_opened_pictures_and_one_bit(tmp_path):
    write_mask(mask, tmp_path / 'a.png')
    Image.new('1', (3, 2), 1).save(tmp_path / 'white.png')
    assert Image.open(tmp_path / 'a.png').mode == 'P'
    for source in (tmp_path / 'a.png', Image.open(tmp_path / 'a.png')): assert (read_mask(source) == mask).all()
    assert (read_mask(tmp_path / 'white.png') == np.ones((2, 3))).all()


def test_a_photograph_has_three_channels(tmp_path):
    Image.new('L', (60, 40)).save(tmp_path / 'a.jpg')
    assert read_image(tmp_path / 'a.jpg').shape == (40, 60, 3)


def test_a_file_that_is_cut_short_or_not_there(tmp_path):
    write_mask(np.zeros((40, 60), int), tmp_path / 'a.png')
    (tmp_path / 'short.png').write_bytes((tmp_path / 'a.png').read_bytes()[:-60])
    with pytest.raises(ValueError, match='short.png: not a readable image'): read_mask(tmp_path / 'short.png')
    with pytest.raises(FileNotFoundError, match='nowhere.png'): read_mask(tmp_path / 'nowhere.png')


@pytest.mark.parametrize('wrong, error, words', [
    (mask[None], ValueError, r'\(H, W\), not \(1, 1, 3\)'), (mask / 2, TypeError, 'argmax'),
    (mask.astype(int) - 1, ValueError, r'found -1..254. Void is 255')])
def test_what_is_no_mask_is_not_written_and_leaves_the_file(tmp_path, wrong, error, words):
    write_mask(mask, tmp_path / 'a.png')
    with pytest.raises(error, match=words): write_mask(wrong, tmp_path / 'a.png')
    assert (read_mask(tmp_path / 'a.png') == mask).all()


def test_an_interrupt_while_saving_leaves_the_old_mask_and_nothing_else(tmp_path):
    def interrupted(picture, file, **kwargs):
        Path(file).write_bytes(b'half a')
        raise KeyboardInterrupt
    write_mask(mask, tmp_path / 'a.png')
    with patch.object(Image.Image, 'save', interrupted), pytest.raises(KeyboardInterrupt): write_mask(0 * mask, tmp_path / 'a.png')
    assert (read_mask(tmp_path / 'a.png') == mask).all() and [file.name for file in tmp_path.iterdir()] == ['a.png']


def test_values_that_are_no_class_are_counted():
    check_mask(mask, 5, 'a.png')
    with pytest.raises(ValueError, match=r'a.png: value 4 in the mask \(1 pixels\), but there are 3 classes: 0..2'):
        check_mask(mask, 3, 'a.png')
