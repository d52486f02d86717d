# nbdev reads `pyproject.toml`; this file hands to setuptools what `settings.ini` holds.
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

parser = ConfigParser(delimiters='=', interpolation=None)
parser.read_string(Path(__file__).with_name('settings.ini').read_text(encoding='utf-8'))
settings = parser['DEFAULT']

def lines(key): return settings[key].strip().splitlines()

setup(
    install_requires=lines('requirements'),
    extras_require={'dev': lines('dev_requirements')},
    keywords=lines('keywords'),
    classifiers=lines('classifiers'),
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': ['camkd_nb=camkd_nb._modidx:d']},  # lets other nbdev projects link to these docs
    project_urls={'Repository': url} if (url := settings['repository_url']) else {},
)
