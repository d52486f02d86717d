# nbdev reads `pyproject.toml`; this file hands to setuptools what `settings.ini` holds.
import sys
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

root = Path(__file__).resolve().parent
sys.path.insert(0, str(root/'tools'))
from address import absolute_links, repository_url

parser = ConfigParser(delimiters='=', interpolation=None)
parser.read_string((root/'settings.ini').read_text(encoding='utf-8'))
settings = parser['DEFAULT']

def lines(key): return settings[key].strip().splitlines()

url = repository_url()
setup(
    install_requires=lines('requirements'),
    extras_require={key.removesuffix('_requirements'): lines(key) for key in settings if key.endswith('_requirements')},
    keywords=lines('keywords'),
    classifiers=lines('classifiers'),
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': ['camkd_nb=camkd_nb._modidx:d']},  # lets other nbdev projects link to these docs
    project_urls={'Repository': url} if url else {},
    long_description=absolute_links((root/'README.md').read_text(encoding='utf-8'), url),  # read on a page outside the repository
    long_description_content_type='text/markdown',
)
