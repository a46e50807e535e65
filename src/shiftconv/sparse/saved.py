"""Masks as they are saved: eight entries in a byte."""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from shiftconv.sparse.group import SparseGroup

_BITS = ("active", "explored", "rested", "reachable")
_FIELDS = {"shape", "row", "count", "exchanged", *_BITS}


class Saved(NamedTuple):
    """What a group was."""

    active: Tensor
    explored: Tensor
    rested: Tensor
    reachable: Tensor | None
    exchanged: int


def pack(group: SparseGroup) -> dict[str, Any]:
    """Shape, rows and bits of a group."""
    masks = (group.mask, group.explored, group.rested, group.reachable)
    bits = {name: None if mask is None else _bits(mask) for name, mask in zip(_BITS, masks, strict=True)}
    return {"shape": [*group.shape], "row": group.row, "count": group.active, "exchanged": group.exchanged, **bits}


def unpack(state: Mapping[str, Any], groups: Sequence[SparseGroup]) -> list[Saved]:
    """What :func:`pack` saved of each group, on its device.

    Raises:
        ValueError: if it is no such state, is damaged, or is of other groups.
    """
    if not isinstance(state, Mapping) or state.get("version") != 1 or not isinstance(state.get("groups"), Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("this is no state of sparse training that this version reads")
    if missing := sorted({"steps", "updates", "postponed", "density"} - {*state}):
        raise ValueError(f"the state of sparse training is damaged: it has no {', '.join(missing)}")
    saved, names = state["groups"], [group.name for group in groups]
    if [*saved] != names:
        missing, surplus = sorted({*names} - {*saved})[:3], sorted({*saved} - {*names})[:3]
        raise ValueError(
            f"the saved masks are of other layers or another granularity: {len(saved)} there, {len(names)} here, "
            f"missing {missing}, surplus {surplus}"
        )
    return [_unpack(saved[group.name], group) for group in groups]


def _unpack(one: object, group: SparseGroup) -> Saved:
    if not isinstance(one, Mapping) or _FIELDS - {*cast("Mapping[str, Any]", one)}:
        raise ValueError(f"the saved mask of {group.name} is damaged: something is missing")
    values = cast("Mapping[str, Any]", one)
    if values["shape"] != [*group.shape] or values["row"] != group.row:
        raise ValueError(
            f"the saved mask of {group.name} is {values['shape']} in rows of {values['row']}, here {[*group.shape]} in "
            f"rows of {group.row}; was it of another granularity?"
        )
    active, explored, rested = (_mask(values[name], group) for name in _BITS[:3])
    reachable = None if values["reachable"] is None else _mask(values["reachable"], group)
    too_many = group.fixed is not None and bool((group.in_rows(active).sum(1) > group.fixed).any())
    if int(active.sum()) != values["count"] or bool((active & ~explored).any()) or too_many:
        raise ValueError(f"the saved mask of {group.name} is damaged: it does not have its {values['count']} entries")
    return Saved(active, explored, rested, reachable, values["exchanged"])


def _bits(mask: Tensor) -> Tensor:
    flat = mask.flatten().to(torch.uint8)
    eights = pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8).cpu()


def _mask(bits: object, group: SparseGroup) -> Tensor:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.numel() != (group.size + 7) // 8:
        raise ValueError(f"the saved mask of {group.name} is damaged: it does not have {group.size} entries")
    eights = bits.to(group.mask.device)[:, None] >> torch.arange(8, dtype=torch.uint8, device=group.mask.device)
    return (eights & 1).flatten()[: group.size].bool().view(group.shape)
