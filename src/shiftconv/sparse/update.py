"""One exchange of connections: the weakest leave, as many come back elsewhere. Nothing here changes a mask."""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shiftconv.sparse.group import Member, SparseGroup, highest
from shiftconv.sparse.rule import Evidence, Rule, Score, chance, magnitude

Look = Callable[[Member], Evidence]


def score_entries(group: SparseGroup, score: Score, look: Look) -> Tensor:
    """The mean score of the weights of each entry, ``[rows, row]``, in float32 or wider."""
    parts = [member.sums(_score(score, look(member)), len(group.shape)) for member in group.members]
    return group.in_rows(torch.stack(parts).sum(0) * (group.size / group.weights))


def exchange(
    active: Tensor,
    allowed: Tensor,
    target: Tensor,
    fraction: float,
    scores: tuple[Tensor, Tensor],
    rule: Rule,
    generator: torch.Generator,
) -> Tensor:
    """The mask after an exchange.

    Args:
        active: the mask, ``[R, L]``; entries compete in their row.
        allowed: which entries may be active.
        target: how many entries of each row shall be active then, ``[R]``.
        fraction: the share of them that is exchanged.
        scores: of pruning, infinite for what must stay, and of regrowing.
        rule: which threshold, and how much by chance.
        generator: for chance and ties.
    """
    prune, regrow = scores
    before = active.sum(1)
    surplus = (before - target).clamp(min=0)
    leaving = _ceil(fraction, torch.minimum(before, target)) if rule.prune is not None else torch.zeros_like(before)
    if not math.isinf(rule.threshold):
        leaving = torch.minimum(leaving, (active & (prune < rule.threshold)).sum(1))
    kept = active & ~highest(-prune, active & ~prune.isposinf(), surplus + leaving, generator)
    missing = target - kept.sum(1)
    by_chance = torch.round(rule.explore * missing.double()).long()
    after = kept | highest(regrow, allowed & ~kept, missing - by_chance, generator)
    if rule.explore:
        luck = torch.rand(prune.shape, generator=generator, device=prune.device)
        after |= highest(luck, allowed & ~after, target - after.sum(1), generator)
    return after


def exchange_all(
    groups: Sequence[SparseGroup],
    targets: Sequence[Tensor],
    fraction: float,
    rule: Rule,
    scores: Sequence[tuple[Tensor, Tensor]],
    generators: Callable[[SparseGroup], torch.Generator],
) -> list[Tensor]:
    """The new mask of each group; by the rule's scope entries compete in their layer or with those of all layers."""
    if rule.scope == "layer":
        return [
            exchange(g.in_rows(g.mask), g.allowed(), target, fraction, pair, rule, generators(g))
            for g, target, pair in zip(groups, targets, scores, strict=True)
        ]
    device = groups[0].mask.device
    active, allowed, prune, regrow = (
        torch.cat([part.to(device) for part in parts], 1)
        for parts in (
            [g.in_rows(g.mask) for g in groups],
            [g.allowed() for g in groups],
            [_with_one_safe(g, pair[0]) for g, pair in zip(groups, scores, strict=True)],
            [pair[1] for pair in scores],
        )
    )
    target = torch.stack([t.to(device) for t in targets]).sum(0)
    after = exchange(active, allowed, target, fraction, (prune, regrow), rule, generators(groups[0]))
    parts = after.split([g.size for g in groups], 1)
    return [part.to(g.mask.device) for part, g in zip(parts, groups, strict=True)]


def score_all(groups: Sequence[SparseGroup], rule: Rule, look: Look) -> list[tuple[Tensor, Tensor]]:
    """The scores of pruning and of regrowing of each group."""
    prune = rule.prune or magnitude
    return [(score_entries(g, prune, look), score_entries(g, _regrow(g, rule), look)) for g in groups]


def _regrow(group: SparseGroup, rule: Rule) -> Score:
    """Chance, where what is not active has no gradient that could tell anything."""
    return chance if any(member.redraw for member in group.members) else rule.regrow


def _with_one_safe(group: SparseGroup, prune: Tensor) -> Tensor:
    """Scores with the strongest active entry of a layer above all others, so that no layer dies."""
    best = prune.masked_fill(~group.in_rows(group.mask), -torch.inf).argmax()
    return prune.flatten().index_fill(0, best, torch.inf)[None]


def _ceil(fraction: float, count: Tensor) -> Tensor:
    return torch.ceil(fraction * count.double()).long()


def _score(score: Score, of: Evidence) -> Tensor:
    found = score(of)
    if not isinstance(found, Tensor) or found.shape != of.weight.shape:  # pyright: ignore[reportUnnecessaryIsInstance]
        came = [*found.shape] if isinstance(found, Tensor) else type(found).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"a score of {of.name} must be a tensor {[*of.weight.shape]}, got {came}")
    return found.to(torch.promote_types(found.dtype, torch.float32))
