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

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack, get_args

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from shiftconv.models.registry import arguments_of, register
from shiftconv.models.shiftresnet_blocks import BasicBlock, Block, DepthwiseBlock, MobileBlock, ShiftBlock, ShuffleBlock
from shiftconv.models.trunk import HeadArgs, Trunk, TrunkArgs, drop_path_rates, positive, stage
from shiftconv.names import unknown
from shiftconv.nn.shift_linear import fold_norm

DEPTHS = (20, 32, 44, 56, 110)
ReductionMode = Literal["net", "block"]


class CifarNet(Trunk):
    """A 3x3 convolution, three stages of ``(depth - 2) / 6`` blocks each, and a linear classifier.

    The stages are at 1, 1/2 and 1/4 of the image size. Takes ``[N, in_chans, H, W]`` of any size and gives
    ``[N, num_classes]``; answers to timm's feature, head and checkpointing protocols. Every convolution, norm and
    linear layer starts as torch initialises it.

    Args:
        depth: layers with weights along the main path, 6 n + 2.
        block: makes a block from its input channels, its output channels and its stride.
        widths: channels of the stages.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first one.
        in_chans: channels of the images.
        head: see :class:`~shiftconv.models.trunk.HeadArgs`; ``num_classes`` is 10 unless told.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        depth: int,
        block: Callable[..., nn.Module],
        widths: tuple[int, int, int] = (16, 32, 64),
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        **head: Unpack[HeadArgs],
    ):
        super().__init__(in_chans)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, got {depth}")
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        chs = widths[0]
        for i, rates in enumerate(drop_path_rates(drop_path_rate, [(depth - 2) // 6] * 3)):
            self._add_stage(stage(block, chs, widths[i], 2 if i else 1, rates), widths[i], 2**i)
            chs = widths[i]
        head.setdefault("num_classes", 10)
        self._add_head(chs, **head)

    def reparameterize(self) -> None:
        """Make the network fast for inference, in place: normalisations folded, shifts fused with their neighbours.

        In evaluation mode the outputs stay the same up to rounding. The state dict is another one, and training goes
        without the normalisations.
        """
        if isinstance(self.bn1, nn.BatchNorm2d):
            self.conv1, self.bn1 = fold_norm(self.conv1, self.bn1), nn.Identity()
        for blocks in self._stages():
            for i, block in enumerate(blocks):
                if isinstance(block, Block):
                    blocks[i] = block.fuse()

    def forward_features(self, x: Tensor) -> Tensor:
        self._check_images(x)
        return self._through_stages(self.act1(self.bn1(self.conv1(x))))


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
    positive("reduction", reduction)
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
    block = partial(ShiftBlock, expansion=positive("expansion", expansion), project=project_shortcuts)
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
    block = partial(DepthwiseBlock, reduction=positive("reduction", reduction), skip=skip, project=project_shortcuts)
    return CifarNet(depth, block, drop_path_rate=drop_path_rate, **trunk)


def shuffleresnet(
    depth: int,
    reduction: float = 1.0,
    project_shortcuts: bool = False,
    drop_path_rate: float = 0.0,
    **trunk: Unpack[TrunkArgs],
) -> CifarNet:
    """ShuffleNet's units in the same trunk. ``reduction`` as in :func:`depthwiseresnet`, the rest as elsewhere."""
    block = partial(ShuffleBlock, reduction=positive("reduction", reduction), project=project_shortcuts)
    return CifarNet(depth, block, drop_path_rate=drop_path_rate, **trunk)


def mobileresnet(depth: int, reduction: float = 1.0, **trunk: Unpack[TrunkArgs]) -> CifarNet:
    """MobileNet's layers in the same trunk, without shortcuts. ``reduction`` as in :func:`depthwiseresnet`."""
    return CifarNet(depth, partial(MobileBlock, reduction=positive("reduction", reduction)), **trunk)


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
default_cfgs = generate_default_cfgs({f"{family}{depth}.untrained": _cfg() for family in FAMILIES for depth in DEPTHS})


def model_arguments(family: str) -> tuple[str, ...]:
    """The names of all arguments that networks of ``family`` take, such as ``shiftresnet``."""
    return arguments_of(FAMILIES[family], ("depth",))


globals().update(
    {
        f"{name}{depth}": register(f"{name}{depth}", family, (0, 1, 2), dict(depth=depth), FAMILIES)
        for name, family in FAMILIES.items()
        for depth in DEPTHS
    }
)
