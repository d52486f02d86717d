"The reference: one page a module, from the words of the code. Nothing is imported."
import ast, io, re, tokenize
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

root = Path(__file__).resolve().parents[1]
package = root/'camkd_nb'
cell_line = re.compile(r'# %% \.\./nbs/(\S+) #(\w+)')


@dataclass
class Parameter:
    name: str  # as in the signature, with its stars
    type: str = ''
    default: str = ''
    meaning: str = ''


@dataclass
class Name:
    "What the reference says about a function, a class, a method or a value"
    name: str
    kind: str  # function, class, method, property, data ...
    page: str  # the notebook that defines it
    cell: str
    signature: str = ''
    words: str = ''
    parameters: list = field(default_factory=list)
    returns: Parameter | None = None
    members: list = field(default_factory=list)


class Source:
    "A module's text, its tree, its comments, and the notebook cell behind each line"
    def __init__(self, module):
        self.module, self.text = module, (package/f'{module}.py').read_text(encoding='utf-8')
        self.tree, self.lines = ast.parse(self.text), self.text.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        self.comments = {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}
        self.cells = [(i, *found.groups()) for i, line in enumerate(self.lines, 1) if (found := cell_line.match(line))]

    def cell(self, line):
        "Page and cell id of a line"
        return next(((page, cell) for at, page, cell in reversed(self.cells) if at <= line), ('', ''))

    def code(self, node):
        "A node as it is written; in one line, and without the comments that stand in it"
        if node is None: return ''
        if node.lineno != node.end_lineno: return ast.unparse(node)
        return self.lines[node.lineno - 1].encode()[node.col_offset:node.end_col_offset].decode()


@cache
def source(module): return Source(module)


def assigned(node):
    "Names that a statement at the top of a module assigns"
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def listed(module):
    "The module's `__all__`"
    for node in source(module).tree.body:
        if '__all__' in assigned(node) and isinstance(node.value, ast.List): return [item.value for item in node.value.elts]
    return []


def parameters(src, arguments, skip=0):
    "The parameters of a function, with what the comments beside them say"
    given = [*arguments.posonlyargs, *arguments.args]
    defaults = [None]*(len(given) - len(arguments.defaults)) + arguments.defaults
    found = [('', arg, default) for arg, default in zip(given, defaults)][skip:]
    if arguments.vararg: found.append(('*', arguments.vararg, None))
    found += [('', arg, default) for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg: found.append(('**', arguments.kwarg, None))
    last = {(default or arg).end_lineno: arg for _, arg, default in found}  # a comment speaks of the last on its line
    says = {arg.arg: src.comments.get(line, '') for line, arg in last.items()}
    return [Parameter(stars + arg.arg, src.code(arg.annotation), src.code(default), says.get(arg.arg, '')) for stars, arg, default in found]


def bracketed(found, keyword_only=()):
    "Parameters as a signature has them"
    parts = [p.name + (f': {p.type}' if p.type else '') + (f' = {p.default}' if p.default else '') for p in found]
    names = [p.name for p in found]
    if keyword_only and not any(name[0] == '*' and name[1] != '*' for name in names): parts.insert(names.index(keyword_only[0].arg), '*')
    return f'({", ".join(parts)})'


def signature(src, node, skip=0):
    "What stands between the brackets, and behind the arrow"
    arrow = f' -> {src.code(node.returns)}' if node.returns and node.name != '__init__' else ''
    return bracketed(parameters(src, node.args, skip), node.args.kwonlyargs) + arrow


def result(src, node):
    "What a function returns"
    if node.returns is None or isinstance(node.returns, ast.Constant) and node.returns.value is None: return None
    comment = src.comments.get(node.returns.end_lineno, '')
    return Parameter('', src.code(node.returns), '', comment if node.body[0].lineno > node.returns.end_lineno else '')


def function(src, node, kind='function', skip=0):
    found = Name(node.name, kind, *src.cell(node.lineno), signature(src, node, skip), ast.get_docstring(node) or '')
    found.parameters, found.returns = parameters(src, node.args, skip), result(src, node)
    return found


def decorators(src, node): return [src.code(one) for one in node.decorator_list]


def method(src, node):
    "A method as its class offers it"
    marks = decorators(src, node)
    if 'property' in marks: return function(src, node, 'property', 1)
    if 'classmethod' in marks: return function(src, node, 'classmethod', 1)
    if 'staticmethod' in marks: return function(src, node, 'staticmethod')
    return function(src, node, 'method', 1)


def fields(src, node):
    "The fields of a dataclass, as parameters"
    lines = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != '_']
    found = [item for item in lines if not (isinstance(item.value, ast.Call) and 'init=False' in src.code(item.value))]
    def _default(value): return re.sub(r'^field\(.*default_factory=(\w+).*\)$', r'\1()', src.code(value))
    return [Parameter(item.target.id, src.code(item.annotation), _default(item.value), src.comments.get(item.end_lineno, '')) for item in found]


def class_(src, node):
    found = Name(node.name, 'class', *src.cell(node.lineno), '()', ast.get_docstring(node) or '')
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    if init := next((item for item in methods if item.name == '__init__'), None):
        found.signature, found.parameters = signature(src, init, 1), parameters(src, init.args, 1)
        if not found.words: found.words = ast.get_docstring(init) or ''
    elif any(mark.startswith('dataclass') for mark in decorators(src, node)):
        found.parameters = fields(src, node)
        found.signature = bracketed(found.parameters)
    offered = {item.name: item for item in methods if item.name[0] != '_' and ast.get_docstring(item)}  # the last of a name
    found.members = [method(src, item) for item in offered.values()]
    return found


def origin(module, name):
    "The module whose statement makes `name`: here, or where it was imported from"
    for node in source(module).tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name or name in assigned(node): return module
    for node in source(module).tree.body:
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            if any((alias.asname or alias.name) == name for alias in node.names): return origin(node.module, name)
    raise LookupError(f'{name} of camkd_nb.{module} is defined nowhere')


@cache
def describe(module, name):
    "What `module` says about its own `name`"
    src = source(module)
    for node in src.tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name: return function(src, node)
        if isinstance(node, ast.ClassDef) and node.name == name: return class_(src, node)
        if name in assigned(node):
            value = ast.unparse(node.value)
            return Name(name, 'data', *src.cell(node.lineno), value if len(value) < 200 else '', src.comments.get(node.end_lineno, ''))


@cache
def modules(): return sorted(path.stem for path in package.glob('*.py') if path.stem[0] != '_' and path.stem != 'all')


@cache
def public():
    "Public name -> the module that defines it"
    return {name: origin(module, name) for module in modules() for name in listed(module)}


@cache
def shared():
    "Names that modules share but users do not need -> (page, cell): types of parameters among them"
    found = {}
    for module in modules():
        src = source(module)
        for node in src.tree.body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else assigned(node)
            found |= {name: src.cell(node.lineno) for name in names if name[0] != '_' and name not in public()}
    return found


def cell_of_table(text): return text.replace('|', '\\|').replace('\n', ' ').strip()
def code(text): return f'`` {cell_of_table(text)} ``' if '`' in text else f'`{cell_of_table(text)}`' if text else ''


def table(found):
    "Parameters as a table; one that says no more than the signature is left out"
    if not any(p.meaning for p in found): return []
    rows = [f'| {code(p.name)} | {code(p.type)} | {code(p.default)} | {cell_of_table(p.meaning)} |' for p in found]
    return ['| parameter | type | default | meaning |', '| --- | --- | --- | --- |', *rows, '']


def entry(found, where, depth=6, owner=''):
    "A name as a directive of Sphinx's domain for Python"
    fence = ':'*depth
    if found.kind == 'data': lines = [f'{fence}{{py:data}} {found.name}', *([f':value: {found.signature}'] if found.signature else []), '']
    elif found.kind == 'property': lines = [f'{fence}{{py:property}} {owner}{found.name}', *([f':type: {found.returns.type}'] if found.returns else []), '']
    else:
        directive, option = ('method', [f':{found.kind}:']) if found.kind in ('classmethod', 'staticmethod') else (found.kind, [])
        lines = [f'{fence}{{py:{directive}}} {owner}{found.name}{found.signature}', *option, '']
    if found.words: lines += [found.words[:1].upper() + found.words[1:], '']
    if found.parameters: lines += table(found.parameters)
    if found.returns and found.returns.meaning: lines += [f'**Returns** {code(found.returns.type)}: {found.returns.meaning}', '']
    if not owner and found.page: lines += [where(found), '']
    for member in found.members: lines += entry(member, where, depth - 1, f'{found.name}.')
    return [*lines, fence, '']


def page(module, names, words, where):
    "The page of a module"
    lines = [f'# camkd_nb.{module}', '', f'> {words}', '', f'```{{py:module}} camkd_nb.{module}', '```', '']
    for name in names: lines += entry(describe(module, name), where)
    return '\n'.join(lines)
