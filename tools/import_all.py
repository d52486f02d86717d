"""Import every module of the installed camkd_nb, and take one step with it: for an environment without the dev requirements."""
import importlib, pkgutil

import torch

import camkd_nb

names = [module.name for module in pkgutil.iter_modules(camkd_nb.__path__) if module.name[0] != '_']
for name in names: importlib.import_module(f'camkd_nb.{name}')

from camkd_nb.attention import class_attention
from camkd_nb.models import toy_teacher

mask = torch.ones(1, 64, 64, dtype=torch.long)
maps = class_attention(toy_teacher(pretrained=True), torch.rand(1, 3, 64, 64), mask, ['backbone.layer4']).maps
assert maps['backbone.layer4'].shape == (1, 1, 8, 8), maps['backbone.layer4'].shape
print(f'{camkd_nb.__file__}: {len(names)} modules')
