"""Wide receptive fields at small cost: shifts, large depthwise kernels, and the networks built from them.

``import shiftconv as sc`` registers every network with timm. The names below are found on first use, so that the
command line can answer ``--help`` before torch is loaded.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftconv._version import __version__

if TYPE_CHECKING:
    from shiftconv import analysis, distill, models, nn, ops, recipes, sparse, train
    from shiftconv.analysis import count, erf, throughput
    from shiftconv.deploy import export
    from shiftconv.models import create_model, list_models
    from shiftconv.models.convert import convert, load_checkpoint
    from shiftconv.models.hub import push_to_hub, save_for_hub

_HOME = {  # public name: the module that holds it
    "count": "analysis",
    "erf": "analysis",
    "throughput": "analysis",
    "create_model": "models",
    "list_models": "models",
    "convert": "models.convert",
    "load_checkpoint": "models.convert",
    "push_to_hub": "models.hub",
    "save_for_hub": "models.hub",
    "export": "deploy",
}
_ROOMS = ("analysis", "distill", "models", "nn", "ops", "recipes", "sparse", "train")

__all__ = [  # noqa: RUF022  sorted by kind
    "analysis", "distill", "models", "nn", "ops", "recipes", "sparse", "train",
    "convert", "count", "create_model", "erf", "export", "list_models", "load_checkpoint", "push_to_hub",
    "save_for_hub", "throughput",
    "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"shiftconv.{name}")
    if name in _HOME:
        return getattr(import_module(f"shiftconv.{_HOME[name]}"), name)
    raise AttributeError(f"module 'shiftconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_the_command() -> bool:
    """Whether this process is ``shiftconv ...`` or ``python -m shiftconv ...``."""
    if "-m" in sys.orig_argv[:-1]:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1] == "shiftconv"
    return Path(sys.argv[0] if sys.argv else "").stem == "shiftconv"


# timm knows our networks as soon as this package is imported; only the command itself waits until a verb needs them.
if not _is_the_command():
    import_module("shiftconv.models")
