"""What the arguments of sparse training must be."""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from shiftconv.names import unknown
from shiftconv.sparse.calibration import Calibration
from shiftconv.sparse.granularity import Granularity
from shiftconv.sparse.group import SparseGroup
from shiftconv.sparse.rule import RULES, Rule
from shiftconv.sparse.schedule import Schedule


def check_arguments(
    model: object,
    optimizer: object,
    density: object,
    allocate: object,
    granularity: object,
    schedule: object,
    calibration: object,
) -> None:
    """Raise a TypeError for an argument of another kind, or a ValueError for a density that is none."""
    kinds = (
        ("model", model, nn.Module, "a module"),
        ("optimizer", optimizer, Optimizer, "an optimizer of torch's kind"),
        ("allocate", allocate, (str, Mapping), "a name, or masks by the name of their group"),
        ("granularity", granularity, (str, Granularity, Sequence), "a name, a Granularity or groups"),
        ("schedule", schedule, Schedule | None, "a Schedule"),
        ("calibration", calibration, Calibration | None, "a Calibration"),
    )
    for name, value, kind, expected in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    if isinstance(granularity, Sequence) and not isinstance(granularity, str):
        for group in granularity:
            if not isinstance(group, SparseGroup):
                raise TypeError(f"granularity must hold groups, as groups() makes them, got {type(group).__name__}")
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density must be a number, got {density!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")


def find_rule(rule: object) -> Rule:
    """The rule of a name, or a rule itself.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown name, with a did-you-mean.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or a Rule, got {type(rule).__name__}")
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    return RULES[rule]
