"""Layer 2: configuration. Files, recipes and overrides in; a checked, typed run out. Imports no torch.

``load`` resolves a recipe name or a YAML file, ``stages`` says what the engine has to do for it.
"""

from .flat import FlatConfig
from .ignore import ignored
from .recipe import Resolved, load, recipes
from .schema import AnyConfig, Config, PruningConfig
from .upstream import Stage, stages
from .validate import Report, validate_file

__all__ = [
    "AnyConfig",
    "Config",
    "FlatConfig",
    "PruningConfig",
    "Report",
    "Resolved",
    "Stage",
    "ignored",
    "load",
    "recipes",
    "stages",
    "validate_file",
]
