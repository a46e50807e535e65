"""Recipes: one function per published run, each returning a frozen ``Recipe``. A variant is a ``dataclasses.replace``.

Each module names its runs and the figures that they are published with; docs/recipes.md says what differs from the
originals. Imports no torch.
"""

from collections.abc import Callable

from shiftconv.names import unknown
from shiftconv.recipes import digits, distillation, learned_shifts, shiftresnet, shiftwise, slak
from shiftconv.train.recipe import Recipe

_RECIPES: dict[str, Callable[[], Recipe]] = {
    name: recipe
    for module in (shiftresnet, digits, slak, shiftwise, distillation, learned_shifts)
    for name, recipe in module.RECIPES.items()
}


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
