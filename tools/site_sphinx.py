"What the site asks of Sphinx beyond its parts: formulas as MathML, names of the package as links, words for other sites."
import re
from html import escape, unescape
from urllib.parse import urljoin

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

import site_api, site_pages
from site_book import public_modules, sidebar

picture = 'Predictions of a teacher, a plain and a distilled student, with their class attention maps'
logger = logging.getLogger(__name__)
tag = re.compile(r'\\tag\{(\w+)\}')
# Where the names of other packages are documented.
elsewhere = {
    'Tensor': 'https://docs.pytorch.org/docs/stable/tensors.html',
    'torch.Tensor': 'https://docs.pytorch.org/docs/stable/tensors.html',
    'nn.Module': 'https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html',
    'torch.device': 'https://docs.pytorch.org/docs/stable/tensor_attributes.html',
    'DataLoaders': 'https://docs.fast.ai/data.core.html',
    'Learner': 'https://docs.fast.ai/learner.html',
    'Callback': 'https://docs.fast.ai/callback.core.html',
    'pd.DataFrame': 'https://pandas.pydata.org/docs/reference/frame.html',
    'Figure': 'https://matplotlib.org/stable/api/figure_api.html',
    'Axes': 'https://matplotlib.org/stable/api/axes_api.html',
    'np.ndarray': 'https://numpy.org/doc/stable/reference/arrays.ndarray.html',
    'Path': 'https://docs.python.org/3/library/pathlib.html',
    'Iterable': 'https://docs.python.org/3/library/collections.abc.html',
    'Callable': 'https://docs.python.org/3/library/collections.abc.html',
    'Mapping': 'https://docs.python.org/3/library/collections.abc.html',
    'Iterator': 'https://docs.python.org/3/library/collections.abc.html',
    'Sequence': 'https://docs.python.org/3/library/collections.abc.html',
}


def mathml(text, block=False):
    "A formula in MathML, which browsers draw without help"
    text = re.sub(r'\\[bB]ig+[lrm]?(?=[^a-zA-Z])', '', text)  # brackets grow by themselves
    text = re.sub(r'(\\t?frac)\s*([0-9A-Za-z])', r'\1{\2}', text)
    text = re.sub(r'(\\t?frac\{[^{}]*\})\s*([0-9A-Za-z])', r'\1{\2}', text)
    return latex2mathml.tex2mathml(text, as_block=block)


def visit_math(self, node):
    self.body.append(drawn(node))
    raise nodes.SkipNode


def drawn(node, block=False):
    try: return mathml(tag.sub('', node.astext()).strip(), block)
    except Exception as error:  # docutils raises what the formula makes it stumble over
        logger.warning('formula %r: %s', node.astext(), error, location=node)
        return f'<code>{escape(node.astext())}</code>'


def visit_math_block(self, node):
    number = tag.search(node.astext())
    place = f' id="equation-{number[1]}"' if number else ''
    shown = f'<span class="number">({number[1]})</span>' if number else ''
    self.body.append(f'<div class="formula"{place} tabindex="0">{drawn(node, True)}{shown}</div>\n')
    raise nodes.SkipNode


def depart(self, node): pass


class Captions(SphinxTransform):
    "A paragraph in italics below a picture or a table is its caption"
    default_priority = 700

    def apply(self, **kwargs):
        for paragraph in self.document.findall(nodes.paragraph):
            if len(paragraph) == 1 and isinstance(paragraph[0], nodes.emphasis) and len(paragraph.astext()) > 60:
                paragraph['classes'].append('caption')


def equations(document): return {number for node in document.findall(nodes.math_block) for number in tag.findall(node.astext())}


class Equations(SphinxTransform):
    "`equation 2` leads to the equation of this page that has the number; those of papers are left alone"
    default_priority = 710
    mention = re.compile(r'(?<!\d, )(?<!\d; )\b([Ee]quations? )(\(?(\d+)\)?)(?:( and )(\(?(\d+)\)?))?(?! of\b)')

    def apply(self, **kwargs):
        known = equations(self.document)
        if not known: return
        for text in list(self.document.findall(nodes.Text)):
            if isinstance(text.parent, (nodes.literal, nodes.title, nodes.reference, nodes.math, nodes.math_block, nodes.literal_block)): continue
            if (parts := self.linked(text.astext(), known)): text.parent.replace(text, parts)

    def linked(self, text, known):
        parts, end = [], 0
        for found in self.mention.finditer(text):
            for words, number in (2, 3), (5, 6):
                if found[number] in known:
                    link = nodes.reference('', found[words], internal=True, refuri=f'#equation-{found[number]}')
                    parts += [nodes.Text(text[end:found.start(words)]), link]
                    end = found.end(words)
        return [*parts, nodes.Text(text[end:])] if parts else []


call = re.compile(r'(?:camkd_nb\.(?:\w+\.)?)?(\w+)(?:\.(\w+))?(?:\(.*\))?', re.S)


def target_of(text):
    "The entry of the reference that a piece of code speaks of, or None"
    found = call.fullmatch(text)
    if not found: return None
    module = text.removeprefix('camkd_nb.')
    if text.startswith('camkd_nb.') and module in site_api.modules(): return (module, f'module-{text}') if module in public_modules() else None
    first, second = found[1], found[2]
    if second in public_modules().get(first, ()): first, second = second, None  # module.name
    module = site_api.public().get(first)
    if not module: return None
    return module, f'camkd_nb.{module}.{first}' + (f'.{second}' if second and second in members(module, first) else '')


def members(module, name):
    described = site_api.describe(module, name)
    return {member.name for member in described.members} if described else set()


def link_names(app, doctree, docname):
    "Names in the prose lead to the reference"
    for literal in list(doctree.findall(nodes.literal)):
        if any(isinstance(above, (nodes.title, nodes.reference)) for above in ancestors(literal)): continue
        if not (found := target_of(literal.astext())) or docname == f'api/{found[0]}': continue
        uri = app.builder.get_relative_uri(docname, f'api/{found[0]}') + f'#{found[1]}'
        link = nodes.reference('', '', internal=True, refuri=uri, classes=['name'])
        literal.replace_self(link)
        link += literal


def ancestors(node):
    while node.parent is not None:
        node = node.parent
        yield node


def resolve(app, env, node, contnode):
    "Types in signatures: names of this package, of its notebooks, and of others"
    name = node.get('reftarget', '')
    if node.get('refdomain') != 'py': return None
    if module := site_api.public().get(name):
        uri = app.builder.get_relative_uri(node['refdoc'], f'api/{module}') + f'#camkd_nb.{module}.{name}'
    elif place := site_api.shared().get(name):
        uri = app.builder.get_relative_uri(node['refdoc'], place[0].removesuffix('.ipynb')) + '#' + site_pages.places(place[0])[place[1]]
    else: uri = elsewhere.get(name)
    return nodes.reference('', '', contnode, internal='://' not in uri, refuri=uri) if uri else None


def add_words(app, pagename, templatename, context, doctree):
    "A title and a line for those who share a page, with a picture where the site's address is known"
    described = re.search(r'<blockquote>\s*<div><p>(.*?)</p>', context.get('body') or '', re.S)
    words = re.sub(r'<[^>]*>', '', described[1]) if described else app.config.html_title
    heading = re.sub(r'<[^>]*>', '', context.get('title') or app.config.html_title)
    found = {'og:type': 'article', 'og:site_name': app.config.project, 'og:title': heading, 'og:description': words}
    if base := app.config.html_baseurl:
        found |= {'og:url': urljoin(base, f'{pagename}.html'), 'og:image': urljoin(base, '_static/idea.png'), 'og:image:alt': picture}
    quoted = {name: escape(unescape(value)) for name, value in found.items()}
    tags = [f'<meta property="{name}" content="{value}">' for name, value in quoted.items()]
    context['metatags'] = (context.get('metatags') or '') + '\n'.join([f'<meta name="description" content="{quoted["og:description"]}">', *tags])
    context['book'] = sidebar(pagename, context['pathto'], app.config.live_page)
    if 'body' in context: context['body'] = mended(context['body'])


def fewer_buttons(app, pagename, templatename, context, doctree):
    "A page that no notebook stands behind cannot be downloaded, launched or edited as one"
    if (site_pages.nbs/f'{pagename}.ipynb').exists(): return
    context['header_buttons'] = [button for button in context['header_buttons'] if not re.match('download|launch|source', button.get('label', ''))]


def mended(body):
    "HTML that readers of screens can follow"
    body = body.replace('<summary aria-label="Toggle hidden content">', '<summary>')  # it says itself what it shows
    body = re.sub(r'<th( [^>]*)?>(?:<p></p>)?</th>', r'<td\1></td>', body)  # the corner of a table is no heading
    # The lines of a signature are a list of meanings without words.
    def _lines(found): return '<div class="lines">' + found[1].replace('<dd>', '<div>').replace('</dd>', '</div>') + '</div>'
    return re.sub(r'<dl>\s*((?:<dd>(?:(?!</?dl>).)*</dd>\s*)+)</dl>', _lines, body, flags=re.S)


def setup(app):
    app.add_config_value('live_page', False, 'html', bool)
    app.add_html_math_renderer('mathml', (visit_math, depart), (visit_math_block, depart))
    app.add_transform(Captions)
    app.add_transform(Equations)
    app.connect('doctree-resolved', link_names)
    app.connect('missing-reference', resolve)
    app.connect('html-page-context', add_words)
    app.connect('html-page-context', fewer_buttons, priority=502)  # behind the theme
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
