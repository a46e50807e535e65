"""Recipes: one function per published run, each returning a frozen ``Recipe``. A variant is a ``dataclasses.replace``.

A recipe's name is its function's name. Imports no torch.
"""

from collections.abc import Callable

from shiftconv.names import unknown
from shiftconv.recipes import imagenet, shiftresnet
from shiftconv.train.recipe import Recipe

_RECIPES: dict[str, Callable[[], Recipe]] = {**shiftresnet.RECIPES, **imagenet.RECIPES}


def names() -> list[str]:
    """The names that ``get`` knows."""
    return sorted(_RECIPES)


def get(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: for an unknown name, with a did-you-mean.
    """
    if name not in _RECIPES:
        raise unknown("recipe", name, _RECIPES)
    return _RECIPES[name]()


__all__ = ["Recipe", "get", "names"]
