"""Masks as they are saved: eight entries in a byte."""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from shiftconv.sparse.group import SparseGroup

Saved = tuple[Tensor, Tensor, Tensor | None]  # active, explored, reachable


def pack(group: SparseGroup) -> dict[str, Any]:
    """Shape, rows and bits of a group."""
    reachable = None if group.reachable is None else _bits(group.reachable)
    return {
        "shape": [*group.shape],
        "row": group.row,
        "active": _bits(group.mask),
        "explored": _bits(group.explored),
        "reachable": reachable,
        "exchanged": group.exchanged,
    }


def unpack(state: Mapping[str, Any], groups: Sequence[SparseGroup]) -> list[Saved]:
    """What :func:`pack` saved of each group, on its device.

    Raises:
        ValueError: if it is no such state, or of other groups.
    """
    if not isinstance(state, Mapping) or state.get("version") != 1 or not isinstance(state.get("groups"), Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError("this is no state of sparse training that this version reads")
    saved, names = state["groups"], [group.name for group in groups]
    if [*saved] != names:
        missing, surplus = sorted({*names} - {*saved})[:3], sorted({*saved} - {*names})[:3]
        raise ValueError(
            f"the saved masks are of other layers or another granularity: {len(saved)} there, {len(names)} here, "
            f"missing {missing}, surplus {surplus}"
        )
    results: list[Saved] = []
    for group in groups:
        one = saved[group.name]
        if one["shape"] != [*group.shape] or one["row"] != group.row:
            raise ValueError(
                f"the saved mask of {group.name} is {one['shape']} in rows of {one['row']}, here {[*group.shape]} in "
                f"rows of {group.row}; was it of another granularity?"
            )
        active, explored = _mask(one["active"], group), _mask(one["explored"], group)
        results.append((active, explored, None if one["reachable"] is None else _mask(one["reachable"], group)))
    return results


def _bits(mask: Tensor) -> Tensor:
    flat = mask.flatten().to(torch.uint8)
    eights = pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8).cpu()


def _mask(bits: object, group: SparseGroup) -> Tensor:
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.numel() != (group.size + 7) // 8:
        raise ValueError(f"the saved mask of {group.name} is damaged: it does not have {group.size} entries")
    eights = bits.to(group.mask.device)[:, None] >> torch.arange(8, dtype=torch.uint8, device=group.mask.device)
    return (eights & 1).flatten()[: group.size].bool().view(group.shape)
