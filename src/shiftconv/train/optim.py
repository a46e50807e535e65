"""The optimiser and its learning rate, from timm. The rate changes with each update, not with each epoch."""

from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from shiftconv.nn import offset_parameters
from shiftconv.train.settings import Optim


def create_optimizer(model: nn.Module, optim: Optim) -> Optimizer:
    """The optimiser of a recipe over the parameters that train; the offsets of learned shifts take no weight decay."""
    # timm's "sgd" means Nesterov's momentum, its "momentum" the plain one; the others ignore the momentum given here.
    name = ("sgd" if optim.nesterov else "momentum") if optim.name == "sgd" else optim.name
    offsets = {id(offset) for offset in offset_parameters(model)}
    parameters = model
    if offsets and optim.decay_norms:  # without it timm asks the model itself what takes no decay
        trained = [p for p in model.parameters() if p.requires_grad]
        moved = [p for p in trained if id(p) in offsets]
        parameters = [
            {"params": [p for p in trained if id(p) not in offsets]},
            {"params": moved, "weight_decay": 0.0},
        ]
    return create_optimizer_v2(
        parameters,
        opt=name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        filter_bias_and_bn=not optim.decay_norms,
    )


def create_scheduler(optimizer: Optimizer, optim: Optim, epochs: int, updates_per_epoch: int) -> Scheduler:
    """The schedule, of timm; call ``step_update(n)`` before the n-th update, counted from 0.

    Args:
        optimizer: whose rate to set.
        optim: the settings; their milestones and warm-up count epochs.
        epochs: of the whole run.
        updates_per_epoch: of the weights.
    """
    warmup = round(optim.warmup_epochs * updates_per_epoch)
    rest = epochs * updates_per_epoch - warmup
    if optim.schedule == "cosine" and rest > 1:  # one update, or none, is at the full rate: the constant schedule
        return CosineLRScheduler(
            optimizer,
            t_initial=rest,
            lr_min=optim.min_lr,
            warmup_t=warmup,
            warmup_lr_init=optim.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
    milestones = optim.milestones if optim.schedule == "step" else ()
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[milestone * updates_per_epoch + 1 for milestone in milestones],  # timm drops at t + 1
        decay_rate=optim.gamma,
        warmup_t=warmup,
        warmup_lr_init=optim.warmup_lr,
        warmup_prefix=False,
        t_in_epochs=False,
    )
