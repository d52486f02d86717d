"The live page in a real browser, opened from its folder: painting, classes, keyboard, and maps as the library's."
import functools, os, shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from camkd_nb import demo, livepage
from camkd_nb.attention import class_attention
from camkd_nb.livepage import write_page
from camkd_nb.models import toy_student
from camkd_nb.tensors import imagenet_stats
from camkd_nb.toyvoc import TOY_CLASSES, toy_pair
from camkd_nb.webruntime import find_web_runtime

root = Path(__file__).resolve().parents[1]
artefacts = Path(os.environ.get('CAMKD_ARTEFACTS', root/'artefacts'))  # screenshots, to be looked at
names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
chromium = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, names)), None)
models = dict.fromkeys(['student', 'twin'], toy_student(pretrained='distilled'))


@pytest.fixture(scope='module')
def live(tmp_path_factory):
    "A page of one small network under two names, since writing a graph takes seven seconds"
    pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if chromium is None: pytest.skip(f"no browser: install Debian's chromium, or set CHROMIUM to a path (looked for {', '.join(names)})")
    try: runtime = find_web_runtime()
    except (ValueError, OSError) as error: pytest.skip(str(error))
    image, _ = toy_pair(np.random.default_rng(3), size=64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(livepage, 'find_web_runtime', lambda given: runtime)
        patched.setattr(livepage, 'export_with_map', functools.cache(livepage.export_with_map))
        return write_page(tmp_path_factory.mktemp('page')/'live', models, vocab=TOY_CLASSES, examples={'shapes': image}, size=64)


@pytest.fixture(scope='module')
def tab(live):
    "The opened page, and what its scripts threw or warned of, and any request but those of its own files"
    from playwright.sync_api import sync_playwright
    wrong = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        tab = browser.new_page(viewport=dict(width=1200, height=900), color_scheme='light')
        tab.set_default_timeout(60_000)
        tab.on('pageerror', lambda error: wrong.append(str(error)))
        tab.on('console', lambda message: message.type in ('error', 'warning') and wrong.append(message.text))
        tab.on('request', lambda request: request.url.startswith('http') and wrong.append(request.url))
        tab.add_init_script('Math.random = (seed => () => (seed = seed * 16807 % 2147483647) / 2147483647)(1)')  # of the paints
        tab.goto(live.as_uri())
        yield tab, wrong
        browser.close()


@pytest.fixture
def page(tab):
    yield tab[0]
    assert not tab[1]


def state(page): return page.evaluate("Promise.race([camkd.settled(), new Promise((_, no) => setTimeout(no, 60000, 'no answer'))])")


def matches_library(found):
    "Each network of the page answers and looks as in Python"
    side = found['size']
    picture = torch.tensor(found['pixels']).view(1, side, side, 4)[..., :3].permute(0, 3, 1, 2) / 255
    mean, std = imagenet_stats(picture)
    for one in found['networks']:
        answer = torch.tensor(one['answer']).view(1, side, side)
        region = answer == found['chosen']
        assert one['whole'] == (not region.any())
        if one['whole']: region = ~region
        wanted = class_attention(models[one['name']], (picture - mean) / std, layers='backbone.layer4', region=region,
                                 classes=[found['chosen']], signed=True)
        assert (wanted.logits.argmax(1) != answer).sum() <= 2  # two classes may be as good as equal
        wanted = wanted.maps['backbone.layer4'][0, 0].detach()
        shown = torch.tensor(one['map']).view(one['shape'])
        assert shown.shape == wanted.shape and (shown - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def violations(page):
    from axe_playwright_python.sync_playwright import Axe
    return [(found['id'], [node['html'][:120] for node in found['nodes']]) for found in Axe().run(page, options={'preload': False}).response['violations']]


def test_painting_choosing_and_keys(page):
    first = state(page)
    matches_library(first)
    assert {one['name'] for one in first['networks']} == set(models) and first['chosen'] != 0  # the largest in the picture

    page.get_by_role('radio', name='star').first.check()  # a tool, and its class
    box = page.locator('#cursor').bounding_box()
    page.mouse.move(box['x'] + .2 * box['width'], box['y'] + .2 * box['height'])
    page.mouse.down()
    page.mouse.move(box['x'] + .7 * box['width'], box['y'] + .3 * box['height'], steps=5)
    page.mouse.up()
    drawn = state(page)
    matches_library(drawn)
    assert drawn['pixels'] != first['pixels'] and TOY_CLASSES[drawn['chosen']] == 'star'

    page.locator('#classes input').nth(drawn['chosen']).focus()
    page.keyboard.press('ArrowRight')
    ring = state(page)
    matches_library(ring)
    assert ring['pixels'] == drawn['pixels'] and ring['chosen'] == drawn['chosen'] + 1
    page.get_by_role('button', name='Clear').click()
    for c in range(7):  # some are not in the answer
        page.locator('#classes input').nth(c).check()
        found = state(page)
        matches_library(found)
        if found['networks'][0]['whole']: break
    assert found['networks'][0]['whole']
    page.keyboard.press('Control+z')

    page.locator('#cursor').focus()
    for key in ('Shift+ArrowDown', 'ArrowLeft', 'Space'): page.keyboard.press(key)
    assert state(page)['pixels'] != drawn['pixels']
    page.keyboard.press('Control+z')
    assert state(page)['pixels'] == drawn['pixels']
    page.wait_for_function("document.querySelector('#status').textContent.includes('student: ')")  # said to those who listen


def test_a_photograph_of_any_shape(page, tmp_path):
    from PIL import Image
    image = Image.fromarray(toy_pair(np.random.default_rng(5), size=90)[0]).crop((0, 0, 90, 70))
    image.save(tmp_path/'photo.png')
    state(page)
    page.locator('#photo').set_input_files(tmp_path/'photo.png')
    page.wait_for_function("document.querySelector('#picture').ariaLabel.includes('photograph')")
    found = state(page)
    matches_library(found)
    shown = np.array(found['pixels']).reshape(64, 64, 4)[..., :3]
    wanted = np.asarray(image.crop((10, 0, 80, 70)).resize((64, 64), Image.Resampling.BICUBIC))
    assert abs(shown - wanted.astype(float)).mean() < 8  # browsers have their own way to shrink


@pytest.mark.parametrize('scheme, width', [('light', 1200), ('dark', 390)])
def test_everybody_can_use_it(page, scheme, width):
    page.set_viewport_size(dict(width=width, height=900))
    page.emulate_media(color_scheme=scheme)
    state(page)
    assert violations(page) == []
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    artefacts.mkdir(exist_ok=True)
    page.screenshot(path=artefacts/f'page-{scheme}-{width}.png', full_page=True)


def test_the_page_alone_takes_the_networks_of_the_package(monkeypatch, tmp_path, capsys):
    asked = {}
    monkeypatch.setattr(demo, 'write_page', lambda folder, models, **options: asked.update(models=models, **options) or folder)
    monkeypatch.setattr(demo, 'fit', None)
    monkeypatch.setattr('camkd_nb.arguments.find_web_runtime', lambda given: None)
    demo.main(['--page', str(tmp_path/'live')])
    assert list(asked['models']) == ['teacher', 'student', 'distilled student'] and len(asked['examples']) == 6
    assert capsys.readouterr().out == f'page: {tmp_path/"live"}\n'


def test_without_the_extra_its_name_is_said_before_any_work(monkeypatch, tmp_path, capsys):
    def missing(name): raise ImportError(f'{name} is missing: pip install "camkd_nb[export]"')
    monkeypatch.setattr('camkd_nb.export.onnx_package', missing)
    monkeypatch.setattr(demo, 'fit', None)
    with pytest.raises(SystemExit) as end: demo.main(['--page', str(tmp_path/'live')])
    assert end.value.code == 2 and 'pip install "camkd_nb[export]"' in capsys.readouterr().err
    assert not (tmp_path/'live').exists()


def test_a_training_run_shows_its_networks(monkeypatch, tmp_path):
    "The networks are written once before the training, since one of which no map can be had must be found in time"
    did, asked = [], {}
    pair = {'student': toy_student(), 'distilled student': toy_student()}
    monkeypatch.setattr('camkd_nb.arguments.find_web_runtime', lambda given: None)
    monkeypatch.setattr(demo, 'export_with_map', lambda model, path, size: did.append((path, size)))
    monkeypatch.setattr(demo, '_examine', lambda *given: None)
    monkeypatch.setattr(demo, 'compare', lambda *given, **options: did.append('trained') or demo.Outcome(0, .5, .6, (1, 1), pair))
    monkeypatch.setattr(demo, 'save_picture', lambda file, *given: file)
    monkeypatch.setattr(demo, 'write_page', lambda folder, models, **options: asked.update(models=models, **options))
    demo.main(['--page', str(tmp_path/'live'), '--epochs', '1'])
    assert did == [('backbone.layer4', 96), ('backbone.layer4', 96), 'trained']
    assert list(asked['models'].values())[1:] == list(pair.values())
    assert (asked['size'], asked['vocab'], len(asked['examples'])) == (96, TOY_CLASSES, 6)
