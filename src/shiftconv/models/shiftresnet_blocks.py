"""The blocks of the ShiftResNet study: one trunk, five ways to mix over space and over channels.

All map ``[N, in_chs, H, W]`` to ``[N, out_chs, ceil(H / stride), ceil(W / stride)]`` with ``stride`` 1 or 2 and share
the arguments ``project`` (a convolution in the shortcut even where the shapes agree) and ``drop_path`` (the probability
that training leaves out the branch beside the shortcut, per image). The layers have the names and the order of the
authors' released networks; so have the widths, ``int(expansion * out_chs)`` and ``int(1 / reduction * out_chs)``.

Source: Wu et al., "Shift", CVPR 2018, arXiv:1711.08141, section 4.1, and the networks released with it.
"""

from typing import Any, ClassVar

from timm.layers.drop import DropPath
from torch import Tensor, nn

from shiftconv.nn import GroupShift2d
from shiftconv.nn.shift_linear import ShiftLinear, fold_norm


class Block(nn.Module):
    """What the blocks share: the way in which they become faster once they are trained."""

    norms: ClassVar[dict[str, str]]  # convolution: the normalisation that follows it
    shortcut: Any  # convolution and norm, nothing, or None where the block has no shortcut

    def fuse(self) -> nn.Module:
        """The block for inference, with the same outputs: here itself, its normalisations folded into the convolutions.

        The name is the one that ``timm.models.reparameterize_model`` looks for.
        """
        for conv, norm in self.norms.items():
            layer = getattr(self, norm)
            if isinstance(layer, nn.BatchNorm2d):
                setattr(self, conv, fold_norm(getattr(self, conv), layer))
                setattr(self, norm, nn.Identity())
        if self.shortcut and len(self.shortcut) == 2:
            self.shortcut = nn.Sequential(fold_norm(*self.shortcut))
        return self


class BasicBlock(Block):
    """Two 3x3 convolutions; ``reduction`` divides the channels between them. He et al., arXiv:1512.03385."""

    norms: ClassVar = {"conv1": "bn1", "conv2": "bn2"}

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, *, reduction=1.0, project: bool = False, drop_path: float = 0.0
    ):
        super().__init__()
        mid = _width(1 / reduction * out_chs, f"reduction={reduction}", out_chs)
        self.conv1, self.bn1 = _conv(in_chs, mid, 3, stride), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = _conv(mid, out_chs, 3), nn.BatchNorm2d(out_chs)
        # The released rule of old: a convolution where the inside of the block differs in width from its input.
        self.shortcut = _shortcut(in_chs, out_chs, stride, project and mid != in_chs)
        self.drop_path, self.act = _drop_path(drop_path), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act(self.drop_path(y) + self.shortcut(x))


class ShiftBlock(Block):
    """1x1 convolution, grouped 3x3 shift, 1x1 convolution; ``expansion`` multiplies the channels that are shifted.

    The last ReLU is before the sum and none after it. The stride is that of the second convolution, which therefore
    computes nothing for the positions that are dropped.
    """

    norms: ClassVar = {"conv1": "bn1", "conv2": "bn2"}

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, *, expansion=1.0, project: bool = False, drop_path: float = 0.0
    ):
        super().__init__()
        mid = _width(expansion * out_chs, f"expansion={expansion}", out_chs)
        self.conv1, self.bn1 = _conv(in_chs, mid), nn.BatchNorm2d(mid)
        self.shift2 = GroupShift2d(mid, 3)
        self.conv2, self.bn2 = _conv(mid, out_chs, 1, stride), nn.BatchNorm2d(out_chs)
        self.shortcut = _shortcut(in_chs, out_chs, stride, project)
        self.drop_path, self.act = _drop_path(drop_path), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(self.shift2(y))))
        return self.drop_path(y) + self.shortcut(x)

    def fuse(self) -> nn.Module:
        """Another block, for inference: each convolution is one operator with all that surrounds it."""
        return FusedShiftBlock(self)


class FusedShiftBlock(nn.Module):
    """What a trained :class:`ShiftBlock` computes, in two operators, or three where the shortcut is a convolution."""

    def __init__(self, block: ShiftBlock):
        super().__init__()
        shift = block.shift2
        self.conv1 = ShiftLinear.from_conv(block.conv1, block.bn1, activation="relu")
        self.conv2 = ShiftLinear.from_conv(block.conv2, block.bn2, shift.offset, shift.padding_mode, "relu")
        self.shortcut = ShiftLinear.from_conv(*block.shortcut) if block.shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), self.shortcut(x))


class DepthwiseBlock(Block):
    """1x1 convolution, depthwise 3x3, 1x1 convolution with the stride; no ReLU after the depthwise one.

    ``reduction`` divides the channels in the middle, below 1 it widens them. Without ``skip`` there is no shortcut.
    """

    norms: ClassVar = {"conv1": "bn1", "depth": "bn2", "conv3": "bn3"}

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        *,
        reduction=1.0,
        skip: bool = True,
        project: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        mid = _width(1 / reduction * out_chs, f"reduction={reduction}", out_chs)
        self.conv1, self.bn1 = _conv(in_chs, mid), nn.BatchNorm2d(mid)
        self.depth, self.bn2 = _conv(mid, mid, 3, groups=mid), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = _conv(mid, out_chs, 1, stride), nn.BatchNorm2d(out_chs)
        self.shortcut = _shortcut(in_chs, out_chs, stride, project) if skip else None
        self.drop_path, self.act = _drop_path(drop_path), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.depth(y))
        y = self.drop_path(self.bn3(self.conv3(y)))
        return self.act(y if self.shortcut is None else y + self.shortcut(x))


class ShuffleBlock(Block):
    """Grouped 1x1 convolution, channel shuffle, depthwise 3x3 with the stride, grouped 1x1 convolution.

    ``reduction`` divides the channels in the middle, rounded down to a multiple of the four groups.
    Source of the idea: Zhang et al., "ShuffleNet", arXiv:1707.01083.
    """

    groups = 4
    norms: ClassVar = {"conv1": "bn1", "depth": "bn2", "conv3": "bn3"}

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, *, reduction=1.0, project: bool = False, drop_path: float = 0.0
    ):
        super().__init__()
        groups = self.groups
        mid = _width(1 / reduction * out_chs // groups * groups, f"reduction={reduction}", out_chs)
        self.conv1, self.bn1 = _conv(in_chs, mid, groups=groups), nn.BatchNorm2d(mid)
        self.shuffle1 = nn.ChannelShuffle(groups)
        self.depth, self.bn2 = _conv(mid, mid, 3, stride, groups=mid), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = _conv(mid, out_chs, groups=groups), nn.BatchNorm2d(out_chs)
        self.shortcut = _shortcut(in_chs, out_chs, stride, project)
        self.drop_path, self.act = _drop_path(drop_path), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle1(self.act(self.bn1(self.conv1(x))))
        y = self.act(self.bn2(self.depth(y)))
        y = self.bn3(self.conv3(y))
        return self.act(self.drop_path(y) + self.shortcut(x))


class MobileBlock(Block):
    """Depthwise 3x3 with the stride and 1x1 convolution, twice, as in MobileNet; no shortcut.

    ``reduction`` divides the channels between the two. Source of the idea: Howard et al., arXiv:1704.04861.
    """

    norms: ClassVar = {"depth1": "depth_bn1", "conv1": "bn1", "depth2": "depth_bn2", "conv2": "bn2"}

    def __init__(self, in_chs: int, out_chs: int, stride: int, *, reduction=1.0):
        super().__init__()
        mid = _width(1 / reduction * out_chs, f"reduction={reduction}", out_chs)
        self.depth1, self.depth_bn1 = _conv(in_chs, in_chs, 3, stride, groups=in_chs), nn.BatchNorm2d(in_chs)
        self.conv1, self.bn1 = _conv(in_chs, mid), nn.BatchNorm2d(mid)
        self.depth2, self.depth_bn2 = _conv(mid, mid, 3, groups=mid), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = _conv(mid, out_chs), nn.BatchNorm2d(out_chs)
        self.shortcut, self.act = None, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depth_bn1(self.depth1(x)))
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.depth_bn2(self.depth2(x)))
        return self.act(self.bn2(self.conv2(x)))


def _conv(in_chs: int, out_chs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


def _shortcut(in_chs: int, out_chs: int, stride: int, project: bool) -> nn.Sequential:
    if project or stride != 1 or in_chs != out_chs:
        return nn.Sequential(_conv(in_chs, out_chs, 1, stride), nn.BatchNorm2d(out_chs))
    return nn.Sequential()


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()


def _width(channels: float, argument: str, out_chs: int) -> int:
    if channels < 1:
        raise ValueError(f"{argument} leaves no channel inside a block of {out_chs} channels")
    return int(channels)
