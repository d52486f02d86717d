"""Names of classes, methods and networks are text in every figure, whatever characters they are made of."""
import warnings
from io import BytesIO

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use('Agg')

import matplotlib.pyplot as plt
from matplotlib.text import Text

from camkd_nb import lettering
from camkd_nb.board import draw_board
from camkd_nb.check import voc_check
from camkd_nb.drawing import Page
from camkd_nb.figures import show_attention
from camkd_nb.files import whole_file, whole_folder
from camkd_nb.stages import last_stages
from camkd_nb.models import toy_student
from camkd_nb.samples import TensorVOCMask
from camkd_nb.study import plot_gains
from camkd_nb.toyvoc import toy_voc

odd = ['$', '$x$', '$\\frac{1$', '_under', '%d {} {0', 'a\\b\\', '\\$x\\$']
far = ['犬', '猫', '鸟', '새', '木', '人', '水']


def drawn(fig):
    "What is written in a figure that was drawn, and what was warned of"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for format in ('png', 'svg'): fig.savefig(BytesIO(), format=format, bbox_inches='tight')
        fig.canvas.draw()
    return {text.get_text() for text in fig.findobj(Text)}, [str(one.message) for one in said]


def math(fig): return [text.get_text() for text in fig.findobj(Text) if text._preprocess_math(text.get_text())[1] is not False]


def shown(names, layers):
    model = toy_student().eval()
    mask = (torch.arange(64) % (len(names) + 1)).repeat(2, 64, 1)
    path = last_stages(model, 1)[0] if layers else None
    return show_attention({names[1]: model}, torch.zeros(2, 3, 64, 64), mask, path, classes=[2, 3], vocab=['background', *names])


@pytest.mark.parametrize('layers', [False, True], ids=['predictions', 'maps'])
def test_odd_names(layers):
    fig = shown(odd[1:], layers)
    texts, said = drawn(fig)
    assert set(odd[1:]) <= texts and math(fig) == [] and said == []


def test_a_board():
    picture, names = np.zeros((8, 8, 3)), ['background', *odd]
    fig = draw_board([(name, (picture, name, None), None) for name in odd], [torch.arange(8)[None]], names)
    texts, said = drawn(fig)
    assert set(odd) <= texts and math(fig) == [] and said == []


@pytest.fixture
def no_font(monkeypatch): monkeypatch.setattr(lettering, '_font_with', lambda character: None)


def escaped(names): return {name.encode('unicode_escape').decode() for name in names}


def test_without_a_font_names_are_escaped(no_font):
    "And nothing is warned of: the figure can be read"
    texts, said = drawn(shown(far[:6], False))
    assert escaped(far[:6]) <= texts and said == []


def test_figures_of_pyplot_without_a_font(no_font, tmp_path):
    mask = TensorVOCMask(torch.arange(8).repeat(8, 1))
    mask.codes = ['background', *far]
    texts, said = drawn(mask.show().figure)
    assert escaped(far) <= texts and said == []
    runs = pd.DataFrame([{'setting': 's', 'method': name, 'seed': seed, 'miou': .3 + .01 * seed * k} for k, name in enumerate(far) for seed in range(3)])
    texts, said = drawn(plot_gains(runs, far[0]).figure)
    assert escaped(far[1:]) <= texts and said == []
    tree = toy_voc(tmp_path/'toy', n_train=4, n_valid=2, size=32)
    (tree/'classes.txt').write_text('\n'.join(['background', *far[:6]]), encoding='utf-8')
    texts, said = drawn(voc_check(tree, progress=False).show())
    assert escaped(far[:6]) <= texts and said == []
    plt.close('all')


def test_a_font_that_has_them():
    "What the first font lacks, the second draws"
    fig = Page()
    text = fig.text(.5, .5, '\U0001d538', family='DejaVu Sans Mono')  # a double-struck A
    assert drawn(fig)[1] == [] and len(text.get_fontfamily()) == 2 and text.get_text() == '\U0001d538'


def test_masks_and_tables(tmp_path):
    "Figures of pyplot"
    mask = TensorVOCMask(torch.arange(8).repeat(8, 1))
    mask.codes = ['background', *odd]
    ax = mask.show()
    texts, said = drawn(ax.figure)
    assert set(odd) <= texts and math(ax.figure) == [] and said == []
    runs = pd.DataFrame([{'setting': 's', 'method': name, 'seed': seed, 'miou': .3 + .01 * seed * len(name)} for name in ('none', *odd) for seed in range(3)])
    ax = plot_gains(runs)
    texts, said = drawn(ax.figure)
    assert set(odd) <= texts and math(ax.figure) == [] and said == []
    tree = toy_voc(tmp_path/'toy', n_train=4, n_valid=2, size=32)
    (tree/'classes.txt').write_text('\n'.join(['background', *odd[:6]]), encoding='utf-8')
    fig = voc_check(tree, progress=False).show()
    assert math(fig) == [] and drawn(fig)[1] == []
    plt.close('all')


@pytest.mark.parametrize('name', ['n' * 251 + '.txt', 'ü' * 127 + 'n', '\U0001f408' * 63 + 'nnn', '.' + 'h' * 254], ids=['ascii', 'two bytes', 'four bytes', 'hidden'])
def test_names_of_255_bytes(tmp_path, name):
    "Files and folders take them, are replaced under them, and nothing else is left"
    assert len(name.encode()) == 255
    for content in 'ab':
        with whole_file(tmp_path/name, sync=True) as draft: draft.write_text(content)
        assert (tmp_path/name).read_text() == content and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path/name) as draft:
        draft.write_text('half')
        raise KeyboardInterrupt
    assert (tmp_path/name).read_text() == 'b' and len(list(tmp_path.iterdir())) == 1
    with whole_folder(tmp_path/'deep'/name) as draft: (draft/'file').write_text('c')
    assert [path.name for path in (tmp_path/'deep').iterdir()] == [name] and (tmp_path/'deep'/name/'file').read_text() == 'c'
