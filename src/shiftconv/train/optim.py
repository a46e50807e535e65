"""The optimiser and its schedules, from timm. Rate and weight decay change with each update, not with each epoch."""

import math
from collections.abc import Iterable
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from shiftconv.names import unknown
from shiftconv.nn import offset_parameters
from shiftconv.train.layer_decay import layer_scales
from shiftconv.train.settings import Optim


def create_optimizer(model: nn.Module, optim: Optim, beside: Iterable[nn.Module] = ()) -> Optimizer:
    """The optimiser of a recipe over the parameters that train.

    Args:
        model: the network.
        optim: the settings.
        beside: what trains beside the network, such as a distillation's projection.

    Raises:
        ValueError: for an unknown name, or if the network cannot say which layers it has and ``layer_decay`` asks.
    """
    # timm's "sgd" means Nesterov's momentum, its "momentum" the plain one; the others ignore the momentum given here.
    name = ("sgd" if optim.nesterov else "momentum") if optim.name == "sgd" else optim.name
    known = [str(known) for known in list_optimizers()]
    if name.removeprefix("lookahead_") not in known:
        raise unknown("optimiser", optim.name, known)
    more = {key: value for key, value in (("betas", optim.betas), ("eps", optim.eps)) if value is not None}
    optimizer = create_optimizer_v2(
        parameter_groups(model, optim, beside),
        opt=name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        **more,  # pyright: ignore[reportArgumentType]
    )
    if unused := [key for key in more if key not in optimizer.defaults]:  # timm drops them
        raise ValueError(f"the optimiser {optim.name} does not take {' and '.join(unused)}")
    return optimizer


def parameter_groups(model: nn.Module, optim: Optim, beside: Iterable[nn.Module] = ()) -> list[dict[str, Any]]:
    """Parameters of one rate and one weight decay each.

    The offsets of learned shifts have a group of their own, with their own weight decay. None have what the network
    excepts (``no_weight_decay``), biases and every parameter of one axis, such as those of norms and scales, but with
    ``decay_norms``.
    """
    excepted = getattr(model, "no_weight_decay", set)()  # of timm's networks
    offsets = {id(offset) for offset in offset_parameters(model)}
    scales = {} if optim.layer_decay == 1 else layer_scales(
        model, optim.layer_decay, optim.layer_decay_by, optim.layer_decay_levels
    )  # fmt: skip
    named = [*model.named_parameters(), *(pair for module in beside for pair in module.named_parameters())]
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        small = parameter.ndim <= 1 or name.endswith(".bias")
        moves, scale = id(parameter) in offsets, scales.get(name, 1.0)
        if moves:
            scale, decay = scale * optim.offset_lr_scale, optim.offset_decay
        else:
            decay = optim.weight_decay if optim.decay_norms or not (small or name in excepted) else 0.0
        groups.setdefault((scale, decay, moves), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay, "offsets": moves}
        for (scale, decay, moves), parameters in groups.items()
    ]


class Schedules:
    """Learning rate and weight decay of the groups; call ``step_update(n)`` before the n-th update, counted from 0."""

    def __init__(self, optimizer: Optimizer, optim: Optim, epochs: int, updates_per_epoch: int) -> None:
        self.rate = create_scheduler(optimizer, optim, epochs, updates_per_epoch)
        self._start, self._end, self._updates = optim.weight_decay, optim.weight_decay_end, epochs * updates_per_epoch
        self._freeze = math.inf if optim.freeze_offsets_after is None else optim.freeze_offsets_after * self._updates
        self._optimizer = optimizer  # loading a state makes its groups anew

    def step_update(self, update: int) -> None:
        self.rate.step_update(update)
        if self._end is not None:
            share = (1 + math.cos(math.pi * update / self._updates)) / 2
            for group in self._optimizer.param_groups:
                if group["weight_decay"] > 0 and not group["offsets"]:
                    group["weight_decay"] = self._end + (self._start - self._end) * share
        if update >= self._freeze:
            for group in self._optimizer.param_groups:
                group["lr"] = 0.0 if group["offsets"] else group["lr"]

    def state_dict(self) -> dict[str, Any]:
        return self.rate.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate.load_state_dict(state)


def create_scheduler(optimizer: Optimizer, optim: Optim, epochs: int, updates_per_epoch: int) -> Scheduler:
    """The schedule of the rate, of timm; call ``step_update(n)`` before the n-th update, counted from 0.

    Args:
        optimizer: whose rate to set.
        optim: the settings; their milestones and warm-up count epochs.
        epochs: of the whole run.
        updates_per_epoch: of the weights.
    """
    warmup = round(optim.warmup_epochs * updates_per_epoch)
    rest = epochs * updates_per_epoch - warmup
    if optim.schedule == "cosine" and rest > 1:  # one update, or none, is at the full rate: the constant schedule
        scheduler: Scheduler = CosineLRScheduler(
            optimizer,
            t_initial=rest,
            lr_min=optim.min_lr,
            warmup_t=warmup,
            warmup_lr_init=optim.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
    else:
        milestones = optim.milestones if optim.schedule == "step" else ()
        scheduler = MultiStepLRScheduler(
            optimizer,
            decay_t=[milestone * updates_per_epoch + 1 for milestone in milestones],  # timm drops at t + 1
            decay_rate=optim.gamma,
            warmup_t=warmup,
            warmup_lr_init=optim.warmup_lr,
            warmup_prefix=False,
            t_in_epochs=False,
        )
    # The last update of the warm-up is at the full rate, as numpy.linspace has it and the authors of SLaK.
    scheduler.warmup_steps = [(rate - optim.warmup_lr) / max(1, warmup - 1) for rate in scheduler.base_values]
    return scheduler
