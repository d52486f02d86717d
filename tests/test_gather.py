"""Data sets of others, each drawn here in a few pixels, become trees whose masks are known by hand."""
import base64, io, json, os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from camkd_nb.check import voc_check
from camkd_nb.gather import main, voc_gather
from camkd_nb.outlines import polygon_part, runs_mask
from camkd_nb.trees import voc_ids
from camkd_nb.voc import VOID, read_image, read_mask, voc_classes, voc_items

W, H = 60, 40
shape = np.zeros((H, W), np.uint8)
shape[5:20, 5:30] = 1
corners = [[5, 5], [30, 5], [30, 20], [5, 20]]  # of the ones in `shape`
sky, car, cream = (128, 128, 128), (64, 0, 128), (224, 224, 192)


def photo(file, size=(W, H), tag=None, **kwargs):
    "A photo of the shape, bright on dark, that differs from file to file"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.dstack([shape * 200 + len(file.name) % 7] * 3)).resize(size)
    if tag:  # stored so that the tag turns it upright
        back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[tag]
        exif = Image.Exif()
        exif[0x0112] = tag
        picture, kwargs = picture.transpose(back), {**kwargs, 'exif': exif}
    picture.save(file, **kwargs)
    return file


def mask(file, values=shape, mode=None, **kwargs):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values))
    (picture.convert(mode) if mode else picture).save(file, **kwargs)


def painted(*colours): return np.array(colours, np.uint8)[shape]


def pairs(root, save=mask, names=('a', 'b', 'c'), photos='photos/{}.jpg', masks='masks/{}.png'):
    for name in names: photo(root/photos.format(name)), save(root/masks.format(name))
    return root/photos.split('/')[0], root/masks.split('/')[0] if '/' in masks else root


def gather(root, *sources, classes=('ground', 'thing'), **kwargs):
    return voc_gather(root/'tree', *sources, classes=classes, progress=False, **{'splits': {'train': .6, 'val': .4}, **kwargs})


def masks_of(tree): return {id: read_mask(tree/f'SegmentationClass/{id}.png') for split in ('train', 'val') for id in voc_ids(tree, split)}
def all_are(tree, expected): return all((found == expected).all() for found in masks_of(tree).values())


def refused(root, why, *sources, **kwargs):
    "Refused with these words, and nothing is left behind"
    before = sorted(root.rglob('*'))
    with pytest.raises(ValueError) as error: gather(root, *sources, **kwargs)
    assert why in str(error.value) and sorted(root.rglob('*')) == before
    return str(error.value)


# Masks by number

as_written = {'palette': lambda f: mask(f, mode='P'), 'grey': mask, '4 bits': lambda f: mask(f, bits=4), '2 bits': lambda f: mask(f, bits=2),
              '1 bit': lambda f: mask(f, bits=1), '16 bits': lambda f: mask(f, shape.astype(np.uint16)), 'grey in RGB': lambda f: mask(f, mode='RGB'),
              '32 bits, TIFF': lambda f: mask(f.with_suffix('.tif'), shape.astype(np.int32))}


@pytest.mark.parametrize('save', as_written.values(), ids=as_written.keys())
def test_indices_of_any_depth(tmp_path, save):
    def saved(file):
        if save is as_written['palette']:
            file.parent.mkdir(exist_ok=True)
            picture = Image.fromarray(shape)
            picture.putpalette([9, 9, 9, 200, 0, 0])
            picture.save(file)
        else: save(file)
    tree = gather(tmp_path, *pairs(tmp_path, saved))
    assert all_are(tree, shape) and voc_classes(tree) == ['ground', 'thing'] and voc_check(tree, progress=False).images.tolist() == [3, 3]


def test_values_above_255_are_mapped(tmp_path):
    tree = gather(tmp_path, *pairs(tmp_path, lambda f: mask(f, shape.astype(np.uint16) * 26000 + 7)), mapping={26007: 'thing', 7: 0})
    assert all_are(tree, shape)


def test_void_and_values_without_a_meaning(tmp_path):
    folders = pairs(tmp_path, lambda f: mask(f, shape * 11))
    said = refused(tmp_path, 'value 11 is no class', *folders)
    assert 'void=11' in said and 'in 3 of 3 files' in said and 'a.png' in said
    assert all_are(gather(tmp_path, *folders, void=11), shape * VOID)


@pytest.mark.parametrize('void', [[11, 12], (11, 12, 13), {11, 12}, np.array([11, 12])], ids=str)
def test_several_void_values(tmp_path, void):
    folders = pairs(tmp_path, lambda f: mask(f, np.where(shape, 11, 12).astype(np.uint8)))
    if isinstance(void, tuple): void = list(void)
    assert all_are(gather(tmp_path, *folders, void=void), np.full_like(shape, VOID))


def test_unmapped_values_stay_only_where_their_class_is_free(tmp_path):
    folders = pairs(tmp_path, lambda f: mask(f, np.where(shape, 7, 0).astype(np.uint8)))
    refused(tmp_path, 'value 0 is no class of the mapping', *folders, mapping={7: 0, 8: 1})
    assert all_are(gather(tmp_path, *folders, mapping={7: 0, 8: 1, '*': 'void'}), np.where(shape, 0, VOID))


def test_binary_masks(tmp_path):
    folders = pairs(tmp_path, lambda f: mask(f, shape * 255))
    refused(tmp_path, 'mapping={255: 1}', *folders)
    assert all_are(gather(tmp_path, *folders, mapping={255: 1}), shape)


def test_binary_masks_whose_void_is_said(tmp_path):
    assert all_are(gather(tmp_path, *pairs(tmp_path, lambda f: mask(f, shape * 255)), void=255), shape * VOID)


def test_wrong_size_names_the_mask(tmp_path):
    folders = pairs(tmp_path)
    mask(tmp_path/'masks/b.png', shape[:30])
    refused(tmp_path, 'b.png: the mask is 60×30 pixels, its image 60×40', *folders)


def test_damaged_mask_leaves_nothing(tmp_path):
    folders = pairs(tmp_path)
    (tmp_path/'masks/b.png').write_bytes(b'half a picture')
    refused(tmp_path, 'b.png', *folders)


def test_damaged_photo_is_named(tmp_path):
    folders = pairs(tmp_path)
    (tmp_path/'photos/b.jpg').write_bytes(b'half a picture')
    refused(tmp_path, 'b.jpg: not a readable image', *folders)


# Masks by colour

lists = {'label_colors.txt': '128 128 128\tSky\n64 0 128\t\tCar\n0 0 0\t\tVoid\n', 'labelmap.txt': '# label:color_rgb:parts:actions\nSky:128,128,128::\nCar:64,0,128::\n',
         'class_dict.csv': 'name,r,g,b\nSky,128,128,128\nCar,64,0,128\n'}


@pytest.mark.parametrize('name', lists)
@pytest.mark.parametrize('given', [True, False], ids=['given', 'found'])
@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'palette'])
def test_colours_of_a_list(tmp_path, name, given, mode):
    def save(file):
        picture = Image.fromarray(painted(sky, car))
        file.parent.mkdir(exist_ok=True)
        (picture.quantize(2) if mode == 'palette' else picture.convert(mode)).save(file)
    folders = pairs(tmp_path, save)
    (tmp_path/name).write_text(lists[name])
    tree = gather(tmp_path, *folders, classes=None, colours=tmp_path/name if given else None)
    assert all_are(tree, shape) and voc_classes(tree) == ['Sky', 'Car']


@pytest.mark.parametrize('colours', [[sky, car], ['#808080', '#400080'], np.array([sky, car]), {'thing': car, 'ground': sky}], ids=['tuples', 'hex', 'array', 'names'])
def test_colours_as_given(tmp_path, colours):
    assert all_are(gather(tmp_path, *pairs(tmp_path, lambda f: mask(f, painted(sky, car))), colours=colours), shape)


def test_a_colour_that_nobody_listed(tmp_path):
    folders = pairs(tmp_path, lambda f: mask(f, painted(sky, (64, 0, 127))))
    said = refused(tmp_path, 'colour (64, 0, 127) is not listed. Nearest is (64, 0, 128), thing', *folders, colours=[sky, car])
    assert '.png' in said
    refused(tmp_path, 'no list says what they mean', *folders)
    for kwargs in ({'mapping': {(64, 0, 127): 1}}, {'mapping': {'#40007f': 'thing'}}): assert all_are(gather(tmp_path/str(len(str(kwargs))), *folders, colours=[sky, car], **kwargs), shape)


@pytest.mark.parametrize('void', [(0, 0, 0), [(0, 0, 0)], [[0, 0, 0]], '#000000'], ids=str)
def test_void_colours(tmp_path, void):
    folders = pairs(tmp_path, lambda f: mask(f, painted(sky, (0, 0, 0))))
    assert all_are(gather(tmp_path, *folders, colours=[sky, car], void=void), shape * VOID)


def test_void_in_the_middle_of_a_list_moves_the_others_up(tmp_path):
    (tmp_path/'list.txt').write_text('128 128 128 Sky\n0 0 0 Void\n64 0 128 Car\n')
    folders = pairs(tmp_path, lambda f: mask(f, painted((0, 0, 0), car)))
    for classes in (None, ['Sky', 'Car']):
        tree = gather(tmp_path/str(classes), *folders, classes=classes, colours=tmp_path/'list.txt')
        assert all_are(tree, np.where(shape, 1, VOID)) and voc_classes(tree) == ['Sky', 'Car']


def test_some_classes_of_a_list(tmp_path):
    (tmp_path/'list.txt').write_text('128 128 128 Sky\n64 0 128 SUV\n64 1 128 Car\n')
    folders = pairs(tmp_path, lambda f: mask(f, painted(sky, car)))
    refused(tmp_path, "colour (64, 0, 128) is not listed", *folders, classes=['Car', 'Sky'], colours=tmp_path/'list.txt')
    tree = gather(tmp_path, *folders, classes=['Car', 'Sky'], colours=tmp_path/'list.txt', mapping={'SUV': 'Car'})
    assert all_are(tree, 1 - shape)


def test_grey_colours(tmp_path):
    "Black and white are colours where a list says so, in any mode"
    for i, mode in enumerate(('L', 'RGB', '1')):
        root = tmp_path/str(i)
        assert all_are(gather(root, *pairs(root, lambda f: mask(f, shape * 255, mode)), colours=[(0, 0, 0), (255, 255, 255)]), shape)


def test_mixed_colours(tmp_path):
    folders = pairs(tmp_path, lambda f: mask(f.with_suffix('.jpg'), painted(sky, car)))
    refused(tmp_path, 'Export the masks again as PNG', *folders, colours=[sky, car])
    smooth = pairs(tmp_path, lambda f: (mask(f), Image.fromarray(painted(sky, car)).resize((W // 7, H // 7), 3).resize((W, H), 3).save(f)), photos='smooth/{}.jpg', masks='fine/{}.png')
    refused(tmp_path, 'export the masks again', *smooth, colours=[sky, car])
    grey = pairs(tmp_path, lambda f: mask(f.with_suffix('.jpg')), masks='grey/{}.png')
    refused(tmp_path, 'Export the masks again as PNG', *grey)


# Names, folders, lists

@pytest.mark.parametrize('masks', ['masks/{}_L.png', 'masks/{}_mask.png', 'masks/{}_gtFine_labelIds.png', 'masks/{}.jpg.png', 'masks/{} mask.png', 'masks/deep/{}.PNG', 'photos/{}_mask.png', 'photos/{}.png', 'photos/masks/{}.png', '{}.png'])
def test_endings_and_folders(tmp_path, masks):
    names = '0001', 'IMG (2)', 'é_3'
    tree = gather(tmp_path/'made', *pairs(tmp_path/'data', names=names, masks=masks))
    assert all_are(tree, shape) and set(masks_of(tree)) == set(names)


def test_cityscapes(tmp_path):
    for town, split in (('aachen', 'train'), ('bonn', 'train'), ('ulm', 'val')):
        for end, values in (('labelIds', shape * 7 + 7), ('color', painted(sky, car)), ('instanceIds', shape)):
            mask(tmp_path/f'gtFine/{split}/{town}/{town}_0_gtFine_{end}.png', values)
        (tmp_path/f'gtFine/{split}/{town}/{town}_0_gtFine_polygons.json').write_text('{"imgHeight": 40, "imgWidth": 60, "objects": []}')
        photo(tmp_path/f'leftImg8bit/{split}/{town}/{town}_0_leftImg8bit.png')
    refused(tmp_path, "_gtFine_labelIds. Say which are meant: masks='", tmp_path/'leftImg8bit', tmp_path/'gtFine')
    tree = gather(tmp_path, tmp_path/'leftImg8bit', tmp_path/'gtFine/**/*_labelIds.png', splits=None, mapping={7: 'ground', 14: 'thing', '*': 255})
    assert all_are(tree, shape) and [len(voc_items(tree, split)) for split in ('train', 'val')] == [2, 1]


@pytest.mark.parametrize('unique', [True, False])
def test_camvid(tmp_path, unique):
    "Its folders, alone and with its lists of two paths a line"
    for split, names in (('train', '12'), ('val', '3')):
        for name in names:
            name = name if unique else '1' if name == '3' else name
            photo(tmp_path/f'CamVid/{split}/{name}.png'), mask(tmp_path/f'CamVid/{split}annot/{name}.png', shape * 11)
        (tmp_path/f'CamVid/{split}.txt').write_text(''.join(f'/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\n' for name in (names if unique or split == 'train' else '1')))
    sources = (tmp_path/'CamVid',) * 2
    root = tmp_path/'CamVid'
    for i, splits in enumerate((None, {'train': root/'train', 'val': str(root/'val')}, {'train': tmp_path/'CamVid/train.txt', 'val': tmp_path/'CamVid/val.txt'}, {'train': 'train', 'val': 'val'})):
        tree = gather(tmp_path/f'made {i}', *sources, void=11, splits=splits)
        assert all_are(tree, shape * VOID) and [len(voc_ids(tree, split)) for split in ('train', 'val')] == [2, 1]
    assert voc_ids(gather(tmp_path/'x', tmp_path/'CamVid/train', tmp_path/'CamVid/trainannot', void=11, splits={'train': ['1'], 'val': ['2']}), 'train') == ['1']


def test_a_tree_of_others(tmp_path):
    "The lists and the names of a VOC tree are used; its own palette is not"
    photos, masks = pairs(tmp_path, photos='JPEGImages/{}.jpg', masks='SegmentationClass/{}.png')
    (tmp_path/'ImageSets/Segmentation').mkdir(parents=True)
    (tmp_path/'ImageSets/Segmentation/train.txt').write_text('a\nb\n'), (tmp_path/'ImageSets/Segmentation/val.txt').write_text('c\n')
    mask(tmp_path/'SegmentationObject/a.png')
    (tmp_path/'class_names.txt').write_text('_background_\ncup\n')
    tree = voc_gather(tmp_path.with_name('made'), tmp_path, tmp_path, progress=False)
    assert [voc_ids(tree, split) for split in ('train', 'val')] == [['a', 'b'], ['c']] and voc_classes(tree) == ['_background_', 'cup'] and all_are(tree, shape)


def test_roboflow_masks(tmp_path):
    for split in ('train', 'valid', 'test'):
        photo(tmp_path/f'{split}/{split}_jpg.rf.0a1b.jpg'), mask(tmp_path/f'{split}/{split}_jpg.rf.0a1b_mask.png', shape * 2)
        (tmp_path/f'{split}/_classes.csv').write_text('Pixel Value, Class\n0, background\n1, mug\n2, cup\n')
    tree = gather(tmp_path, tmp_path, tmp_path, classes=None, splits=None)
    assert all_are(tree, shape * 2) and voc_classes(tree) == ['background', 'mug', 'cup']
    assert [voc_ids(tree, split) for split in ('train', 'val', 'test')] == [['train_jpg.rf.0a1b'], ['valid_jpg.rf.0a1b'], ['test_jpg.rf.0a1b']]


def test_left_over_photos_and_masks(tmp_path, capsys):
    folders = pairs(tmp_path)
    photo(tmp_path/'photos/d.jpg')
    gather(tmp_path/'1', *folders)
    assert 'left out are photos without a mask, 1 in all: d.jpg' in capsys.readouterr().out
    mask(tmp_path/'masks/e.png')
    assert 'first e.png' in refused(tmp_path, 'for 1 of 4 masks or annotations', *folders)
    assert len(masks_of(gather(tmp_path, *folders, partial=True))) == 3


def test_groups_stay_together(tmp_path, capsys):
    names = [f'{film}_{i:03}' for film in 'abcde' for i in range(5)]
    folders = pairs(tmp_path, names=names)
    gather(tmp_path/'1', *folders, splits=None)
    assert 'frames of 5 recordings' in capsys.readouterr().out
    tree = gather(tmp_path, *folders, splits=None, groups=r'^(.*?)\d+$')
    films = [{id[0] for id in voc_ids(tree, split)} for split in ('train', 'val')]
    assert [len(film) for film in films] == [4, 1] and not films[0] & films[1]


# labelme

def labelme(file, *shapes, **more):
    content = {'version': '5', 'flags': {}, 'imagePath': f'{file.stem}.jpg', 'imageData': None, 'imageHeight': H, 'imageWidth': W, **more,
               'shapes': [{'label': 'cup', 'shape_type': 'polygon', 'group_id': None, **one} for one in shapes]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


both = {'train': ['a'], 'val': ['b']}


def cups(root, *shapes, tag=None, suffix='.jpg', **more):
    for name in 'ab': photo(root/f'cups/{name}{suffix}', tag=tag), labelme(root/f'cups/{name}.json', *shapes, **more)
    return (root/'cups',) * 2


def bitmap(values):
    Image.fromarray(values * np.uint8(255)).save(buffer := io.BytesIO(), 'PNG')
    return base64.b64encode(buffer.getvalue()).decode()


hole = [[10, 10], [12, 10], [12, 12], [10, 12]]
holed = shape.copy()
holed[10:12, 10:12] = 0
forms = {'polygon': ([{'points': corners}], shape), 'rectangle': ([{'points': [[30, 20], [5, 5]], 'shape_type': 'rectangle'}], shape),
         'hole': ([{'points': hole, 'group_id': 3}, {'points': corners, 'group_id': 3}], holed), 'two alike': ([{'points': corners, 'group_id': 3}] * 2, shape),
         'four corners': ([{'points': corners, 'shape_type': 'rectangle'}], shape),
         'mask': ([{'points': [[5, 5], [29, 19]], 'shape_type': 'mask', 'mask': bitmap(np.ones((15, 25), np.uint8))}], shape),
         'over the border': ([{'points': [[5, 5], [90, 5], [90, 20], [5, 20]]}], np.pad(np.ones((15, 55), np.uint8), ((5, 20), (5, 0)))),
         'older': ([{'points': corners, 'shape_type': None, 'flags': {}}], shape), 'two points': ([{'points': corners}, {'points': corners[:2]}], shape)}


@pytest.mark.parametrize('form', forms)
def test_labelme_shapes(tmp_path, form):
    shapes, expected = forms[form]
    tree = gather(tmp_path, *cups(tmp_path, *shapes), classes=None, splits=both)
    assert all_are(tree, expected) and voc_classes(tree) == ['background', 'cup']


def test_labelme_circle(tmp_path):
    tree = gather(tmp_path, *cups(tmp_path, {'points': [[20, 20], [20, 26]], 'shape_type': 'circle'}), classes=['table', 'cup'], splits=both)
    y, x = np.mgrid[:H, :W] + .5
    assert all_are(tree, np.hypot(x - 20, y - 20) <= 6)


def test_labelme_labels(tmp_path):
    shapes = {'points': corners}, {'points': hole, 'label': 'mug'}, {'points': np.add(hole, 4).tolist(), 'label': '__ignore__'}
    expected = shape.copy()
    expected[10:12, 10:12], expected[14:16, 14:16] = 2, VOID
    folders = cups(tmp_path, *shapes)
    assert all_are(gather(tmp_path/'1', *folders, classes=None, splits=both), expected)
    said = refused(tmp_path, "label 'mug' is no class", *folders, classes=['background', 'cup'])
    assert 'b.json' in said or 'a.json' in said
    for kwargs, value in (({'mapping': {'mug': 'cup'}}, 1), ({'void': 'mug'}, VOID), ({'mapping': {'*': 0}}, 0)):
        assert all_are(gather(tmp_path/str(kwargs), *folders, classes=['background', 'cup'], splits=both, **kwargs), np.where(expected == 2, value, expected))


def test_lines_have_no_area(tmp_path): refused(tmp_path, "'cup' is a linestrip, which has no area", *cups(tmp_path, {'points': corners, 'shape_type': 'linestrip'}), classes=None)


@pytest.mark.parametrize('background', [True, False])
def test_what_no_outline_covers(tmp_path, background):
    classes = ['cup', 'mug']
    tree = gather(tmp_path, *cups(tmp_path, {'points': corners}), classes=classes, background=background, splits=both)
    assert all_are(tree, shape if background else np.where(shape, 0, VOID)) and voc_classes(tree) == ['background'] * background + classes


def test_labelme_photos_elsewhere_and_inside(tmp_path):
    photos, notes = tmp_path/'photos', tmp_path/'notes'
    photo(photos/'a.jpg')
    labelme(notes/'a.json', {'points': corners}, imagePath='..\\photos\\a.jpg')
    inside = photo(tmp_path/'elsewhere/b.jpg').read_bytes()
    labelme(notes/'b.json', {'points': corners}, imageData=base64.b64encode(inside).decode())
    tree = gather(tmp_path, photos, notes, classes=None, splits=both)
    assert all_are(tree, shape) and (tree/'JPEGImages/b.jpg').read_bytes() == inside
    labelme(notes/'c.json', {'points': corners})
    refused(tmp_path/'notes', 'for 1 of 3 masks or annotations, first c.jpg', photos, notes, classes=None)


@pytest.mark.parametrize('tag', [3, 6, 8])
def test_outlines_belong_to_the_photo_as_it_is_shown(tmp_path, tag):
    tree = gather(tmp_path, *cups(tmp_path, {'points': corners}, tag=tag), classes=None, splits=both)
    assert all_are(tree, shape) and not voc_check(tree, progress=False).problems
    for image, _ in voc_items(tree, 'train'): assert np.abs((read_image(image)[..., 0] > 100) ^ (shape > 0)).mean() < .01


def test_outlines_on_a_photo_as_it_is_stored(tmp_path):
    "The annotation's own size says so"
    turned = [[y, W - x] for x, y in corners]  # on a photo that lies on its side
    tree = gather(tmp_path, *cups(tmp_path, {'points': turned}, tag=6, imageWidth=H, imageHeight=W), classes=None, splits=both)
    assert all_are(tree, np.rot90(shape)) and read_image(tree/'JPEGImages/a.png').shape == (W, H, 3)
    refused(tmp_path/'cups', 'was annotated at 600×400 pixels and has 60×40', *cups(tmp_path, {'points': corners}, imageWidth=600, imageHeight=400), classes=None)


def test_masks_of_photos_on_their_side(tmp_path):
    for name in 'ab': photo(tmp_path/f'photos/{name}.jpg', tag=6), mask(tmp_path/f'masks/{name}.png')
    tree = gather(tmp_path, tmp_path/'photos', tmp_path/'masks', splits=both)
    assert all_are(tree, shape) and read_image(tree/'JPEGImages/a.jpg').shape[:2] == shape.shape


# COCO

def coco(file, *annotations, names=('a.jpg', 'b.jpg'), categories=((7, 'cup'), (3, 'mug')), **more):
    annotations = [{'id': i, 'image_id': 10 + k, 'category_id': 7, 'iscrowd': 0, **one} for k in range(len(names)) for i, one in enumerate(annotations)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({'images': [{'id': 10 + k, 'file_name': name, 'width': W, 'height': H} for k, name in enumerate(names)],
                                'annotations': annotations, 'categories': [{'id': id, 'name': name, 'supercategory': 'dish'} for id, name in categories], **more}))
    return file


def runs(values):
    flat = values.T.ravel()
    change = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *change, flat.size]).tolist()
    return {'size': list(values.shape), 'counts': [0] * int(flat[0]) + counts}


def compressed(values):
    encoded = pytest.importorskip('pycocotools.mask').encode(np.asfortranarray(values))
    return {**encoded, 'counts': encoded['counts'].decode()}


flat = [c for corner in corners for c in corner]
codes = {'polygon': lambda: [flat], 'flat list': lambda: flat, 'two parts': lambda: [flat[:4] + [30, 12, 5, 12], [5, 12, 30, 12, 30, 20, 5, 20]], 'runs': lambda: runs(shape), 'compressed': lambda: compressed(shape)}


@pytest.mark.parametrize('crowd', [0, 1])
@pytest.mark.parametrize('code', codes)
def test_coco(tmp_path, code, crowd):
    pairs(tmp_path, names='ab')
    tree = gather(tmp_path, tmp_path/'photos', coco(tmp_path/'all.json', {'segmentation': codes[code](), 'iscrowd': crowd}), classes=None, splits=both)
    assert all_are(tree, shape * 2) and voc_classes(tree) == ['background', 'mug', 'cup']


def test_small_objects_stay_visible(tmp_path):
    pairs(tmp_path, names='ab')
    small, large = {'segmentation': [[c for corner in hole for c in corner]], 'category_id': 3}, {'segmentation': [flat]}
    for i, order in enumerate(([small, large], [large, small])):
        tree = gather(tmp_path/str(i), tmp_path/'photos', coco(tmp_path/f'{i}.json', *order), classes=['background', 'cup', 'mug'], splits=both)
        assert all_are(tree, np.where(holed != shape, 2, shape))


def test_coco_that_cannot_be_used(tmp_path):
    photos, _ = pairs(tmp_path, names='ab')
    refused(tmp_path, 'annotation 0 has no segmentation, only a box', photos, coco(tmp_path/'1.json', {'segmentation': [], 'bbox': [5, 5, 25, 15]}), classes=None)
    refused(tmp_path, 'category 99', photos, coco(tmp_path/'2.json', {'segmentation': [flat], 'category_id': 99}), classes=None)
    refused(tmp_path, 'for 1 of 2 masks or annotations, first z.jpg', photos, coco(tmp_path/'3.json', {'segmentation': [flat]}, names=('a.jpg', 'z.jpg')), classes=None)
    refused(tmp_path, 'is for 60×39 pixels, its photo has 60×40', photos, coco(tmp_path/'4.json', {'segmentation': runs(shape[1:])}), classes=None)
    refused(tmp_path, 'annotated twice', photos, coco(tmp_path/'5.json', {'segmentation': [flat]}, names=('a.jpg', 'x/a.jpg')), classes=None)


def test_compressed_runs_need_the_extra(tmp_path, monkeypatch):
    import sys
    code = compressed(shape)
    monkeypatch.setitem(sys.modules, 'pycocotools.mask', None)
    photos, _ = pairs(tmp_path, names='ab')
    refused(tmp_path, 'pip install pycocotools', photos, coco(tmp_path/'all.json', {'segmentation': code}), classes=None)


def test_coco_in_parts(tmp_path):
    "Roboflow's folders, and COCO's own"
    for split, name in (('train', 'a.jpg'), ('valid', 'b.jpg')):
        photo(tmp_path/f'robo/{split}/{name}'), photo(tmp_path/f'coco/{split[:5]}2017/{name}')
        one = {'segmentation': [flat], 'category_id': 1}
        coco(tmp_path/f'robo/{split}/_annotations.coco.json', one, names=[name], categories=((0, 'dish'), (1, 'cup')))
        coco(tmp_path/f'coco/annotations/instances_{split[:5].replace("valid", "val")}2017.json', one, names=[name], categories=((1, 'cup'),))
    for root, notes in (('robo', 'robo'), ('coco', 'coco/annotations')):
        tree = gather(tmp_path/f'made {root}', tmp_path/root, tmp_path/notes, classes=None, splits=None)
        assert all_are(tree, shape) and voc_classes(tree) == ['background', 'cup'] and [voc_ids(tree, split) for split in ('train', 'val')] == [['a'], ['b']]


# CVAT

cvat_shapes = {'polygon': '<polygon label="cup" points="5.00,5.00;30.00,5.00;30.00,20.00;5.00,20.00" z_order="0"></polygon>', 'box': '<box label="cup" xtl="5" ytl="5" xbr="30" ybr="20" z_order="0"/>',
               'turned box': '<box label="cup" xtl="10" ytl="0" xbr="25" ybr="25" rotation="90.0"/>',
               'mask': f'<mask label="cup" left="5" top="5" width="25" height="15" rle="{", ".join(map(str, [0, 375]))}"/>',
               'order': '<box label="cup" xtl="5" ytl="5" xbr="30" ybr="20" z_order="2"/><box label="mug" xtl="10" ytl="10" xbr="20" ybr="20" z_order="1"/>'}


def cvat(file, body, names=('a.jpg', 'x/b.jpg'), head='<meta><task><labels><label><name>cup</name></label><label><name>mug</name></label></labels></task></meta>'):
    images = ''.join(f'<image id="{i}" name="{name}" width="{W}" height="{H}"><tag label="nice"/>{body}</image>' for i, name in enumerate(names))
    file.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{head}{images}</annotations>')
    return file


@pytest.mark.parametrize('form', cvat_shapes)
def test_cvat(tmp_path, form):
    photo(tmp_path/'photos/a.jpg'), photo(tmp_path/'photos/x/b.jpg')
    tree = gather(tmp_path, tmp_path/'photos', cvat(tmp_path/'annotations.xml', cvat_shapes[form]), classes=None, splits=both)
    assert all_are(tree, shape) and voc_classes(tree) == ['background', 'cup', 'mug']


def test_cvat_that_cannot_be_used(tmp_path):
    photo(tmp_path/'photos/a.jpg')
    file = tmp_path/'annotations.xml'
    refused(tmp_path, "'cup' in a.jpg is a polyline, which has no area", tmp_path/'photos', cvat(file, '<polyline label="cup" points="1,1;2,2"/>'), classes=None)
    refused(tmp_path, "CVAT for images 1.1", tmp_path/'photos', cvat(file, '', head='<track id="0" label="cup"></track>'), classes=None)


def test_cvat_masks(tmp_path):
    "Its export of class masks, with photos elsewhere"
    pairs(tmp_path, lambda f: mask(f, painted((0, 0, 0), car)), masks='export/SegmentationClass/{}.png')
    (tmp_path/'export/labelmap.txt').write_text('# label:color_rgb:parts:actions\nbackground:0,0,0::\ncup:64,0,128::\n')
    mask(tmp_path/'export/SegmentationObject/a.png', painted((0, 0, 0), (128, 0, 0)))
    tree = gather(tmp_path, tmp_path/'photos', tmp_path/'export', classes=None)
    assert all_are(tree, shape) and voc_classes(tree) == ['background', 'cup']


# All kinds

@pytest.mark.parametrize('name, text, seen', [('a.json', '{"regions": {}, "_via_settings": 1}', 'JSON with regions, _via_settings'), ('a.json', '[1]', 'JSON, a list'), ('a.xml', '<annotation/>', 'XML of <annotation>'),
                                              ('a.txt', '0 .5 .5 .1 .1', '.txt'), ('a.json', '{', 'cannot be read'), ('a.zip', 'PK', '.zip')])
def test_unknown_annotations(tmp_path, name, text, seen):
    pairs(tmp_path)
    (tmp_path/name).write_text(text)
    said = refused(tmp_path, seen, tmp_path/'photos', tmp_path/name)
    assert name in said and ('labelme' in said and 'COCO' in said and 'CVAT' in said or 'cannot be read' in seen)


def test_photos_keep_their_bytes_and_share_the_disk(tmp_path):
    folders = pairs(tmp_path)
    for name, link in (('linked', True), ('copied', False)):
        tree = gather(tmp_path/name, *folders, link=link)
        image, source = tree/'JPEGImages/a.jpg', tmp_path/'photos/a.jpg'
        assert image.read_bytes() == source.read_bytes() and os.path.samefile(image, source) == link


def test_where_links_are_not_possible(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', lambda *args: (_ for _ in ()).throw(OSError('another disk')))
    assert all_are(gather(tmp_path, *pairs(tmp_path)), shape)


@pytest.mark.parametrize('suffix', ['.JPG', '.jpeg', '.png', '.tif', '.bmp', '.webp'])
def test_photos_of_any_format(tmp_path, suffix):
    tree = gather(tmp_path, *pairs(tmp_path, photos='photos/{}' + suffix))
    assert all_are(tree, shape) and {image.suffix for image, _ in voc_items(tree, 'train')} == {suffix}


def test_what_is_there_is_kept(tmp_path):
    folders = pairs(tmp_path)
    tree = gather(tmp_path, *folders)
    before = {file: file.stat().st_mtime_ns for file in tree.rglob('*')}
    assert gather(tmp_path, *folders) == tree and {file: file.stat().st_mtime_ns for file in tree.rglob('*')} == before
    refused(tmp_path, 'Give another folder, or remove it', *folders, void=3)
    mask(tmp_path/'masks/a.png', 1 - shape)
    refused(tmp_path, 'Give another folder, or remove it', *folders)


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    folders = pairs(tmp_path)
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr('camkd_nb.gather.make_splits', lambda *args, **kwargs: ({'train': ['a'], 'val': ['b']}, ''))
    monkeypatch.setattr('camkd_nb.gather._write_lists', stop)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(KeyboardInterrupt): gather(tmp_path, *folders)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_tree_inside_the_folder_of_its_photos(tmp_path):
    folders = pairs(tmp_path)
    tree = voc_gather(folders[0]/'tree', *folders, classes=['ground', 'thing'], progress=False)
    assert voc_gather(tree, *folders, classes=['ground', 'thing'], progress=False) == tree and len(masks_of(tree)) == 3


@pytest.mark.parametrize('kwargs, why', [({'classes': None}, 'Give classes=[...]'), ({'classes': 'cup'}, 'no such file. Give a list'), ({'classes': ['cup']}, '1 classes, need 2 to 255'),
    ({'classes': ['a', 'a']}, "'a'"), ({'classes': ['a', 'b\nc']}, 'cannot be a name'), ({'mapping': {0: 'cups'}}, "leads to 'cups'"), ({'splits': {'train': .9, 'val': .2}}, 'make 1 together'),
    ({'splits': {'train': 'nowhere', 'val': 'here'}}, 'no folder of images'), ({'splits': {'train': ['a'], 'val': ['zz']}}, "'zz'"), ({'groups': 'z+'}, 'groups='), ({'groups': '('}, 'no regular expression'), ({'splits': {'../val': ['a']}}, 'cannot be the name of a list'), ({'colours': [(0, 0)] * 2}, 'is no colour')])
def test_arguments(tmp_path, kwargs, why): refused(tmp_path, why, *pairs(tmp_path), **kwargs)


@pytest.mark.parametrize('kwargs', [{'classes': 11}, {'classes': {'a': 1, 'b': 0}}, {'mapping': [1]}, {'splits': 'train'}, {'masks': ['a.png']}], ids=str)
def test_types_of_arguments(tmp_path, kwargs):
    images, masks = pairs(tmp_path)
    with pytest.raises(TypeError, match='give'): gather(tmp_path, images, kwargs.pop('masks', masks), **kwargs)
    assert not (tmp_path/'tree').exists()


def test_folders_that_are_not_there(tmp_path):
    photos, masks = pairs(tmp_path)
    refused(tmp_path, 'nowhere: no such folder', tmp_path/'nowhere', masks)
    refused(tmp_path, 'nowhere: no such folder', photos, tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    refused(tmp_path, 'no photos', tmp_path/'empty', masks)
    refused(tmp_path, 'no files', photos, tmp_path/'empty')


def test_rasters_agree_with_cocos():
    "Except on pixels whose centres lie on an edge, or nearly"
    coco_mask, random = pytest.importorskip('pycocotools.mask'), np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(random.uniform(0, 2 * np.pi, 9))
        ring = np.stack([30 + 25 * random.uniform(.4, 1, 9) * np.cos(angles), 20 + 18 * random.uniform(.4, 1, 9) * np.sin(angles)], 1)
        left, top, inside = polygon_part([ring], (W, H))
        ours = np.zeros((H, W), bool)
        ours[top:top + inside.shape[0], left:left + inside.shape[1]] = inside
        theirs = coco_mask.decode(coco_mask.frPyObjects([ring.ravel().tolist()], H, W))[..., 0].astype(bool)
        drawn = Image.new('1', (W, H))
        ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in ring], fill=1)
        assert (ours & theirs).sum() > .95 * (ours | theirs).sum() and (ours & np.asarray(drawn)).sum() > .8 * np.asarray(drawn).sum()


def test_runs_agree_with_cocos():
    coco_mask, random = pytest.importorskip('pycocotools.mask'), np.random.default_rng(0)
    for values in (random.integers(0, 2, (7, 5)).astype(np.uint8), shape, shape * 0, shape * 0 + 1):
        code = runs(values)
        theirs = coco_mask.decode(coco_mask.frPyObjects(code, *values.shape))
        assert (runs_mask(code['counts'], values.shape, 'F') == theirs).all() and (theirs == values).all()


# The command

def command(*words):
    try: main(list(map(str, words)))
    except SystemExit as end: return end.code
    return 0


def test_command(tmp_path, capsys):
    folders = pairs(tmp_path, lambda f: mask(f, painted(sky, (0, 0, 0))))
    words = [tmp_path/'tree', *folders, '--classes', 'ground, thing', '--splits', 'train=.6,val=.4']
    assert command(*words) == 2
    assert capsys.readouterr().err.count('\n') == 1
    assert command(*words, '--colours', '#808080,#400080') == 2
    said = capsys.readouterr().err
    assert "give --mapping '#000000=thing'" in said and "--void '#000000'" in said and not (tmp_path/'tree').exists()
    assert command(*words, '--colours', '#808080,#400080', '--void', '#000000') == 0
    assert all_are(tmp_path/'tree', shape * VOID) and 'lists by chance' in capsys.readouterr().out


def labelme_file(root, name, *shapes):
    "A photo, and outlines of it"
    photo(root/f'{name}.jpg')
    shapes = [{'label': label, 'points': points, 'shape_type': 'polygon'} for label, points in shapes]
    (root/f'{name}.json').write_text(json.dumps({'imagePath': f'{name}.jpg', 'shapes': shapes}))


@pytest.mark.parametrize('points', [[[float('nan'), 5], *corners[1:]], [[5], *corners[1:]]], ids=['NaN', 'cut'])
def test_outlines_that_cannot_be_drawn(tmp_path, points):
    for name in 'ab': labelme_file(tmp_path/'in', name, ('cup', points if name == 'b' else corners))
    refused(tmp_path, 'b.json (b.jpg): an outline cannot be drawn', tmp_path/'in', tmp_path/'in', classes=None)


def test_labels_that_are_renamed_or_void_are_no_classes(tmp_path):
    for name in 'ab': labelme_file(tmp_path/'in', name, ('Cup' if name == 'b' else 'cup', corners), ('VOID', [[0, 0], [4, 0], [4, 4], [0, 4]]))
    expected = shape.copy()
    expected[:4, :4] = VOID
    for i, kwargs in enumerate(({'classes': None}, {'classes': ['background', 'cup', 'Void']})):
        tree = voc_gather(tmp_path/str(i), tmp_path/'in', tmp_path/'in', mapping={'Cup': 'cup'}, progress=False, splits=.5, **kwargs)
        assert all_are(tree, expected) and voc_classes(tree) == ['background', 'cup']


def test_void_in_a_list_that_the_user_gives(tmp_path):
    (tmp_path/'codes.txt').write_text('ground\nVoid\nthing\n')  # as CamVid's
    tree = gather(tmp_path, *pairs(tmp_path, lambda f: mask(f, shape + 1)), classes=tmp_path/'codes.txt')
    assert all_are(tree, np.where(shape, 1, VOID)) and voc_classes(tree) == ['ground', 'thing']


def test_a_list_for_validation_alone(tmp_path):
    sources = pairs(tmp_path/'CamVid', photos='images/{}.jpg', masks='labels/{}_P.png')
    (tmp_path/'CamVid/valid.txt').write_text('b.jpg\n')
    tree = gather(tmp_path, *sources, splits=None)
    assert [voc_ids(tree, split) for split in ('train', 'val')] == [['a', 'c'], ['b']]


def test_lists_of_one_export_that_contradict_each_other(tmp_path):
    for split, name in (('train', 'cat'), ('valid', 'dog')):
        pairs(tmp_path/'in', photos=split + '/{}.jpg', masks=split + '/{}_mask.png')
        (tmp_path/f'in/{split}/_classes.csv').write_text(f'Pixel Value, Class\n0, background\n1, {name}\n')
    refused(tmp_path, 'name other classes', tmp_path/'in', tmp_path/'in', classes=None, splits=None)


@pytest.mark.parametrize('endings', [('_0', '_1'), ('_mask', '_mask_1'), ('', '_1')], ids=str)
def test_numbered_masks_of_one_photo(tmp_path, endings):
    sources = pairs(tmp_path, masks='masks/{}' + endings[0] + '.png')
    mask(tmp_path/f'masks/b{endings[1]}.png')
    refused(tmp_path, 'one for each object?', *sources)


def test_keys_that_no_file_holds_are_said(tmp_path, capsys):
    gather(tmp_path, *pairs(tmp_path), void=7)
    assert '7: in mapping or void, but in no file; these hold 0, 1' in capsys.readouterr().out


def test_another_file_beside_annotations(tmp_path):
    for name in 'ab': labelme_file(tmp_path/'in', name, ('cup', corners))
    (tmp_path/'in/about.json').write_text('{"author": "me"}')
    refused(tmp_path, 'about.json: JSON with author is no known annotation', tmp_path/'in', tmp_path/'in', classes=None)


def test_cvat_sizes_with_a_point(tmp_path):
    for name in 'ab': photo(tmp_path/f'in/{name}.jpg')
    outline = '<polygon label="thing" points="' + ';'.join(f'{x},{y}' for x, y in corners) + '"/>'
    images = ''.join(f'<image name="{name}.jpg" width="{W}.0" height="{H}.0">{outline}</image>' for name in 'ab')
    (tmp_path/'all.xml').write_text(f'<annotations>{images}</annotations>')
    assert all_are(gather(tmp_path, tmp_path/'in', tmp_path/'all.xml', splits=.5), shape)


@pytest.mark.parametrize('where', ['', 'photos'])
def test_the_tree_is_not_made_around_its_photos(tmp_path, where):
    images, masks = pairs(tmp_path)
    with pytest.raises(ValueError, match='holds the photos'): voc_gather(tmp_path/where, images, masks, classes=['ground', 'thing'], progress=False)


@pytest.mark.parametrize('words, said', [(['--splits', 'train'], "'train' lacks its half"), (['--seed', 'x'], 'invalid int'), (['--classes', 'a'], "--classes 'a': no such file"), ([], 'Give --classes a,b,c')])
def test_command_says_one_line(tmp_path, capsys, words, said):
    assert command(tmp_path/'tree', *pairs(tmp_path), *words) == 2
    error = capsys.readouterr().err
    assert error.startswith('camkd-gather: ') and error.count('\n') == 1 and said in error


def test_help_gives_each_default_once(capsys):
    assert command('--help') == 0
    text = capsys.readouterr().out
    assert '(default: )' not in text and text.count('(default: 0)') == 1


@pytest.mark.parametrize('name', ['unlabelled', 'Ignore', 'unlabeled', "don't care", 'DontCare', 'unknown'])
def test_a_class_that_nobody_decided_is_announced(tmp_path, capsys, name):
    gather(tmp_path, *pairs(tmp_path), classes=['ground', name])
    assert f'{name}: a class like the others here' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['avoid', 'unknown road', 'care'])
def test_other_names_are_no_matter(tmp_path, capsys, name):
    gather(tmp_path, *pairs(tmp_path), classes=['ground', name])
    assert 'like the others' not in capsys.readouterr().out
