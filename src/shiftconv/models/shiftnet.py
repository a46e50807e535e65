"""ShiftNet-A and -B: ImageNet networks of grouped shifts between 1x1 convolutions.

    shiftnet_a     64, 128, 256, 512 channels     4.19 M parameters, 1.42 G MACs (published: 4.1 M, 1.4 G)
    shiftnet_b     half as many                   1.18 M parameters, 371 M MACs (published: 1.1 M, 371 M)

Source: Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018,
arXiv:1711.08141, section 4.2. It was never released; the padding of the pooling, the order of the concatenation and the
missing biases are as in a later network that used its shift layer.
"""

from typing import Any, Unpack

import torch
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from shiftconv.models.registry import register
from shiftconv.models.trunk import HeadArgs, Trunk, TrunkArgs, drop_path_rates
from shiftconv.nn import GroupShift2d, arguments


class CSCBlock(nn.Module):
    """The conv-shift-conv module: 1x1 convolution, grouped shift, 1x1 convolution; norm and ReLU before both.

    Maps ``[N, in_chs, H, W]`` to ``[N, out_chs, ceil(H / stride), ceil(W / stride)]``. With stride 1 the input is
    added. With stride 2, which the second convolution does, the input's 3x3 averages are appended: ``in_chs`` of the
    ``out_chs`` channels come from there.

    Args:
        in_chs: channels of the input.
        out_chs: channels of the output; equal for stride 1, more for stride 2.
        stride: 1 or 2.
        expansion: times as many channels are shifted as the second convolution gives.
        kernel_size: of the window whose taps the shifts are.
        drop_path: for stride 1: probability that training leaves out the branch beside the shortcut, per image.
    """

    def __init__(
        self, in_chs: int, out_chs: int, stride: int, *, expansion: int, kernel_size: int, drop_path: float = 0.0
    ):
        super().__init__()
        new = out_chs if stride == 1 else out_chs - in_chs
        mid = expansion * new
        self.bn1, self.conv1 = nn.BatchNorm2d(in_chs), nn.Conv2d(in_chs, mid, 1, bias=False)
        self.shift2, self.bn2 = GroupShift2d(mid, kernel_size), nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, new, 1, stride, bias=False)
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride, 1)
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path) if drop_path > 0 and stride == 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shift2(self.conv1(self.act(self.bn1(x))))
        y = self.conv2(self.act(self.bn2(y)))
        return self.drop_path(y) + x if self.pool is None else torch.cat([y, self.pool(x)], dim=1)


class ShiftNet(Trunk):
    """A 7x7 convolution with stride 2, four stages of :class:`CSCBlock`, norm, ReLU and a linear classifier.

    ``[N, in_chans, H, W]`` to ``[N, num_classes]``; images of any size. The features are the output of the stem and of
    the stages, before the last norm, at 1/2 to 1/32 of the image size. Every layer starts as torch initialises it.

    Args:
        stem: channels of the 7x7 convolution; the stages have 2, 4, 8 and 16 times as many.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first one, and passes over
            the blocks with stride 2.
        in_chans: channels of the images.
        head: see :class:`~shiftconv.models.trunk.HeadArgs`.
    """

    kernel_sizes = (5, 5, 3, 3)
    depths = (5, 6, 7, 3)
    expansions = ((4, 4), (4, 3), (3, 2), (2, 1))
    """Of the first block of a stage, and of the others."""

    def __init__(self, stem: int, drop_path_rate: float = 0.0, in_chans: int = 3, **head: Unpack[HeadArgs]):
        super().__init__(in_chans)
        self.conv1 = nn.Conv2d(in_chans, stem, 7, 2, 3, bias=False)
        self.feature_info.append(dict(num_chs=stem, reduction=2, module="conv1"))
        all_rates, chs = drop_path_rates(drop_path_rate, self.depths), stem
        for k, (first, rest), rates in zip(self.kernel_sizes, self.expansions, all_rates, strict=True):
            down = CSCBlock(chs, 2 * chs, 2, expansion=first, kernel_size=k)
            chs *= 2
            others = [CSCBlock(chs, chs, 1, expansion=rest, kernel_size=k, drop_path=rate) for rate in rates[1:]]
            self._add_stage([down, *others], chs, 2 * self.feature_info[-1]["reduction"])
        self.norm, self.act = nn.BatchNorm2d(chs), nn.ReLU(inplace=True)
        self._add_head(chs, **head)

    def forward_features(self, x: Tensor) -> Tensor:
        self._check_images(x)
        return self.act(self.norm(self._through_stages(self.conv1(x))))


def shiftnet(stem: int = 32, drop_path_rate: float = 0.0, **trunk: Unpack[TrunkArgs]) -> ShiftNet:
    """The network of the paper, of any width; see :class:`ShiftNet`."""
    return ShiftNet(arguments.positive("stem", stem), drop_path_rate, **trunk)


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
        paper_ids="arXiv:1711.08141",
    )


default_cfgs = generate_default_cfgs({"shiftnet_a.untrained": _cfg(), "shiftnet_b.untrained": _cfg()})

shiftnet_a = register("shiftnet_a", shiftnet, (0, 1, 2, 3, 4), dict(stem=32))
shiftnet_b = register("shiftnet_b", shiftnet, (0, 1, 2, 3, 4), dict(stem=16))
