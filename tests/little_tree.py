"""A tree of three tiny pairs, of which a test spoils what it is about."""
from pathlib import Path

import numpy as np
from PIL import Image

shape = np.zeros((40, 60), np.uint8)
shape[5:20, 5:30] = 1
photo = np.dstack([shape * 200] * 3)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def save_photo(file, pixels=photo, **options): Image.fromarray(pixels).save(file, format='PNG', **options)
def save_mask(file, pixels=shape, **options): Image.fromarray(pixels).save(file, format='PNG', **options)


def make_tree(root, ids=('a', 'b', 'c'), *, classes='background\nthing\n', photo=save_photo, mask=save_mask, suffix='.jpg'):
    "`photo` and `mask` save one file each; the last id is for validation"
    root = Path(root)
    for i in ids:
        for folder, end, save in (('JPEGImages', suffix, photo), ('SegmentationClass', '.png', mask)):
            file = root / folder / f'{i}{end}'
            file.parent.mkdir(parents=True, exist_ok=True)
            save(file)
    lists = root / 'ImageSets/Segmentation'
    lists.mkdir(parents=True)
    for split, part in (('train', ids[:-1]), ('val', ids[-1:])): (lists / f'{split}.txt').write_text('\n'.join(part) + '\n')
    if classes: (root / 'classes.txt').write_text(classes)
    return root
