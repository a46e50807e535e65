"""The block that the networks with large kernels share: mix over space, then over channels, and add to the input.

    x + drop_path(gamma * fc2(response_norm(gelu(fc1(squeeze(norm(mix(x))))))))

What tells the families apart is the layer that mixes over space and a :class:`BlockStyle`.

Sources: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545 (the block); Woo et al., "ConvNeXt V2",
arXiv:2301.00808 (the response normalisation); Ding et al., "UniRepLKNet", arXiv:2311.15599 (its place beside batch
norms and squeeze-and-excitation).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm2d
from timm.layers.squeeze_excite import SqueezeExcite
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # of SyncBatchNorm, too

from shiftconv.nn import DilatedReparamConv2d, LargeKernelConv2d, ShiftwiseConv2d
from shiftconv.nn.cross_kernels import scale_and_shift
from shiftconv.nn.linear import Linear

Mixer = LargeKernelConv2d | ShiftwiseConv2d | DilatedReparamConv2d
"""The layers that mix over space; each becomes kernels with a bias, ``merged``, by ``reparameterize()``."""


@dataclass(frozen=True)
class BlockStyle:
    """What surrounds the mixing over space.

    Args:
        norm: ``layer``: a layer norm after it; ``batch``: a batch norm there, and another one in the place of the bias
            of the last linear layer.
        squeeze: whether squeeze-and-excitation with a quarter of the channels follows the norm.
        response_norm: whether a :class:`ResponseNorm` follows the activation.
    """

    norm: Literal["layer", "batch"] = "layer"
    squeeze: bool = False
    response_norm: bool = False


CONVNEXT = BlockStyle()
UNIREP = BlockStyle("batch", squeeze=True, response_norm=True)


class ResponseNorm(nn.Module):
    """Global response normalisation of ``[N, H, W, C]``: channels whose map is strong beside the others are raised.

    ``y = x * (1 + weight * n) + bias`` with ``n`` the norm of each channel's map over the mean of those norms.
    Woo et al., "ConvNeXt V2", arXiv:2301.00808, section 3.

    The mean is of all ``dim`` channels, also where some, which are zero, have been left out: by its methods the module
    is one of :class:`shiftconv.sparse.channelwise.KeepChannels`.

    Args:
        dim: channels, ``C``.
        eps: added to the mean.
    """

    bias: nn.Parameter | None
    channel_axis = -1

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        strength = _norm_of_maps(x)
        mean = strength.mean(-1, keepdim=True)
        if len(self.weight) != self.dim:
            mean = mean * (len(self.weight) / self.dim)
        scale = 1 + self.weight * (strength / (mean + self.eps))
        scale = scale.to(x.dtype)
        return x * scale if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, scale)

    def keep_channels(self, kept: Tensor) -> None:
        """Go without all channels but ``kept``, indices ``[K]``, in place; the others must be zero wherever it runs."""
        self.weight = nn.Parameter(self.weight.detach()[kept])
        self.bias = None if self.bias is None else nn.Parameter(self.bias.detach()[kept])

    def output_of_zeros(self) -> Tensor:
        """What a channel of zeros comes out as, ``[C]``."""
        return torch.zeros_like(self.weight) if self.bias is None else self.bias

    def extra_repr(self) -> str:
        of = "" if len(self.weight) == self.dim else f" of {self.dim}"
        return f"{len(self.weight)}{of}, eps={self.eps}, bias={self.bias is not None}"


def _norm_of_maps(x: Tensor) -> Tensor:
    """The Euclidean norm of each channel's map, ``[N, 1, 1, C]`` of ``[N, H, W, C]``; a map of zeros has gradient 0."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        # torch's own norm over axes that are not the last takes 5 to 20 times as long there
        return (x.square().sum((1, 2), keepdim=True) + 1e-30).sqrt()
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


class Block(nn.Module):
    """Mixes ``[N, C, H, W]`` over space by ``mix``, then over channels by an inverted bottleneck, and adds the input.

    Args:
        dim: channels, ``C``.
        mix: maps ``[N, C, H, W]`` to the same shape; a large-kernel convolution of :mod:`shiftconv.nn`.
        style: what surrounds it.
        layer_scale: what ``gamma`` starts from; None or 0 for no layer scale.
        drop_path: probability that training leaves out what is added to the input, per image.
    """

    gamma: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        mix: nn.Module,
        style: BlockStyle = CONVNEXT,
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
    ):
        super().__init__()
        batch = style.norm == "batch"
        self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None
        self.mix = mix
        self.norm: nn.Module = nn.BatchNorm2d(dim) if batch else LayerNorm2d(dim, eps=1e-6)
        self.squeeze = SqueezeExcite(dim, rd_channels=max(1, dim // 4)) if style.squeeze else nn.Identity()
        self.fc1, self.act = Linear(dim, 4 * dim), nn.GELU()
        self.response_norm = ResponseNorm(4 * dim) if style.response_norm else nn.Identity()
        self.fc2 = Linear(4 * dim, dim, bias=not batch)
        self.norm2: nn.Module = nn.BatchNorm2d(dim) if batch else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(self.norm(self.mix(x))).permute(0, 2, 3, 1)
        y = self.fc2(self.response_norm(self.act(self.fc1(y))))
        y = self.norm2(y.permute(0, 3, 1, 2))
        if self.gamma is not None:
            y = y * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(y)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the branches, the normalisations, the response norm's bias and the layer scale; in place, for inference.

        ``timm.models.reparameterize_model`` finds this method by its name.
        """
        if isinstance(self.mix, Mixer):
            self.mix.reparameterize()
        self._fold_norm()
        if isinstance(self.response_norm, ResponseNorm) and (bias := self.response_norm.bias) is not None:
            adjust(self.fc2, before=(torch.ones_like(bias), bias))
            self.response_norm.bias = None
        if isinstance(self.norm2, _BatchNorm):
            adjust(self.fc2, after=scale_and_shift(self.norm2))
            self.norm2 = nn.Identity()
        if self.gamma is not None:
            adjust(self.fc2, after=(self.gamma, torch.zeros_like(self.gamma)))
            self.gamma = None

    def _fold_norm(self) -> None:
        """The norm after ``mix`` goes into its kernels if it is a batch norm, else into the linear layer after it."""
        merged = self.mix.merged if isinstance(self.mix, Mixer) else None
        if isinstance(self.norm, _BatchNorm) and merged is not None:
            merged.absorb(*scale_and_shift(self.norm))
            self.norm = nn.Identity()
        elif isinstance(self.norm, LayerNorm2d) and isinstance(self.squeeze, nn.Identity):
            fold_affine(self.norm, self.fc1)


def adjust(
    layer: nn.Linear | nn.Conv2d,
    before: tuple[Tensor, Tensor] | None = None,
    after: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Make ``layer(scale * x + shift)`` or ``scale * layer(x) + shift`` of ``layer(x)``, summed in float64; in place.

    Args:
        layer: a linear layer, or a convolution; one that comes after must not pad.
        before: scale and shift of each input channel.
        after: scale and shift of each output channel.
    """
    weight = layer.weight.double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    axes = (1,) * (weight.ndim - 2)
    if before is not None:
        scale, shift = (t.double().view(1, -1, *axes) for t in before)
        bias = bias + (weight * shift).flatten(1).sum(1)
        weight = weight * scale
    if after is not None:
        scale, shift = (t.double() for t in after)
        weight, bias = weight * scale.view(-1, 1, *axes), bias * scale + shift
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))


def fold_affine(norm: nn.LayerNorm, layer: nn.Linear | nn.Conv2d) -> None:
    """Move weight and bias of ``norm`` into the ``layer`` that takes what it gives, and nothing else does; in place."""
    if norm.elementwise_affine:
        adjust(layer, before=(norm.weight, norm.bias))
        norm.register_parameter("weight", None)
        norm.register_parameter("bias", None)
        norm.elementwise_affine = False
