"""How many entries of each mask are active at first, and which.

==================  ====================================================================================================
``uniform``         the same density in each layer
``erk``             Erdos-Renyi kernel: small layers are denser; Evci et al. 2020, arXiv:1911.11134, section 3
``snip``            the entries to which the loss is most sensitive, ``|w * dL/dw|``; Lee et al. 2019, arXiv:1810.02340
``snip_layers``     SNIP's density of each layer, but entries by chance, as SLaK's authors train
``grasp``           the entries that keep the gradient's norm, ``w * (H g)``; Wang et al. 2020, arXiv:2002.07376
``weights``         where the weights are not zero
a dict              masks that were saved, by the name of their group
==================  ====================================================================================================

Each has one entry per layer at least, and in all the nearest whole number to ``density`` times the reachable entries.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shiftconv.names import unknown
from shiftconv.sparse.calibration import Probe, grasp_scores, snip_scores
from shiftconv.sparse.group import SparseGroup, highest

Allocation = str | Mapping[str, Tensor]
Shares = Callable[[Sequence[SparseGroup], float], list[float]]
"""From groups and a density to the entries that each of them should have, in fractions."""


def uniform(groups: Sequence[SparseGroup], density: float) -> list[float]:
    """The same density in each layer."""
    return [density * group.capacity for group in groups]


def erk(groups: Sequence[SparseGroup], density: float) -> list[float]:
    """Densities in proportion to ``(O + I + kh + kw) / (O * I * kh * kw)``; layers that would exceed 1 are dense."""
    sizes = [group.capacity for group in groups]
    shapes = [group.members[0].weight.shape for group in groups]
    raw = [sum(shape) / shape.numel() for shape in shapes]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(groups)) if i not in full]
        wanted = density * sum(sizes) - sum(sizes[i] for i in full)
        scale = wanted / sum(raw[i] * sizes[i] for i in rest) if rest else 0.0
        over = max((raw[i] for i in rest), default=0.0)
        if scale * over <= 1:
            return [float(n) if i in full else scale * raw[i] * n for i, n in enumerate(sizes)]
        full |= {i for i in rest if raw[i] == over}


_SHARES: dict[str, Shares] = {"uniform": uniform, "erk": erk}
_SCORES = {"snip": snip_scores, "snip_layers": snip_scores, "grasp": grasp_scores}
NAMES = (*_SHARES, *_SCORES, "weights")


@torch.no_grad()
def allocate(
    groups: Sequence[SparseGroup],
    density: float,
    by: Allocation,
    generators: Callable[[SparseGroup], torch.Generator],
    probe: Probe | None = None,
) -> list[Tensor]:
    """The first mask of each group.

    Args:
        groups: what to mask; nothing in them changes.
        density: in (0, 1]; nothing where ``by`` is ``weights`` or a dict.
        by: the name of an allocation, or masks.
        generators: what decides by chance, for each group.
        probe: the model and its data, for those that need them.

    Raises:
        ValueError: for an unknown name, data that is needed and missing, or masks that do not fit.
    """
    if not isinstance(by, str):
        if surplus := sorted({*by} - {member.name for group in groups for member in group.members})[:3]:
            raise ValueError(f"there are masks for {', '.join(surplus)}, which no group here has")
        return [_saved(group, by) for group in groups]
    if by not in NAMES:
        raise unknown("allocation", by, NAMES)
    if by == "weights":
        return [_nonzero(group) for group in groups]
    scores: list[Tensor] | None = None
    if by in _SHARES:
        wanted = _SHARES[by](groups, density)
    elif probe is None:
        raise ValueError(f"allocation {by!r} needs data: give calibration=Calibration([(inputs, targets), ...])")
    else:
        scores = [s.to(g.mask.device) for s, g in zip(_SCORES[by](probe, groups), groups, strict=True)]
        wanted = _by_scores(groups, scores, density)
    masks: list[Tensor] = []
    for i, (group, count) in enumerate(zip(groups, quotas(groups, wanted, density), strict=True)):
        generator = generators(group)
        if scores is None or by == "snip_layers":
            score = torch.rand(group.shape, generator=generator, device=group.mask.device)
        else:
            score = scores[i]
        masks.append(highest(group.in_rows(score), group.allowed(), count, generator).view(group.shape))
    return masks


def quotas(groups: Sequence[SparseGroup], wanted: Sequence[float], density: float) -> list[Tensor]:
    """How many entries of each row are active, ``[rows]`` for each group, near the ``wanted`` number of each group.

    In all they are exactly ``density`` of the reachable entries, rounded. Groups with several rows have as many in each
    row, as far as they can be reached, so these alone are a little off their share.
    """
    free = [i for i, group in enumerate(groups) if group.rows == 1]
    total = round(density * sum(groups[i].capacity for i in free))
    counts = dict(zip(free, _whole([wanted[i] for i in free], [groups[i].capacity for i in free], total), strict=True))
    results: list[Tensor] = []
    for i, (group, share) in enumerate(zip(groups, wanted, strict=True)):
        each = counts[i] if i in counts else group.fixed or max(round(share / group.rows), 1)
        results.append(group.allowed().sum(1).clamp(max=each))
    return results


def _whole(wanted: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers near the ``wanted`` ones, from 1 (or 0 of none) to ``most``, which add up to ``total``."""
    least = [min(1, limit) for limit in most]
    counts = [min(max(int(w), low), limit) for w, low, limit in zip(wanted, least, most, strict=True)]
    missing = min(max(total, sum(least)), sum(most)) - sum(counts)
    step = 1 if missing > 0 else -1
    order = sorted(range(len(counts)), key=lambda i: (wanted[i] - counts[i]) * step, reverse=True)
    while missing:
        room = [i for i in order if counts[i] != (most[i] if step > 0 else least[i])]
        each = max(abs(missing) // len(room), 1)
        for i in room[: abs(missing)]:
            moved = min(each, most[i] - counts[i] if step > 0 else counts[i] - least[i])
            counts[i] += step * moved
            missing -= step * moved
    return counts


def _by_scores(groups: Sequence[SparseGroup], scores: Sequence[Tensor], density: float) -> list[float]:
    """How many of the highest scores of all groups fall into each; of equal ones the groups have equal shares."""
    found = [score.flatten()[group.allowed().flatten()] for group, score in zip(groups, scores, strict=True)]
    everything = torch.cat([f.to(found[0].device) for f in found])
    count = max(round(density * len(everything)), 1)
    last = everything.topk(count, sorted=False).values.min()
    above = [int((f > last).sum()) for f in found]
    ties = [int((f == last).sum()) for f in found]
    share = (count - sum(above)) / max(sum(ties), 1)
    return [a + share * t for a, t in zip(above, ties, strict=True)]


def _nonzero(group: SparseGroup) -> Tensor:
    used = [member.sums((member.weight != 0).long(), len(group.shape)) for member in group.members]
    return _fitting(group, torch.stack(used).sum(0) > 0)


def _saved(group: SparseGroup, masks: Mapping[str, Tensor]) -> Tensor:
    if group.name not in masks:
        raise ValueError(f"there is no mask for {group.name} among the {len(masks)} given")
    mask = masks[group.name]
    if mask.shape != group.shape:
        raise ValueError(f"the mask of {group.name} must be {[*group.shape]}, got {[*mask.shape]}")
    return _fitting(group, mask.to(group.mask.device) != 0)


def _fitting(group: SparseGroup, mask: Tensor) -> Tensor:
    """The mask without what cannot be reached, if each row has as many entries as it must have."""
    mask = mask & group.allowed().view(group.shape)
    each = group.in_rows(mask).sum(1)
    most = group.fixed or int(each.max())
    if group.rows > 1 and not torch.equal(each, group.allowed().sum(1).clamp(max=most)):
        wanted = f"{group.fixed} entries" if group.fixed else "as many entries"
        raise ValueError(f"the mask of {group.name} does not have {wanted} in each row of {group.row}")
    return mask
