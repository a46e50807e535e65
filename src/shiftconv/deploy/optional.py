"""Packages that only some of the exports need."""

from importlib import import_module
from typing import Any


def require(module: str, purpose: str) -> Any:
    """Import ``module``.

    Raises:
        ImportError: it is missing; says what brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.partition('.')[0]}: pip install 'shiftconv[export]'") from error
