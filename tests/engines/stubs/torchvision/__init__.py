"""A torchvision in name only: enough that vLLM imports its vision models, none of which is run."""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.28.0"
MODES = ["NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS", "RGB"]


class Anything(types.ModuleType):
    """A module that has every class that it is asked for."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {mode: index for index, mode in enumerate(MODES)})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module below this package."""

    def find_spec(self, name, path=None, target=None):
        ours = name.startswith("torchvision.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())
