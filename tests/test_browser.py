"The explorer in a real browser, in JupyterLab and as a web page of Voilà."
import os, shutil, socket, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

root = Path(__file__).resolve().parents[1]
artefacts = Path(os.environ.get('CAMKD_ARTEFACTS', root/'artefacts'))  # screenshots, to be looked at
names = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
chromium = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, names)), None)
quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
pytestmark = pytest.mark.skipif(chromium is None, reason=f"no browser: install Debian's chromium, or set CHROMIUM to a path (looked for {', '.join(names)})")


@pytest.fixture(scope='module')
def book(tmp_path_factory):
    "A copy of the notebook and of what it reads, so that nothing is written into the checkout"
    folder = tmp_path_factory.mktemp('book')
    (folder/'tutorials').mkdir()
    shutil.copy(root/'nbs/tutorials/07_explorer.ipynb', folder/'tutorials')
    shutil.copytree(root/'nbs/results/students', folder/'results/students')
    news = folder/'lab/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder, log, *command):
    "A web server, from its first answer to the end of the block; yields its address"
    port = free_port()
    settings = {'JUPYTER_CONFIG_DIR': str(folder/'config'), 'JUPYTER_RUNTIME_DIR': str(folder/'runtime'), 'JUPYTERLAB_SETTINGS_DIR': str(folder/'lab')}
    with open(log, 'w') as output:
        process = subprocess.Popen([sys.executable, '-m', *command, f'--port={port}', '--no-browser'], cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, env={**os.environ, **settings, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'})
    address = f'http://127.0.0.1:{port}'
    try:
        wait_for(lambda: answers(address), 60, lambda: f'the server did not start:\n{log.read_text()}', process)
        yield address
    finally:
        process.terminate()
        try: process.wait(10)
        except subprocess.TimeoutExpired: process.kill()


def answers(address):
    try: return urlopen(f'{address}/static/favicons/favicon.ico', timeout=2).status
    except OSError as error: return getattr(error, 'code', None)  # an error page is an answer, too


def wait_for(happened, seconds, message, process=None):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened(): return
        assert process is None or process.poll() is None, message()
        time.sleep(.1)
    pytest.fail(message())


@pytest.fixture
def page(request):
    "An empty tab, whose last view is kept; what its scripts throw fails the test"
    thrown = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=quiet)
        tab = browser.new_page(viewport=dict(width=1280, height=1200))
        tab.on('pageerror', lambda error: thrown.append(str(error)))
        yield tab
        keep(tab, request.node.name.removeprefix('test_'))
        browser.close()
    assert not thrown


class Panel:
    "The explorer, as one sees and touches it"
    def __init__(self, page):
        self.page, self.box = page, page.locator('.widget-vbox', has=page.locator('.widget-image')).first
        self.picture = page.locator('img.widget-image').first
        self.picture.wait_for(timeout=60_000)

    def control(self, name): return self.box.locator('.widget-inline-hbox', has=self.page.get_by_text(name, exact=True))
    def message(self): return self.box.locator('.widget-html').inner_text().strip()
    def seen(self): return self.picture.screenshot()

    def changes(self, touch, what):
        "Do something, and wait until message and picture are others than before"
        before, text = self.seen(), self.message()
        touch()
        wait_for(lambda: self.message() != text, 20, lambda: f'{what}: the message stayed {text!r}')
        wait_for(lambda: self.seen() != before, 20, lambda: f'{what}: the picture did not change')

    def choose(self, name, option): self.changes(lambda: self.control(name).locator('select').select_option(option), f'{name} = {option}')

    def press(self, name, key):
        def touch(): self.control(name).locator('.noUi-handle').focus(), self.page.keyboard.press(key)
        self.changes(touch, f'{name} {key}')


def keep(page, name):
    artefacts.mkdir(exist_ok=True)
    page.screenshot(path=artefacts/f'{name}.png')


def test_jupyterlab(book, page, tmp_path):
    with server(book, tmp_path/'log', 'jupyterlab', '--allow-root', '--IdentityProvider.token=') as address:
        page.goto(f'{address}/lab/tree/tutorials/07_explorer.ipynb')
        page.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=60_000)
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(timeout=60_000)
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        panel = Panel(page)
        film = page.locator('.widget-vbox', has=page.locator('.widget-image')).nth(1).locator('.widget-html')
        for epoch in (1, 2, 6): film.get_by_text(f'after epoch {epoch} of 6').wait_for(timeout=60_000)  # while the fit runs
        wait_for(lambda: 'found' in page.locator('.jp-Notebook').inner_text(), 120, lambda: 'the last cell printed nothing')
        panel.picture.scroll_into_view_if_needed()
        for name, option in (('class', 'ring'), ('layer', 'backbone.layer3'), ('method', 'hirescam'), ('region', 'all'), ('region', 'pixel')): panel.choose(name, option)
        for name, key in (('row', 'ArrowUp'), ('column', 'ArrowRight'), ('overlay', 'ArrowLeft'), ('image', 'ArrowRight')): panel.press(name, key)

        panel.control('region').locator('select').select_option('label')
        absent = panel.control('class').locator('option', has_text='not here').first.inner_text()
        panel.control('class').locator('select').select_option(absent)
        wait_for(lambda: 'choose another class' in panel.message(), 20, lambda: f'no error is shown, but {panel.message()!r}')
        assert not panel.picture.is_visible()
        keep(page, 'error')
        panel.control('class').locator('select').select_option(index=0)
        panel.picture.wait_for(state='visible')

        panel.control('layer').locator('select').focus()
        page.keyboard.press('Tab')
        assert page.evaluate('document.activeElement.tagName') == 'SELECT'  # the next control, without a mouse
        panel.box.get_by_role('button', name='save').click()
        wait_for(lambda: (book/'tutorials/attention.png').exists(), 20, lambda: f'nothing was saved: {panel.message()}')
        assert not page.locator('.jp-OutputArea').get_by_text('Error').count()
        panel.choose('layer', 'backbone.layer4')
        artefacts.mkdir(exist_ok=True)
        panel.box.screenshot(path=artefacts/'explorer.png')  # nbs/images/explorer.png is one of these


def test_voila(book, page, tmp_path):
    with server(book, tmp_path/'log', 'voila', 'tutorials/07_explorer.ipynb', '--show_tracebacks=True') as address:
        page.goto(address, timeout=120_000)
        panel = Panel(page)
        panel.press('image', 'ArrowRight')
        panel.choose('layer', 'backbone.layer1')
        assert not page.get_by_text('Traceback').count() and not page.get_by_text('Error displaying widget').count()
        page.evaluate('scrollTo(0, 0)')
