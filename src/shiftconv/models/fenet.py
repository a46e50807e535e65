"""FE-Net: ImageNet networks of sparse shifts between 1x1 convolutions, in blocks that use each channel at many depths.

    fenet_100     width 1        4.23 M parameters, 307 M MACs (published: 3.7 M, 301 M)
    fenet_137     width 1.375    6.00 M parameters, 564 M MACs (published: 5.9 M, 563 M)

The two digits after the point of the width are in the name, as timm writes it.

The authors' code as released widens the blocks that change the number of channels more than their figures allow: it
takes the expansion of the output channels, not of the input channels (``expand="output"``: 4.62 M and 418 M, 6.75 M
and 773 M). The accuracies in its readme, 73.6 % and 75.7 %, are of those wider networks, as its logs show; the paper
says 72.9 % and 75.0 %.

Source: Chen et al., "All You Need Is a Few Shifts: Designing Efficient Convolutional Neural Networks for Image
Classification", CVPR 2019, arXiv:1903.05285, section 4, and the code released with it. Its shifts have the opposite
sign.
"""

from typing import Any, Literal, Unpack, get_args

import torch
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from shiftconv.models.registry import register
from shiftconv.models.trunk import HeadArgs, Trunk, TrunkArgs, drop_path_rates, positive
from shiftconv.names import unknown
from shiftconv.nn import SparseShift2d

Expand = Literal["input", "output"]
"""Which channels of a block its expansion multiplies."""


class Bottleneck(nn.Module):
    """1x1 convolution, norm, ReLU, sparse shift, 1x1 convolution, norm.

    Maps ``[N, in_chs, H, W]`` to ``[N, out_chs, H, W]``, or to half the size, rounded down, if 2x2 averages take the
    place of the shift. In the paper: IBSSL, with ``residual`` ResIBSSL, with ``downsample`` IBPool.

    Args:
        in_chs: channels of the input.
        out_chs: channels of the output.
        expansion: times as many channels are shifted as there are channels of the kind ``expand``.
        expand: one of ``Expand``.
        downsample: average instead of shifting.
        residual: add the input.
        drop_path: probability that training leaves out what is added to the input, per image.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        expansion: int,
        *,
        expand: Expand = "input",
        downsample: bool = False,
        residual: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        mid = expansion * (in_chs if expand == "input" else out_chs)
        self.conv1, self.bn1 = nn.Conv2d(in_chs, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.act = nn.ReLU(inplace=True)
        self.shift2 = nn.AvgPool2d(2) if downsample else SparseShift2d(mid, init="grid")
        self.conv2, self.bn2 = nn.Conv2d(mid, out_chs, 1, bias=False), nn.BatchNorm2d(out_chs)
        self.residual = residual
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shift2(self.act(self.bn1(self.conv1(x))))
        y = self.bn2(self.conv2(y))
        return self.drop_path(y) + x if self.residual else y


class FEBlock(nn.Module):
    """The fully exploited block: residual bottlenecks on more and more of the channels, then one on all of them.

    The channels are split in ``levels`` parts: 1/2, 1/4 ... of them, and a last one as large as the one before. The
    last goes through a bottleneck and is joined with the one before, both go through the next bottleneck, and so on.

    Args:
        in_chs: channels of the input, a multiple of ``2 ** (levels - 1)``.
        out_chs: channels of the output.
        levels: how many parts.
        downsample: whether the last bottleneck halves the size.
        expand: one of ``Expand``.
        drop_path: see :class:`Bottleneck`; for those on some of the channels.
    """

    def __init__(
        self, in_chs: int, out_chs: int, levels: int, downsample: bool, expand: Expand, drop_path: float = 0.0
    ):
        super().__init__()
        smallest = in_chs >> (levels - 1)
        widths = [smallest << i for i in range(levels - 1)]
        self.parts = (*reversed(widths), smallest)
        self.partial = nn.ModuleList(Bottleneck(w, w, 6, residual=True, drop_path=drop_path) for w in widths)
        self.full = Bottleneck(in_chs, out_chs, 6, expand=expand, downsample=downsample)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.parts, dim=1)
        x = parts[-1]
        for part, bottleneck in zip(parts[-2::-1], self.partial, strict=True):
            x = torch.cat([part, bottleneck(x)], dim=1)
        return self.full(x)


class FENet(Trunk):
    """A 3x3 convolution with stride 2, two bottlenecks, five :class:`FEBlock`, a 1x1 convolution, a linear classifier.

    ``[N, in_chans, H, W]`` to ``[N, num_classes]``, with ``H`` and ``W`` of at least 31. The features are at 1/2 to
    1/32 of the image size, the first one rounded up, the others down. Every layer starts as torch initialises it, the
    shifts as the taps of a 3x3 window, as the paper says.

    Args:
        width: ``c = int(16 * width)`` channels in the stem, an even number; the stages have 1, 2, 4, 8 and 16 times
            as many.
        expand: which channels the expansion of a block multiplies, one of ``Expand``.
        drop_path_rate: stochastic depth in the last block; it grows linearly from 0 in the first one.
        in_chans: channels of the images.
        head: see :class:`~shiftconv.models.trunk.HeadArgs`; ``drop_rate`` is 0.2 unless told, as in the paper's code.
    """

    min_size = 31
    """Pixels; a smaller image has no pixel left in the last stage."""

    def __init__(
        self,
        width: float = 1.0,
        expand: Expand = "input",
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        **head: Unpack[HeadArgs],
    ):
        super().__init__(in_chans)
        if expand not in get_args(Expand):
            raise unknown("expand", expand, get_args(Expand))
        c = int(16 * positive("width", width))
        if c < 2 or c % 2:
            raise ValueError(f"width={width} gives {c} channels in the stem, expected an even number above 0")
        self.conv1, self.bn1 = nn.Conv2d(in_chans, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c)
        rates = [rate for [rate] in drop_path_rates(drop_path_rate, [1] * 5)]

        def block(times_in: int, times_out: int, levels: int, downsample: bool) -> FEBlock:
            return FEBlock(times_in * c, times_out * c, levels, downsample, expand, rates.pop(0))

        self._add_stage([Bottleneck(c, c, 4, expand=expand)], c, 2)
        self._add_stage([Bottleneck(c, 2 * c, 5, expand=expand, downsample=True)], 2 * c, 4)
        self._add_stage([block(2, 4, 3, True)], 4 * c, 8)
        self._add_stage([block(4, 8, 4, True), block(8, 8, 4, False)], 8 * c, 16)
        self._add_stage([block(8, 16, 4, True), block(16, 16, 3, False)], 16 * c, 32)
        self.conv2, self.bn2 = nn.Conv2d(16 * c, 1932, 1, bias=False), nn.BatchNorm2d(1932)
        self.act2 = nn.ReLU(inplace=True)
        head.setdefault("drop_rate", 0.2)
        self._add_head(1932, **head)

    def forward_features(self, x: Tensor) -> Tensor:
        self._check_images(x)
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(f"expected images of at least {self.min_size} pixels either way, got {[*x.shape]}")
        x = self._through_stages(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)))


def fenet(
    width: float = 1.0, expand: Expand = "input", drop_path_rate: float = 0.0, **trunk: Unpack[TrunkArgs]
) -> FENet:
    """The network of the paper, of any width; see :class:`FENet`."""
    return FENet(width, expand, drop_path_rate, **trunk)


def _cfg() -> dict[str, Any]:
    return dict(
        input_size=(3, 224, 224),
        num_classes=1000,
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="conv1",
        classifier="linear",
        paper_ids="arXiv:1903.05285",
        origin_url="https://github.com/hikvision-research/SparseShiftLayer",
    )


default_cfgs = generate_default_cfgs({"fenet_100.untrained": _cfg(), "fenet_137.untrained": _cfg()})

fenet_100 = register("fenet_100", fenet, (0, 1, 2, 3, 4), dict(width=1.0))
fenet_137 = register("fenet_137", fenet, (0, 1, 2, 3, 4), dict(width=1.375))
