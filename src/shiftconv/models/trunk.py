"""What the networks share: timm's protocols for head, features and checkpointing, and the checks of their arguments."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, Literal, TypedDict, get_args

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiftconv.names import unknown
from shiftconv.nn.learned_shift import LearnedShift

GlobalPool = Literal["avg", "max", "avgmax", "catavgmax", ""]
"""How the last map becomes a vector; empty: it stays a map, for a network without classifier."""


class HeadArgs(TypedDict, total=False):
    """The arguments of a head: classes (0: no classifier), pooling, and dropout before the classifier."""

    num_classes: int
    global_pool: GlobalPool
    drop_rate: float


class TrunkArgs(HeadArgs, total=False):
    """The arguments that all networks share: those of the head, and the channels of the images."""

    in_chans: int


class Trunk(nn.Module):
    """A network for images ``[N, in_chans, H, W]``, with a linear classifier ``linear`` for ``[N, num_classes]``.

    A subclass builds ``conv1`` and what belongs to it, its stages by :meth:`_add_stage`, what follows them and, by
    :meth:`_add_head`, the head; its ``forward_features`` says how they follow each other. Stages are ``layer1`` ...,
    the only children that are ``nn.Sequential``.
    """

    def __init__(self, in_chans: int):
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        self.in_chans, self.grad_checkpointing = in_chans, False
        self.feature_info: list[dict[str, Any]] = []

    def _add_stage(self, blocks: Iterable[nn.Module], channels: int, reduction: int) -> None:
        """The next stage; it gives ``channels`` at 1 / ``reduction`` of the size of the image."""
        name = f"layer{len(self._stages()) + 1}"
        self.add_module(name, nn.Sequential(*blocks))
        self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=name))

    def _stages(self) -> list[nn.Sequential]:
        return [child for child in self.children() if isinstance(child, nn.Sequential)]

    def _add_head(
        self, num_features: int, num_classes: int = 1000, global_pool: GlobalPool = "avg", drop_rate: float = 0.0
    ) -> None:
        """The layers after ``forward_features``; ``num_features`` are the channels that it gives."""
        self.num_features = num_features
        self.head_drop = nn.Dropout(rate("drop_rate", drop_rate))
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """A new classifier for ``num_classes``, or none for 0; ``global_pool`` None keeps the pooling."""
        pool: str = self.global_pool.pool_type if global_pool is None else global_pool
        if pool not in get_args(GlobalPool):
            raise unknown("global_pool", pool, get_args(GlobalPool))
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if num_classes and not pool:
            raise ValueError(f"global_pool '' gives maps, which a classifier of {num_classes} classes cannot take")
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        where = next(self.parameters())
        self.linear = nn.Identity()
        if num_classes:
            self.linear = nn.Linear(self.head_hidden_size, num_classes, device=where.device, dtype=where.dtype)
        for new in (self.global_pool, self.linear):
            new.train(self.training)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        return "linear" if name_only else self.linear

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass keeps the inputs of the blocks only, and computes the rest again: less memory."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str] | Callable[[str], float]:
        """The patterns by which timm groups parameters for layer-wise learning rates; the rest goes with the head."""
        return dict(stem=r"^conv1|^bn1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    def no_weight_decay(self) -> set[str]:
        """The parameters without weight decay whatever a recipe says: the learned shifts, as in their papers."""
        return {f"{name}.offset" for name, module in self.named_modules() if isinstance(module, LearnedShift)}

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images [N, {self.in_chans}, H, W], got {[*x.shape]}")

    def _through(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return blocks(x)
        for block in blocks:
            x = _checkpointed(block, x)
        return x

    def _through_stages(self, x: Tensor) -> Tensor:
        for blocks in self._stages():
            x = self._through(blocks, x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def stage(
    block: Callable[..., nn.Module], in_chs: int, chs: int, stride: int, rates: Iterable[float]
) -> list[nn.Module]:
    """One block per drop path rate. The first goes from ``in_chs`` to ``chs`` channels and has the stride."""
    extra = [dict(drop_path=rate) if rate else {} for rate in rates]  # a block without shortcut does not know it
    first = block(in_chs, chs, stride, **extra[0])
    return [first, *(block(chs, chs, 1, **more) for more in extra[1:])]


def drop_path_rates(value: float, depths: Iterable[int]) -> list[list[float]]:
    """One rate for each block of each stage, from 0 at the first to ``value`` at the last."""
    depths = list(depths)
    steps = torch.linspace(0, rate("drop_path_rate", value), sum(depths), device="cpu").tolist()
    return [steps[end - depth : end] for depth, end in zip(depths, accumulate(depths), strict=True)]


def rate(name: str, value: float) -> float:
    """``value``, if it is the probability of leaving something out."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return value


def positive(name: str, value: float) -> float:
    """``value``, if it is a finite number above 0. For whole numbers see :mod:`shiftconv.nn.arguments`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {value!r}")
    return value


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run ``block`` without keeping its activations; recomputing them leaves the batch statistics alone."""
    if torch.compiler.is_compiling():  # the compiler traces the block once, and takes no contexts
        return checkpoint(block, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _untracked(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _untracked(block: nn.Module) -> Iterator[None]:
    """A second pass over the same batch must not count twice in the running statistics: it gets copies of them."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
