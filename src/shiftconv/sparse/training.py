"""Sparse training of any model with any optimiser: masks that follow the optimiser's steps by themselves.

Sources: Liu et al., "More ConvNets in the 2020s", ICLR 2023, arXiv:2207.03620, section 3.3; Evci et al. 2020,
arXiv:1911.11134 (RigL); Liu et al. 2021, arXiv:2102.02887 (in-time over-parameterization: exploration).
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import gc
import hashlib
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shiftconv.sparse import ranks
from shiftconv.sparse.allocate import Allocation, allocate, quotas
from shiftconv.sparse.arguments import check_arguments, find_rule
from shiftconv.sparse.average import averaging
from shiftconv.sparse.calibration import Calibration, Probe, find_reachable
from shiftconv.sparse.granularity import Granularity, groups
from shiftconv.sparse.group import Member, SparseGroup
from shiftconv.sparse.hooks import OnLoad, follow
from shiftconv.sparse.moments import clear, states
from shiftconv.sparse.report import SparsityReport, report
from shiftconv.sparse.rule import Evidence, Rule, chance
from shiftconv.sparse.saved import pack, unpack
from shiftconv.sparse.schedule import Schedule
from shiftconv.sparse.update import exchange_all, score_all

_ENOUGH = 32  # weights, that all of them being zero is no accident
_TRAININGS: "weakref.WeakSet[SparseTraining]" = weakref.WeakSet()  # that are not detached


class SparseTraining:
    """Keeps a model sparse while an optimiser trains it, and moves the connections from time to time.

    It follows ``optimizer.step()``; nothing else in a training loop changes. Weights that are not active are exactly
    zero after each step and their gradients never reach the optimiser's averages. A step that a gradient scaler leaves
    out does not count. The number of active entries is exact, always. With several processes all have the same masks.

    Save ``state_dict()`` with the model and the optimiser. To go on make this object first, then load the model and the
    optimiser, and this last: training goes on as if it had never stopped. Where gradients are clipped, call
    :meth:`mask_gradients` before, so that dead weights do not count.

    Args:
        model: any model, on its device; also one in ``DistributedDataParallel`` or compiled.
        optimizer: any optimiser of torch's kind, timm's among them, that holds the model's parameters.
        density: the share of the entries that is active, in (0, 1]; of those that can matter, if ``calibration`` is
            given: taps that no output can reach are never active, and do not count. Masks that are given, or zeros that
            are there, have their own.
        allocate: how layers share the density and which entries come first: uniform, erk, snip, snip_layers, grasp,
            weights (what is not zero), or a dict of masks by the name of their group, as :attr:`masks`; see
            :mod:`shiftconv.sparse.allocate`.
        rule: what leaves and what comes back: static, set, set_signed, rigl, snfs, mixed, or a :class:`Rule`.
        granularity: what an entry of a mask is: weight, kernel, kernel:4, channel, hidden, 2:4, fan_in, or a
            :class:`Granularity`; or the groups themselves, from :func:`groups`, which can select layers.
        schedule: when masks change, and how much of them.
        calibration: some data, for snip and grasp, and to find what can be reached by inputs of its size.

    Raises:
        TypeError: for arguments of other kinds, or parameters in pieces (FSDP).
        ValueError: for values that do not fit, no selected layer, parameters that the optimiser does not have, or that
            have masks already; nothing has changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        density: float = 0.5,
        allocate: Allocation = "erk",
        rule: str | Rule = "rigl",
        granularity: str | Granularity | Sequence[SparseGroup] = "weight",
        schedule: Schedule | None = None,
        calibration: Calibration | None = None,
    ):
        check_arguments(model, optimizer, density, allocate, granularity, schedule, calibration)
        self.optimizer, self.density, self.schedule = optimizer, float(density), schedule or Schedule()
        self.rule = find_rule(rule)
        self.steps = self.updates = 0
        self._postponed = False
        self._gradients: dict[Member, Tensor | None] = {}  # of all weights, for an update after the step
        self._module = _unwrapped(model)
        if isinstance(granularity, str | Granularity):
            granularity = groups(self._module, granularity)
        shared = [*granularity]
        self._check_groups(shared)
        if calibration is not None:
            calibration = Calibration([*calibration.batches], calibration.loss)
        reachable = [group.reachable for group in shared]
        try:
            self._start(shared, allocate, calibration)
        except BaseException:
            for group, before in zip(shared, reachable, strict=True):
                group.reachable = before
            raise
        if not isinstance(allocate, str) or allocate == "weights":
            self.density = self.active / sum(group.capacity for group in self.groups)
        _TRAININGS.add(self)
        self._loading = OnLoad(self._module, self._apply)
        self._apply()
        if not self.rule.dense_moments:
            clear(optimizer, self.groups, [group.mask for group in self.groups])
        self._handle = follow(optimizer, self._before_step, self._after_step, self.mask_gradients)
        if self.rule.prune is not None and self.schedule.updates == 0:
            warnings.warn(f"the masks never move: no update falls into {self.schedule.steps} steps", stacklevel=2)

    def __repr__(self) -> str:
        entries = f"{self.active:,} of {sum(group.capacity for group in self.groups):,} entries"
        return f"SparseTraining({len(self.groups)} masks, {entries}, {self.updates} updates in {self.steps} steps)"

    def _check_groups(self, shared: Sequence[SparseGroup]) -> None:
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        if not shared:
            raise ValueError("no layer is selected; sparse training needs at least one")
        names = [group.name for group in shared]
        if len({*names}) < len(names):
            raise ValueError(f"{max(names, key=names.count)} has more than one mask")
        if taken := _masked(shared):
            raise ValueError(f"{taken} has masks of another SparseTraining; detach() that one first")
        if self.schedule.start_density is not None and self.schedule.start_density < self.density:
            raise ValueError(f"the density falls, from start_density={self.schedule.start_density} to {self.density}")
        for member in (member for group in shared for member in group.members):
            if member.weight.is_meta:
                raise ValueError(f"{member.name} is on the meta device: it has no numbers to mask")
            if id(member.weight) not in held:
                raise ValueError(f"the optimizer does not hold {member.name}, which the masks are for")
        for group in shared:
            if group.fixed is not None and not math.isclose(self.density, group.fixed / group.row):
                raise ValueError(
                    f"{group.fixed}:{group.row} is a density of {group.fixed / group.row:g}, got density={self.density}"
                )
            if group.rows > 1 and self.rule.scope == "global":
                raise ValueError("a rule of global scope needs masks without rows; 2:4 and fan_in prescribe each row")
            if group.fixed is not None and self.schedule.start_density is not None:
                raise ValueError(f"the density of {group.fixed}:{group.row} cannot fall; leave start_density out")

    def _start(self, shared: list[SparseGroup], by: Allocation, calibration: Calibration | None) -> None:
        """Find and set the first masks."""
        probe = None
        if calibration is not None:
            inputs = next((batch[0] for batch in calibration.batches), None)
            if inputs is None:
                raise ValueError("the calibration has no batch; a loader that was used up has none left")
            probe = Probe(self._module, calibration)
            found = find_reachable(self._module, shared, inputs)
            dense = [
                torch.ones_like(g.mask) if reach is None else reach for g, reach in zip(shared, found, strict=True)
            ]
            for group, reach in zip(shared, ranks.broadcast(dense), strict=True):
                group.reachable = None if reach.all() else reach
        density = self.schedule.density(0, self.density)
        masks = ranks.broadcast(allocate(shared, density, by, self._generator_of("first"), probe))
        for group, mask in zip(shared, masks, strict=True):
            group.mask = mask
        self._shared = {group: group.apart() for group in shared if group.paths and self.schedule.share_every > 1}
        self.groups = [each for group in shared for each in self._shared.get(group, [group])]
        for path in (path for paths in self._shared.values() for path in paths):
            if isinstance(by, Mapping) and path.name in by:
                path.mask = by[path.name].to(path.mask.device) != 0

    @property
    def masks(self) -> dict[str, Tensor]:
        """The mask of each group by its name; bool tensors, which are the training's own."""
        return {group.name: group.mask for group in self.groups}

    @property
    def active(self) -> int:
        """How many entries are active in all."""
        return sum(group.active for group in self.groups)

    def mask_gradients(self) -> None:
        """Set the gradients of inactive weights to zero: once per step, before gradients are clipped."""
        self._gradients = {}
        self._before_step()

    def averaging(self, average: nn.Module) -> AbstractContextManager[None]:
        """Keep an average of the weights sparse too: ``with sparse.averaging(ema.module): ema.update(model)``.

        What was regrown since it was last averaged takes the weight as it is, and what is inactive is zero.

        Args:
            average: the averaged copy, whose parameters have the names of the model's.
        """
        return averaging(average, self.groups)

    def report(self) -> SparsityReport:
        """What the masks look like, layer by layer; ``print`` it or ``plot`` it."""
        return report(self.groups, self.steps, self.updates)

    def detach(self) -> None:
        """Stop following the optimiser; the weights stay as they are."""
        _TRAININGS.discard(self)
        self._handle.remove()
        self._loading.remove()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: tensors and plain values; ``torch.load(weights_only=True)`` reads it."""
        return {
            "version": 1,
            "steps": self.steps,
            "updates": self.updates,
            "postponed": self._postponed,
            "density": self.density,
            "groups": {group.name: pack(group) for group in self.groups},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; make this object first, then load the model and the optimiser, and this last.

        Raises:
            ValueError: if it is damaged, of other layers, another granularity or density, or of other weights than
                those of the model; nothing has changed then.
        """
        saved = unpack(state, self.groups)
        if state["density"] != self.density:
            raise ValueError(f"the saved sparse training has density {state['density']}, this one {self.density}")
        self._check_weights([one.active for one in saved])
        self.steps, self.updates = state["steps"], state["updates"]
        self._postponed = state["postponed"]
        for group, one in zip(self.groups, saved, strict=True):
            group.mask, group.reachable, group.exchanged = one.active, one.reachable, one.exchanged
            group.explored.copy_(one.explored)
            group.rested.copy_(one.rested)
        for shared, paths in self._shared.items():
            shared.reachable = paths[0].reachable
        self._apply()

    def _check_weights(self, masks: Sequence[Tensor]) -> None:
        """The first masks of this object must not have wiped out weights that the saved ones keep."""
        new = used = 0
        for group, mask in zip(self.groups, masks, strict=True):
            returning = mask & ~group.mask
            new += int(returning.sum())
            for member in group.members:
                used += int((member.view(member.weight) != 0)[returning].sum())
        if new >= _ENOUGH and not used:
            raise ValueError(
                f"{new} weights that the saved masks keep are all zero in the model: make SparseTraining first, then "
                "load the model and the optimiser, and its state last"
            )

    @torch.no_grad()
    def _apply(self) -> None:
        for group in self.groups:
            group.apply()
        self._loading.done()

    def _is_due(self) -> bool:
        """Whether an update follows the step that comes next."""
        moves = self.rule.prune is not None or self.schedule.start_density is not None
        return moves and (self._postponed or self.schedule.is_due(self.steps + 1))

    def _before_step(self) -> None:
        """Keep the gradients of dead weights from the optimiser; an update after the step may need them."""
        if self._loading.waits:
            self._apply()
        if self.rule.dense_moments:
            return
        members = [member for group in self.groups for member in group.members]
        if self._is_due() and self.rule.regrow is not chance and not self._gradients:
            grads = ((member, member.weight.grad) for member in members)
            self._gradients = {member: None if grad is None else grad.clone() for member, grad in grads}
        for group in self.groups:
            group.mask_gradients()

    @torch.no_grad()
    def _after_step(self) -> None:
        due = self._is_due()
        self.steps += 1
        self._apply()
        try:
            if due:
                self.update()
        finally:
            self._gradients = {}

    @torch.no_grad()
    def update(self) -> None:
        """Exchange connections now, as the schedule does of itself; by the gradients that the weights have now.

        Raises:
            RuntimeError: the rule needs gradients, or averages of them, that are not there; nothing has changed then.
        """
        number = self.updates + 1
        common = number % self.schedule.share_every == 0
        units = [g for g in self.groups if not (common and any(g in paths for paths in self._shared.values()))]
        for shared, paths in self._shared.items() if common else ():
            shared.mask = paths[0].mask
            units.append(shared)
        masks = self._decide(units)
        self._postponed = masks is None
        if masks is None:
            return
        self.updates = number
        new = {g: mask.view(g.shape) for u, mask in zip(units, masks, strict=True) for g in self._shared.get(u, [u])}
        kept = [self._set(group, mask) for group, mask in new.items()]
        if not self.rule.dense_moments:
            clear(self.optimizer, [*new], kept)
        self._apply()

    def _decide(self, units: Sequence[SparseGroup]) -> list[Tensor] | None:
        """The next mask of each, the same on all processes; None if the gradients are not finite, so it must wait."""
        found = states(self.optimizer)

        def look(member: Member) -> Evidence:
            luck = self._seeded(f"score {member.name}", member.weight.device)
            grad = self._gradients.get(member, member.weight.grad)
            return Evidence(member.name, member.weight, grad, found.get(member.weight, {}), luck)

        scores = score_all(units, self.rule, look)
        if self.rule.regrow is not chance:
            grow = ranks.average([regrow for _, regrow in scores])
            scores = [(prune, mean) for (prune, _), mean in zip(scores, grow, strict=True)]
        if not all(regrow.isfinite().all() for _, regrow in scores):
            return None
        masks = [group.mask for group in units]
        if ranks.decides():
            fraction = self.schedule.fraction(self.steps)
            masks = exchange_all(
                units, self._targets(units), fraction, self.rule, scores, self._generator_of("exchange")
            )
        return ranks.broadcast(masks)

    def _targets(self, units: Sequence[SparseGroup]) -> list[Tensor]:
        """How many entries of each row shall be active after the next update."""
        if self.schedule.start_density is None:
            return [unit.in_rows(unit.mask).sum(1) for unit in units]
        density = self.schedule.density(self.steps, self.density)
        scale = density * sum(unit.capacity for unit in units) / sum(unit.active for unit in units)
        return quotas(units, [unit.active * scale for unit in units], density)

    def _set(self, group: SparseGroup, mask: Tensor) -> Tensor:
        """Give a group its new mask, and return which of its entries have a past."""
        grown = mask & ~group.mask
        for member in group.members:
            if member.redraw:
                self._redraw(member, group, grown)
        group.mask, group.exchanged = mask, int(grown.sum())
        return mask & ~grown

    def _redraw(self, member: Member, group: SparseGroup, grown: Tensor) -> None:
        """Draw what comes back as widely as what is there."""
        seen = member.view(member.weight)
        deviation = seen[group.mask].std(correction=0)
        if not deviation > 0:
            deviation = seen[0].numel() ** -0.5
        generator = self._seeded(f"draw {member.name}", seen.device)
        drawn = torch.randn(seen.shape, generator=generator, device=seen.device) * deviation
        seen.copy_(torch.where(member.spread(grown), drawn.to(seen.dtype), seen))

    def _generator_of(self, purpose: str) -> Callable[[SparseGroup], torch.Generator]:
        return lambda group: self._seeded(f"{purpose} {group.name}", group.mask.device)

    def _seeded(self, purpose: str, device: torch.device) -> torch.Generator:
        """Chance for one purpose in this update alone, so that a resumed run needs no generator's state."""
        text = f"{self.schedule.seed} {self.updates} {purpose}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())
        return torch.Generator(device).manual_seed(seed)


def _masked(groups: Sequence[SparseGroup]) -> str | None:
    """The name of a weight that has masks already, if there is one."""

    def find() -> str | None:
        taken = {id(m.weight) for training in _TRAININGS for group in training.groups for m in group.members}
        return next((m.name for group in groups for m in group.members if id(m.weight) in taken), None)

    if find() is not None:
        gc.collect()  # one that nobody has any more holds on to its optimiser, and that to it
    return find()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers for several processes, and of ``torch.compile``."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel | nn.DataParallel) else None
        inner = inner or dict(model.named_children()).get("_orig_mod")
        if inner is None:
            return model
        model = inner
