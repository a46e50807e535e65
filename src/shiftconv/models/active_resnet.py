"""AS-ResNet: pre-activation residual networks whose only spatial operator, beside the stem, is the active shift.

    asresnet20                     CIFAR, three stages of three blocks        width, expansion
    asresnet_w32, _w50, _w68       ImageNet, 1 + 3 + 4 + 6 + 3 blocks         the width is in the name

The published counts include the shifts (two numbers per channel that is shifted) and scale and bias of every norm:
35386 to 992914 parameters for the CIFAR networks, 901256, 1962950 and 3424460 for the ImageNet ones.

Source: Jeon and Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018, arXiv:1806.07370;
layers, widths and initialisation as in the networks that were released with it. Its shifts have the opposite sign. It
trains them at 1/100 of the rate, with normalised gradients and without weight decay: ``shiftconv.nn.offset_groups`` and
``shiftconv.nn.normalize_offset_gradients``.
"""

from functools import partial
from typing import Any, Unpack

import torch
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from shiftconv.models.registry import register
from shiftconv.models.trunk import HeadArgs, Trunk, TrunkArgs, drop_path_rates, positive, stage
from shiftconv.nn import ActiveShift2d, arguments


class ActiveShiftBlock(nn.Module):
    """1x1 convolution, active shift, 1x1 convolution, with norm and ReLU before both convolutions.

    Maps ``[N, in_chs, H, W]`` to ``[N, out_chs, ceil(H / stride), ceil(W / stride)]``. The shift does the stride: it
    computes nothing for positions that are dropped. Where the shape changes the shortcut is a 1x1 convolution of the
    normalised input, else the input itself; nothing follows the sum.

    Args:
        in_chs: channels of the input.
        out_chs: channels of the output.
        stride: 1 or 2.
        expansion: ``int(expansion * out_chs)`` channels are shifted.
        drop_path: probability that training leaves out the branch beside the shortcut, per image.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, *, expansion: float = 1.0, drop_path: float = 0.0):
        super().__init__()
        mid = int(expansion * out_chs)
        if mid < 1:
            raise ValueError(f"expansion={expansion} leaves no channel inside a block of {out_chs} channels")
        self.bn1, self.conv1 = nn.BatchNorm2d(in_chs), nn.Conv2d(in_chs, mid, 1, bias=False)
        self.bn2, self.shift2 = nn.BatchNorm2d(mid), ActiveShift2d(mid, stride=stride)
        self.conv2 = nn.Conv2d(mid, out_chs, 1, bias=False)
        project = stride != 1 or in_chs != out_chs
        self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if project else None
        self.act = nn.ReLU(inplace=True)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.shift2(self.act(self.bn2(self.conv1(y))))
        return self.drop_path(self.conv2(y)) + shortcut


class ActiveResNet(Trunk):
    """A 3x3 convolution, stages of :class:`ActiveShiftBlock`, norm, ReLU and a linear classifier.

    ``[N, in_chans, H, W]`` to ``[N, num_classes]``; images of any size. The features are the sums at the end of the
    stages, before the last norm. Convolutions start normal with variance 2 / inputs, the classifier uniform with
    variance 1 / inputs and bias 0.

    Args:
        widths: channels of each stage; the stem has those of the first.
        depths: blocks of each stage.
        stem_stride: stride of the 3x3 convolution. The first stage keeps that size, each other one halves it.
        expansion: see :class:`ActiveShiftBlock`.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first one.
        in_chans: channels of the images.
        head: see :class:`~shiftconv.models.trunk.HeadArgs`.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        stem_stride: int,
        expansion: float = 1.0,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        **head: Unpack[HeadArgs],
    ):
        super().__init__(in_chans)
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, stem_stride, 1, bias=False)
        block, chs = partial(ActiveShiftBlock, expansion=expansion), widths[0]
        for i, (width, rates) in enumerate(zip(widths, drop_path_rates(drop_path_rate, depths), strict=True)):
            self._add_stage(stage(block, chs, width, 2 if i else 1, rates), width, stem_stride * 2**i)
            chs = width
        self.norm, self.act = nn.BatchNorm2d(chs), nn.ReLU(inplace=True)
        self._add_head(chs, **head)
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        self._check_images(x)
        return self.act(self.norm(self._through_stages(self.conv1(x))))


def asresnet(width: int, drop_path_rate: float = 0.0, **trunk: Unpack[TrunkArgs]) -> ActiveResNet:
    """The ImageNet network: its stages have ``width * (1, 1, 2, 4, 8)`` channels at 1/2 to 1/32 of the image size."""
    arguments.positive("width", width)
    widths = (width, width, 2 * width, 4 * width, 8 * width)
    return ActiveResNet(widths, (1, 3, 4, 6, 3), 2, drop_path_rate=drop_path_rate, **trunk)


def asresnet_cifar(
    width: int = 16, expansion: float = 1.0, drop_path_rate: float = 0.0, **trunk: Unpack[TrunkArgs]
) -> ActiveResNet:
    """The CIFAR network: ``width * (1, 2, 4)`` channels at 1, 1/2 and 1/4 of the image size.

    ``expansion`` multiplies the channels that are shifted. Published as 16x1, 16x3, 16x6, 16x9, 46x1 and 88x1, which is
    ``width`` x ``expansion``.
    """
    arguments.positive("width", width)
    expansion = positive("expansion", expansion)
    return ActiveResNet((width, 2 * width, 4 * width), (3, 3, 3), 1, expansion, drop_path_rate, **trunk)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """As the released networks start: ``msra`` and ``xavier`` over the inputs of a layer."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)


def _cfg() -> dict[str, Any]:
    return dict(
        input_size=(3, 224, 224),
        num_classes=1000,
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bilinear",
        mean=(0.4850, 0.4580, 0.4076),  # the released networks': 123.68, 116.78 and 103.94 of 255; they take BGR
        std=(0.2260, 0.2260, 0.2260),
        first_conv="conv1",
        classifier="linear",
        paper_ids="arXiv:1806.07370",
        origin_url="https://github.com/jyh2986/Active-Shift",
    )


def _cifar_cfg() -> dict[str, Any]:
    return _cfg() | dict(
        input_size=(3, 32, 32),
        num_classes=10,
        pool_size=(8, 8),
        crop_pct=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    )


default_cfgs = generate_default_cfgs(
    {
        "asresnet_w32.untrained": _cfg(),
        "asresnet_w50.untrained": _cfg(),
        "asresnet_w68.untrained": _cfg(),
        "asresnet20.untrained": _cifar_cfg(),
    }
)

asresnet_w32 = register("asresnet_w32", asresnet, (0, 1, 2, 3, 4), dict(width=32))
asresnet_w50 = register("asresnet_w50", asresnet, (0, 1, 2, 3, 4), dict(width=50))
asresnet_w68 = register("asresnet_w68", asresnet, (0, 1, 2, 3, 4), dict(width=68))
asresnet20 = register("asresnet20", asresnet_cifar, (0, 1, 2))
