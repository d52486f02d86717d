"What the data block promises beside its page: any number of workers, learners that travel, and faults named in time."
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.torch_core import set_seed
from little_tree import make_tree, photo, save_mask, save_photo, shape
from PIL import Image
from torch import nn

import fastai.callback.progress  # noqa: F401, for `no_bar`
from camkd_nb.data import JointAugment, voc_dls
from camkd_nb.samples import VOCImage, VOCMask
from camkd_nb.voc import VOID, color_mask, voc_items

ids = 'abcdefg'


@pytest.fixture
def tree(tmp_path): return make_tree(tmp_path / 'tree', ids)


def batches(tree, **options):
    set_seed(0)
    return [(x, y) for x, y in voc_dls(tree, 32, 2, **options).train]


def same(one, other): return len(one) == len(other) and all((x == u).all() and (y == v).all() for (x, y), (u, v) in zip(one, other))


def test_workers_make_no_difference(tree):
    here = batches(tree, n_workers=0)
    assert same(here, batches(tree, n_workers=0)) and same(here, batches(tree, n_workers=2))


def test_validation_shows_the_whole_image(tree):
    x, y = voc_dls(tree, 30, 2).valid.one_batch()
    assert x.shape == (1, 3, 30, 30) and x[0, :, 20:].abs().max() < .01 and (y[0, 20:] == VOID).all()
    assert set(y[0, :20].unique().tolist()) == {0, 1}


def test_pictures_and_pairs_that_are_in_no_list(tree):
    dls = voc_dls(tree, 30, 2)
    assert dls.test_dl([Image.new('RGB', (60, 40))]).one_batch()[0].shape == (1, 3, 30, 30)
    x, y = dls.test_dl(voc_items(tree, 'train')[:3], with_labels=True).one_batch()
    assert x.shape[0] == 2 and y.shape == (2, 30, 30) and y.dtype == torch.int64


@pytest.fixture
def learn(tree):
    torch.manual_seed(0)
    return Learner(voc_dls(tree, 32, 2), nn.Conv2d(3, 2, 1))


def test_a_learner_answers_alike_for_files_and_pictures_and_after_its_export(tree, learn, tmp_path):
    file, _ = voc_items(tree, 'val')[0]
    assert learn.loss_func.func.ignore_index == VOID
    with learn.no_bar(): answers = [learn.predict(source)[2] for source in (Image.open(file), file, str(file))]
    learn.export(tmp_path / 'student.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # load_learner warns that pickles can run code
        loaded = load_learner(tmp_path / 'student.pkl')
    with loaded.no_bar(): answers.append(loaded.predict(file)[2])
    for answer in answers: assert answer.shape == (2, 32, 32) and (answer.cpu() - answers[0].cpu()).abs().max() < 1e-3


def test_no_data_travels_with_the_loaders(tree):
    empty = pickle.loads(pickle.dumps(voc_dls(tree, 32, 2).new_empty()))
    assert (empty.vocab, empty.c, len(empty.train_ds)) == (['background', 'thing'], 2, 0)


def test_random_views_are_not_averaged(learn):
    with pytest.raises(ValueError, match=r'predict\(learn.model, photo, flip=True'), learn.no_bar(): learn.tta()


@pytest.mark.parametrize('options, words', [
    (dict(valid='valid'), "No split 'valid'"), (dict(size=0), 'size is a number of pixels, 1 or more, not 0'),
    (dict(bs=7), 'bs=7 with 6 training images makes no full batch'), (dict(n_train=7), 'n_train is 1 to 6'),
    (dict(scale=1), r'For a fixed scale of 1 give \(1, 1\)'), (dict(scale=(2, .5)), 'scale is a pair'),
    (dict(jitter=1), 'jitter is at least 0 and less than 1'), (dict(resize=0), 'resize is a number of pixels')])
def test_wrong_options_are_refused(tree, options, words):
    with pytest.raises(ValueError, match=words): voc_dls(tree, **{'bs': 2, **options})


def test_a_tree_that_is_not_there(tree):
    with pytest.raises(ValueError, match='no such folder'): voc_dls(tree / 'VOC2013')


def test_images_that_are_trained_and_validated_on_are_worth_a_warning(tree):
    with pytest.warns(UserWarning, match="6 images are in both 'train' and 'train': validation will look too good."):
        voc_dls(tree, bs=2, valid='train')


def faulty(tree, n_workers=0):
    "Read all training items; the fault is in item c"
    return [y for _, y in voc_dls(tree, 32, 2, n_workers=n_workers).train]


@pytest.mark.parametrize('fault, words', [
    (np.where(shape == 0, 40, shape).astype(np.uint8), 'c.png: value 40 in the mask'),
    (shape[:, :50], 'c.png: the mask is 50×40 pixels, its image 60×40'),
    (color_mask(shape), "c.png: a mask holds one class index a pixel, but this picture has mode 'RGB'")])
def test_a_broken_mask_is_named(tree, fault, words):
    save_mask(tree / 'SegmentationClass/c.png', np.ascontiguousarray(fault))
    with pytest.raises(ValueError, match=words): faulty(tree)


def test_a_worker_names_the_file_too(tree):
    save_mask(tree / 'SegmentationClass/c.png', color_mask(shape))
    with pytest.raises(ValueError, match='c.png: a mask holds one class index a pixel'): faulty(tree, n_workers=1)


def test_a_photograph_cut_short_is_named_and_a_missing_one_found_at_once(tree):
    save_photo(file := tree / 'JPEGImages/c.jpg', random_photo())
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(ValueError, match='c.jpg: not a readable image'): faulty(tree)
    file.unlink()
    with pytest.raises(ValueError, match=r'names 1 file\(s\) that are not there, first JPEGImages/c.jpg'): voc_dls(tree, bs=2)


def random_photo(): return np.random.default_rng(0).integers(0, 256, photo.shape).astype(np.uint8)


def test_the_augmentation_is_drawn_once_for_image_and_mask():
    "A picture of two halves beside a mask of the same halves, without light: they meet in every draw"
    halves = np.zeros((40, 60), np.uint8)
    halves[:, 30:] = 1
    pair = VOCImage.create(np.dstack([halves * 200] * 3)), VOCMask.create(halves)
    random.seed(0)
    for _ in range(20):
        image, mask = map(np.array, JointAugment(32, jitter=0)(pair, split_idx=0))
        right = (image[..., 0] > 100) == (mask == 1)
        assert right[mask != VOID].mean() > .9
