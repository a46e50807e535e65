"""The sparse training of a run: its recipe's settings in steps and modules."""

from torch import nn
from torch.optim import Optimizer

from shiftconv.nn import DilatedReparamConv2d, LargeKernelConv2d, ShiftwiseConv2d
from shiftconv.sparse import Calibration, Schedule, SparseTraining, groups
from shiftconv.train.data.loader import Batch
from shiftconv.train.device import Compute
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Layers, Sparsity

_LARGE_KERNELS = (LargeKernelConv2d, ShiftwiseConv2d, DilatedReparamConv2d)


def create_sparse(
    model: nn.Module, optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int, first: Batch | None
) -> SparseTraining | None:
    """What keeps the network sparse; None at density 1.

    Args:
        model: on its device.
        optimizer: of its parameters.
        recipe: of the run.
        steps_per_epoch: updates of the weights.
        first: the images that choose the first masks, and tell what their size cannot reach; None: the masks are going
            to be loaded.

    Raises:
        ValueError: for settings that do not fit each other or the network.
    """
    settings = recipe.sparse
    if settings.density == 1:
        return None
    compute = Compute(next(model.parameters()).device, channels_last=recipe.channels_last)
    loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    masks = groups(model, settings.granularity, lambda module: is_selected(module, settings.layers))
    return SparseTraining(
        model,
        optimizer,
        settings.density,
        "uniform" if first is None else settings.allocate,
        settings.rule,
        masks,
        _schedule(settings, recipe.seed, recipe.epochs, steps_per_epoch),
        None if first is None else Calibration([compute.move(first)], loss),
    )


def is_selected(module: nn.Module, layers: Layers) -> bool:
    """Whether a module is one of the recipe's ``layers``."""
    if layers == "large_kernels":
        return isinstance(module, _LARGE_KERNELS)
    if layers == "pointwise":
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        return pointwise or isinstance(module, nn.Linear)
    return True


def _schedule(settings: Sparsity, seed: int, epochs: int, steps_per_epoch: int) -> Schedule:
    first, last = (round(epoch * steps_per_epoch) for epoch in settings.density_epochs)
    return Schedule(
        every_steps=settings.every_steps,
        prune_fraction=settings.prune_fraction,
        steps=epochs * steps_per_epoch,
        decay=settings.decay,
        final_fraction=settings.final_fraction,
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        stop_fraction=settings.stop_fraction,
        share_every=settings.share_every,
        start_density=settings.start_density,
        density_steps=(first, max(last, first + 1)),
        seed=seed,
    )
