"The first lines `#| name: value` of a notebook's code cell, and what they ask of a page."
import re

line = re.compile(r'#\s*\|\s*([^\s:]+):?[ \t]*(.*?)[ \t]*(?:\n|$)')
hidden = {('hide', ''), ('include', 'false')}
no_code = {('hide_input', ''), ('echo', 'false')}
no_outputs = {('hide_output', ''), ('output', 'false')}


def split_directives(code):
    "The leading `#| name: value` lines of `code` as a set of pairs, and the code below them"
    found = set()
    while match := line.match(code):
        name, value = match.groups()
        found.add((name, '' if value == 'true' else value))  # a bare directive is a true one
        code = code[match.end():]
    return found, code.lstrip('\n')
