"""ShiftResNet and the networks that it was compared with: CIFAR ResNets with five kinds of block.

    resnet             two 3x3 convolutions                  reduction, reduction_mode
    shiftresnet        1x1, grouped 3x3 shift, 1x1           expansion
    depthwiseresnet    1x1, depthwise 3x3, 1x1               reduction, skip
    shuffleresnet      grouped 1x1s with channel shuffle     reduction
    mobileresnet       two depthwise-separable convolutions  reduction

Each in 20, 32, 44, 56 and 110 layers, registered with timm under the family's name and the number. State-dict keys are
those of the released checkpoints.

Source: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018,
arXiv:1711.08141, section 4.1. The last two families and the 32- and 44-layer networks are from its released history.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shiftconv.models.shiftresnet_blocks import BasicBlock, DepthwiseBlock, MobileBlock, ShiftBlock, ShuffleBlock
from shiftconv.names import closest, unknown

DEPTHS = (20, 32, 44, 56, 110)
ReductionMode = Literal["net", "block"]
GlobalPool = Literal["avg", "max", "avgmax", "catavgmax", ""]
"""How the last map becomes a vector; empty: it stays a map, for a network without classifier."""


class TrunkArgs(TypedDict, total=False):
    """The arguments that all families share. The defaults are those of :class:`CifarNet`."""

    num_classes: int
    in_chans: int
    global_pool: GlobalPool
    drop_rate: float


class CifarNet(nn.Module):
    """A 3x3 convolution, three stages of ``(depth - 2) / 6`` blocks each, and a linear classifier.

    The stages are at 1, 1/2 and 1/4 of the image size. Takes ``[N, in_chans, H, W]`` of any size and gives
    ``[N, num_classes]``; answers to timm's feature, head and checkpointing protocols. Every convolution, norm and
    linear layer starts as torch initialises it.

    Args:
        depth: layers with weights along the main path, 6 n + 2.
        block: makes a block from its input channels, its output channels and its stride.
        widths: channels of the stages.
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the images.
        global_pool: one of ``GlobalPool``.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first one.
    """

    def __init__(
        self,
        depth: int,
        block: Callable[..., nn.Module],
        widths: tuple[int, int, int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: GlobalPool = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, got {depth}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        self.in_chans, self.grad_checkpointing = in_chans, False
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        rates = _drop_path_rates(drop_path_rate, 3, (depth - 2) // 6)
        self.layer1 = _stage(block, widths[0], widths[0], 1, rates[0])
        self.layer2 = _stage(block, widths[0], widths[1], 2, rates[1])
        self.layer3 = _stage(block, widths[1], widths[2], 2, rates[2])
        self.feature_info = [dict(num_chs=w, reduction=2**i, module=f"layer{i + 1}") for i, w in enumerate(widths)]
        self.num_features = widths[2]
        self.head_drop = nn.Dropout(_rate("drop_rate", drop_rate))
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
        where = self.conv1.weight
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

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The patterns by which timm groups parameters for layer-wise learning rates."""
        return dict(stem=r"^conv1|^bn1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    def forward_features(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"expected images [N, {self.in_chans}, H, W], got {[*x.shape]}")
        x = self.act1(self.bn1(self.conv1(x)))
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.layer3(self.layer2(self.layer1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = _checkpointed(block, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def resnet(
    depth: int,
    reduction: float = 1.0,
    reduction_mode: ReductionMode = "net",
    project_shortcuts: bool = False,
    drop_path_rate: float = 0.0,
    **trunk: Unpack[TrunkArgs],
) -> CifarNet:
    """The baseline. ``reduction`` divides its parameters, roughly.

    ``reduction_mode`` says where: ``block`` divides the channels inside each block by ``reduction``, ``net`` all
    channels by its square root. ``project_shortcuts`` puts a convolution into the shortcut of every block whose inside
    is narrower or wider than its input, as checkpoints from before 2018 have it.
    """
    _positive("reduction", reduction)
    if reduction_mode not in get_args(ReductionMode):
        raise unknown("reduction_mode", reduction_mode, get_args(ReductionMode))
    in_block, in_net = (reduction, 1.0) if reduction_mode == "block" else (1.0, reduction**0.5)
    widths = (int(16 / in_net), int(32 / in_net), int(64 / in_net))
    if widths[0] < 1:
        raise ValueError(f"reduction={reduction} leaves no channel in the first stage of 16")
    block = partial(BasicBlock, reduction=in_block, project=project_shortcuts)
    return CifarNet(depth, block, widths, drop_path_rate=drop_path_rate, **trunk)


def shiftresnet(
    depth: int,
    expansion: float = 1.0,
    project_shortcuts: bool = False,
    drop_path_rate: float = 0.0,
    **trunk: Unpack[TrunkArgs],
) -> CifarNet:
    """The network of the paper; ``expansion`` multiplies the channels that are shifted.

    ``project_shortcuts`` puts a convolution into the shortcut of every block.
    """
    block = partial(ShiftBlock, expansion=_positive("expansion", expansion), project=project_shortcuts)
    return CifarNet(depth, block, drop_path_rate=drop_path_rate, **trunk)


def depthwiseresnet(
    depth: int,
    reduction: float = 1.0,
    skip: bool = True,
    project_shortcuts: bool = False,
    drop_path_rate: float = 0.0,
    **trunk: Unpack[TrunkArgs],
) -> CifarNet:
    """A depthwise convolution in the place of the shift; ``reduction`` divides its channels, below 1 multiplies them.

    ``skip`` False leaves the shortcuts out. ``project_shortcuts``: see :func:`shiftresnet`.
    """
    if not skip and (project_shortcuts or drop_path_rate):
        raise ValueError("project_shortcuts and drop_path_rate need the shortcuts that skip=False leaves out")
    block = partial(DepthwiseBlock, reduction=_positive("reduction", reduction), skip=skip, project=project_shortcuts)
    return CifarNet(depth, block, drop_path_rate=drop_path_rate, **trunk)


def shuffleresnet(
    depth: int,
    reduction: float = 1.0,
    project_shortcuts: bool = False,
    drop_path_rate: float = 0.0,
    **trunk: Unpack[TrunkArgs],
) -> CifarNet:
    """ShuffleNet's units in the same trunk. ``reduction`` as in :func:`depthwiseresnet`, the rest as elsewhere."""
    block = partial(ShuffleBlock, reduction=_positive("reduction", reduction), project=project_shortcuts)
    return CifarNet(depth, block, drop_path_rate=drop_path_rate, **trunk)


def mobileresnet(depth: int, reduction: float = 1.0, **trunk: Unpack[TrunkArgs]) -> CifarNet:
    """MobileNet's layers in the same trunk, without shortcuts. ``reduction`` as in :func:`depthwiseresnet`."""
    return CifarNet(depth, partial(MobileBlock, reduction=_positive("reduction", reduction)), **trunk)


def _stage(block: Callable[..., nn.Module], in_chs: int, chs: int, stride: int, rates: list[float]) -> nn.Sequential:
    extra = [dict(drop_path=rate) if rate else {} for rate in rates]  # a block without shortcut does not know it
    first = block(in_chs, chs, stride, **extra[0])
    return nn.Sequential(first, *(block(chs, chs, 1, **more) for more in extra[1:]))


def _drop_path_rates(rate: float, stages: int, blocks: int) -> list[list[float]]:
    """One rate for each block of each stage, from 0 at the first to ``rate`` at the last."""
    steps = torch.linspace(0, _rate("drop_path_rate", rate), stages * blocks, device="cpu").tolist()
    return [steps[i * blocks : (i + 1) * blocks] for i in range(stages)]


def _rate(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return value


def _positive(name: str, value: float) -> float:
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


def _cfg() -> dict[str, Any]:
    return dict(
        input_size=(3, 32, 32),
        num_classes=10,
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        first_conv="conv1",
        classifier="linear",
        paper_ids="arXiv:1711.08141",
        origin_url="https://github.com/alvinwan/shiftresnet-cifar",
    )


FAMILIES = {family.__name__: family for family in (resnet, shiftresnet, depthwiseresnet, shuffleresnet, mobileresnet)}
_TIMM_ARGS = ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir")
_FEATURE_ARGS = ("features_only", "out_indices", "feature_cls")
default_cfgs = generate_default_cfgs({f"{family}{depth}.untrained": _cfg() for family in FAMILIES for depth in DEPTHS})


def model_arguments(family: str) -> tuple[str, ...]:
    """The names of all arguments that networks of ``family`` take, such as ``shiftresnet``."""
    own = [name for name in inspect.signature(FAMILIES[family]).parameters if name not in ("depth", "trunk")]
    return *own, *TrunkArgs.__annotations__, *_FEATURE_ARGS


def _check_arguments(family: str, variant: str, given: dict[str, Any]) -> None:
    known = model_arguments(family)
    for name in given:
        if name in known or name in _TIMM_ARGS:
            continue
        owners = [other for other in FAMILIES if name in model_arguments(other)]
        close = closest(name, known)
        hint = f" (it belongs to {', '.join(owners)})." if owners else f"; did you mean {close!r}?" if close else "."
        raise TypeError(f"{variant} has no argument {name!r}{hint} It takes: {', '.join(known)}")


def _register(family: str, depth: int) -> Callable[..., nn.Module]:
    """One entry in timm's registry. The function's name is the name of the network."""
    variant = f"{family}{depth}"

    def entry(pretrained: bool = False, **arguments: Any) -> nn.Module:
        _check_arguments(family, variant, arguments)
        network = partial(FAMILIES[family], depth)
        return build_model_with_cfg(network, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2)), **arguments)

    entry.__name__ = entry.__qualname__ = variant
    entry.__doc__ = f"{family} of {depth} layers; takes the arguments of :func:`{family}` and timm's."
    return register_model(entry)


globals().update({f"{family}{depth}": _register(family, depth) for family in FAMILIES for depth in DEPTHS})
