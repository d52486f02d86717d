"How Sphinx builds the site. `python tools/site.py` writes the pages that it reads."
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.append(str(here.parent/'tools'))

from address import repository_url, site_address

url = repository_url()
project = 'camkd_nb'
html_title = 'camkd_nb: class attention map distillation'
copyright = 'The camkd_nb contributors, Apache License 2.0'
author = 'The camkd_nb contributors'

extensions = ['myst_nb', 'site_sphinx']
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 6
myst_dmath_allow_labels = False
html_math_renderer = 'mathml'
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = 'hide'

html_theme = 'sphinx_book_theme'
html_baseurl = site_address(url)
html_static_path = ['static', '../nbs/images/idea.png']
html_css_files = ['site.css']
templates_path = ['templates']
html_sidebars = {'**': ['book-title.html', 'search-button-field.html', 'book-nav.html']}
html_show_sphinx = False
html_show_sourcelink = False
html_last_updated_fmt = None
pygments_style = 'a11y-high-contrast-light'
html_theme_options = {
    'logo': {'text': 'camkd_nb'},
    'pygments_light_style': 'a11y-high-contrast-light',
    'pygments_dark_style': 'a11y-high-contrast-dark',
    'show_navbar_depth': 1,
    'use_download_button': True,
    'use_fullscreen_button': False,
    'show_toc_level': 2,
    'navbar_start': [], 'navbar_center': [], 'navbar_end': [], 'navbar_persistent': [],  # no bar above the book
    **({'repository_url': url, 'repository_branch': 'main', 'path_to_docs': 'nbs', 'use_repository_button': True, 'use_issues_button': True,
        'use_edit_page_button': True, 'launch_buttons': {'colab_url': 'https://colab.research.google.com'}} if url else {}),
}
