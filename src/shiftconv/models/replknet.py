"""RepLKNet, the first network with kernels of 31x31: whole ones, with a small one beside them for training.

    replknet_31b, replknet_31l    31x31, 29x29, 27x27 and 13x13 kernels by stage, each beside a 5x5 one
    replknet_xl                   27x27 and 13x13 kernels alone, on 1.5 times the channels

Its blocks normalise first and mix over space between two 1x1 convolutions, which in ConvNeXt's blocks both follow. The
authors' weights are on shared drives whose links no program can follow, so that no network here has any of its own.

Source: Ding et al., "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", CVPR 2022,
arXiv:2203.06717, section 4, and the code released with it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from timm.layers.drop import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # of SyncBatchNorm, too

from shiftconv.models.large_kernel_block import adjust
from shiftconv.models.large_kernel_net import Entry, LargeKernelNet, imagenet_cfg, per_stage
from shiftconv.models.registry import register
from shiftconv.models.trunk import Trunk, TrunkArgs, drop_path_rates, positive
from shiftconv.nn import LargeKernelConv2d
from shiftconv.nn.cross_kernels import scale_and_shift


class RepLKNetArgs(TrunkArgs, total=False):
    """The arguments that these networks share with the others of large kernels.

    ``head_init_scale`` and ``feature_norm`` are those of :class:`~shiftconv.models.large_kernel_net.NetArgs`, but that
    the norms of the features are batch norms.
    """

    head_init_scale: float
    feature_norm: bool


class ConvNorm(nn.Module):
    """A convolution, a batch norm and an activation: ``[N, C, H, W]`` to ``[N, C', ceil(H / s), ceil(W / s)]``.

    Args:
        in_chs: channels that come in, ``C``.
        chs: channels that go out, ``C'``.
        kernel_size: of the convolution, odd; the map is padded by half of it.
        stride: of the convolution, ``s``.
        groups: of the convolution.
        act: what follows the norm, or nothing.
    """

    def __init__(
        self,
        in_chs: int,
        chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_chs, chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(chs)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the norm into the convolution; in place, for inference.

        Raises:
            ValueError: a norm without running statistics.
        """
        if isinstance(self.norm, _BatchNorm):
            adjust(self.conv, after=scale_and_shift(self.norm))
            self.norm = nn.Identity()


class PointwiseBlock(nn.Module):
    """Normalises ``[N, C, H, W]``, works on it between two 1x1 convolutions, and adds the input.

        x + drop_path(pw2(relu(mix(relu(pw1(norm(x)))))))    mixes over space: the paper's RepLK block
        x + drop_path(pw2(gelu(pw1(norm(x)))))               mixes over channels: its ConvFFN

    Each 1x1 convolution has a batch norm. Section 4.1 of the paper.

    Args:
        dim: channels, ``C``.
        hidden: channels between the two convolutions.
        mix: maps ``[N, hidden, H, W]`` to the same shape, or None for a block that mixes over channels.
        drop_path: probability that training leaves out what is added to the input, per image.
    """

    def __init__(self, dim: int, hidden: int, mix: LargeKernelConv2d | None = None, drop_path: float = 0.0):
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.pw1 = ConvNorm(dim, hidden, act=None if mix is None else nn.ReLU(inplace=True))
        self.mix = nn.Identity() if mix is None else mix
        self.act = nn.GELU() if mix is None else nn.ReLU(inplace=True)
        self.pw2 = ConvNorm(hidden, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(self.act(self.mix(self.pw1(self.norm(x))))))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the small kernel into the large one and every norm into a convolution; in place, for inference.

        ``timm.models.reparameterize_model`` finds this method by its name.
        """
        for layer in (self.pw1, self.mix, self.pw2):
            if isinstance(layer, ConvNorm | LargeKernelConv2d):
                layer.reparameterize()
        if isinstance(self.norm, _BatchNorm):
            adjust(self.pw1.conv, before=scale_and_shift(self.norm))  # exact: it does not pad
            self.norm = nn.Identity()


class RepLKNet(LargeKernelNet):
    """A network of :class:`PointwiseBlock`, for images ``[N, in_chans, H, W]`` of 32 pixels and more.

    Unlike the other networks of large kernels it normalises by batch everywhere: the features, and the last map before
    it is pooled, so that statistics are over ``N * H * W`` values. Parameters start as torch lets them start.

    Args:
        block: as of :class:`~shiftconv.models.large_kernel_net.LargeKernelNet`, as for all others.
        depths: blocks of each stage.
        dims: see there.
        feature_norm: see there; a batch norm for the features of each stage.
        head_init_scale: see there.
        trunk: see :class:`~shiftconv.models.trunk.TrunkArgs`.
    """

    def __init__(
        self,
        block: Callable[[int, int, int, float], nn.Module],
        depths: Sequence[int],
        dims: Sequence[int],
        feature_norm: bool = False,
        head_init_scale: float = 1.0,
        **trunk: Unpack[TrunkArgs],
    ):
        super().__init__(block, depths, dims, REPLK, head_init_scale=head_init_scale, **trunk)
        self.norm = nn.BatchNorm2d(dims[-1])
        self.feature_norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in dims) if feature_norm else None

    def _initialise(self, module: nn.Module) -> None:
        """The first weights stay those that torch gives."""

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Make the network fast for inference, in place: every branch and norm that can be folded is folded.

        In evaluation mode the outputs stay the same up to rounding. The last norm stays unless means are what the
        classifier gets: a maximum is the minimum of a channel that the norm multiplies by a negative number. Those of
        ``feature_norm`` stay too, since they follow a sum. The state dict is another one, and training goes without the
        normalisations.
        """
        for module in [*self.stem.modules(), *self.stages.modules()]:
            if isinstance(module, ConvNorm | PointwiseBlock):
                module.reparameterize()
        averaged = self.global_pool.pool_type == "avg"
        if averaged and isinstance(self.norm, _BatchNorm) and isinstance(self.linear, nn.Linear):
            adjust(self.linear, before=scale_and_shift(self.norm))
            self.norm = nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return Trunk.forward_head(self, self.norm(x), pre_logits)


def _stem(in_chs: int, chs: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNorm(in_chs, chs, 3, 2, act=nn.ReLU(inplace=True)),
        ConvNorm(chs, chs, 3, groups=chs, act=nn.ReLU(inplace=True)),
        *_narrow(chs, chs),
    )


def _narrow(in_chs: int, chs: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNorm(in_chs, chs, act=nn.ReLU(inplace=True)),
        ConvNorm(chs, chs, 3, 2, groups=chs, act=nn.ReLU(inplace=True)),
    )


REPLK = Entry(_stem, _narrow)
"""A 3x3 convolution with stride 2 and a depthwise one; then, as between stages, a 1x1 one and a depthwise one with
stride 2. Section 4.1 of the paper.
"""


def replknet(
    depths: Sequence[int],
    dims: Sequence[int],
    kernel_sizes: Sequence[int] = (31, 29, 27, 13),
    small_kernel_size: int | None = 5,
    dw_ratio: float = 1.0,
    width: float = 1.0,
    drop_path_rate: float = 0.0,
    **trunk: Unpack[RepLKNetArgs],
) -> RepLKNet:
    """Pairs of blocks, ``depths`` of them: the first mixes over space, the second over channels.

    ``kernel_sizes``, one for each stage, and ``small_kernel_size`` are arguments of ``nn.LargeKernelConv2d``; 0 means
    None, which ``timm.create_model`` drops. They convolve ``dw_ratio`` times the channels of a stage. ``width``
    multiplies all channels. ``drop_path_rate``, of both blocks of the last pair, grows linearly from 0 at the first.

    Raises:
        TypeError: a ratio or width that is no number.
        ValueError: a ratio or width that leaves no channel.
    """
    sizes = per_stage("kernel_sizes", kernel_sizes, len(depths))
    scaled = _times("width", width, dims)
    hidden = _times("dw_ratio", dw_ratio, scaled)
    rates = drop_path_rates(drop_path_rate, depths)

    def block(stage: int, index: int, dim: int, _: float) -> PointwiseBlock:
        pair, second = divmod(index, 2)
        if second:
            return PointwiseBlock(dim, 4 * dim, None, rates[stage][pair])
        mix = LargeKernelConv2d(hidden[stage], sizes[stage], small_kernel_size or None, decomposed=False)
        return PointwiseBlock(dim, hidden[stage], mix, rates[stage][pair])

    return RepLKNet(block, [2 * depth for depth in depths], scaled, **trunk)


def _times(name: str, factor: float, channels: Sequence[int]) -> list[int]:
    """All ``channels`` times ``factor``, rounded down, as the authors round."""
    scaled = [int(chs * positive(name, factor)) for chs in channels]
    if min(scaled) < 1:
        raise ValueError(f"{name}={factor} leaves no channel in a stage of {min(channels)}")
    return scaled


_DEPTHS = (2, 2, 18, 2)
SIZES: dict[str, dict[str, Any]] = {
    "31b": dict(depths=_DEPTHS, dims=(128, 256, 512, 1024)),
    "31l": dict(depths=_DEPTHS, dims=(192, 384, 768, 1536)),
    "xl": dict(
        depths=_DEPTHS,
        dims=(256, 512, 1024, 2048),
        kernel_sizes=(27, 27, 27, 13),
        small_kernel_size=None,
        dw_ratio=1.5,
    ),
}
"""The arguments that a name stands for; sections 4.1 and 4.3 of the paper."""

_SOURCE = ("arXiv:2203.06717", "https://github.com/DingXiaoH/RepLKNet-pytorch")
default_cfgs = generate_default_cfgs(
    {f"replknet_{size}.untrained": imagenet_cfg(*_SOURCE) | dict(first_conv="stem.0.conv") for size in SIZES}
)
globals().update(
    {
        f"replknet_{size}": register(f"replknet_{size}", replknet, (0, 1, 2, 3), fixed, feature_cls="getter")
        for size, fixed in SIZES.items()
    }
)
