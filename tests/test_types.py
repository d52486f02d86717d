"""Public names say what they take and return, to people and to a type checker."""
import ast, importlib, inspect, subprocess, sys
from pathlib import Path

import pytest
from fastcore.docments import docments
from torch import nn

root = Path(__file__).resolve().parents[1]
files = sorted(path for path in (root/'camkd_nb').glob('*.py') if path.stem[0] != '_')
each_module = pytest.mark.parametrize('path', files, ids=lambda path: path.stem)
functions = ast.FunctionDef, ast.AsyncFunctionDef


def tree(path): return ast.parse(path.read_text(encoding='utf-8'))
def is_public(node): return node.name[0] != '_' or node.name.startswith('__') and node.name != '__post_init__'
def patched(node): return any(isinstance(name, ast.Name) and name.id == 'patch' for name in node.decorator_list)


def public(path):
    "Names and nodes of the public functions, and of the public methods and dunders of public classes"
    for node in tree(path).body:
        if isinstance(node, functions):
            owner = ast.unparse(node.args.args[0].annotation) if patched(node) else ''
            if is_public(node) and not owner.startswith('_'): yield f'{owner}.{node.name}'.lstrip('.'), node
        elif isinstance(node, ast.ClassDef) and is_public(node):
            yield from ((f'{node.name}.{method.name}', method) for method in node.body if isinstance(method, functions) and is_public(method))


def parameters(node): return [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ('self', 'cls')]


@each_module
def test_every_parameter_and_result_has_a_hint(path):
    bare = {name: [a.arg for a in parameters(node) if not a.annotation] + ['return'] * (node.returns is None) for name, node in public(path)}
    assert {name: missing for name, missing in bare.items() if missing} == {}


def exported(path):
    "The public names that a module defines, and what they are"
    module = importlib.import_module(f'camkd_nb.{path.stem}')
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if getattr(value, '__module__', '') == module.__name__ and callable(value)}


def says_enough(hint): return inspect.isclass(hint) and (issubclass(hint, nn.Module) or hint.__module__.startswith('camkd_nb.'))


@each_module
def test_every_name_is_documented(path):
    "A docstring, hints that fastcore finds, and for a class a comment beside each parameter whose hint does not say enough"
    lacking = {}
    for name, value in exported(path).items():
        if not value.__doc__: lacking[name] = 'docstring'
        elif inspect.isfunction(value) and not docments(value, returns=True): lacking[name] = 'hints'
        elif inspect.isclass(value) and '__init__' in vars(value):  # others: an enumeration, a named tuple
            found = docments(value, full=True)
            elsewhere = {'self', 'return', 'args', 'kwargs', *(each for base in value.__mro__[1:] for each in getattr(base, '__dataclass_fields__', ()))}
            bare = [each for each, o in found.items() if each not in elsewhere and not o.docment and not says_enough(o.anno)]
            if bare: lacking[name] = bare
    assert lacking == {}


@each_module
def test_dunders_stand_in_their_class(path):
    assert [node.name for node in tree(path).body if isinstance(node, functions) and patched(node) and node.name.startswith('__')] == []


@each_module
def test_modules_and_lines_are_short(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 300
    assert [i for i, line in enumerate(lines, 1) if len(line) > 120] == []


def test_type_checker_agrees():
    done = subprocess.run([sys.executable, '-m', 'mypy', '--no-error-summary'], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
