"""A shift, the 1x1 convolution that follows it, and what stands around them in a residual block, as one operator.

This is the form in which a shift network runs once it is trained: normalisation is folded into the weights, and the
shift costs nothing, because reading a pixel elsewhere is all that it is.

Source: Wu et al., "Shift", CVPR 2018, arXiv:1711.08141, section 3.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiftconv.nn.arguments import padding, per_axis, positive
from shiftconv.ops import PaddingMode, shift_linear
from shiftconv.ops.shift_linear import Activation

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class ShiftLinear(nn.Module):
    """Shift each channel of ``[N, C, *S]`` by whole pixels, mix the channels, add, clip; see :func:`shift_linear`.

    ``y[p] = act(weight @ x[stride * p - offset] + bias) + residual[p]``, the residual being a second argument of the
    call or none. Starts as torch's linear layer does; :meth:`from_conv` takes the weights of trained layers.

    Args:
        offset: ``[C, D]`` integers, pixels towards larger indices; kept as a buffer and saved with the weights.
        out_channels: ``O``.
        bias: whether one is added.
        padding_mode: what the map reads beyond its border, as in :func:`shiftconv.ops.shift`.
        stride: distance of the positions that are computed; one for all axes, or one each.
        activation: ``relu`` or None.

    Raises:
        TypeError: offsets that are no integers, sizes that are no whole numbers.
        ValueError: offsets that are not ``[C, D]``, a size below 1, an unknown padding mode.
    """

    offset: Tensor

    def __init__(
        self,
        offset: Tensor,
        out_channels: int,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        stride: int | Sequence[int] = 1,
        activation: Activation | None = None,
    ):
        super().__init__()
        if offset.is_floating_point() or offset.is_complex() or offset.dtype is torch.bool:
            raise TypeError(f"ShiftLinear takes integer offsets, got {offset.dtype}")
        if offset.ndim != 2 or not 1 <= offset.shape[1] <= 3:
            raise ValueError(f"offset must be [C, D] with D from 1 to 3, got {[*offset.shape]}")
        linear = nn.Linear(offset.shape[0], positive("out_channels", out_channels), bias, device=offset.device)
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("offset", offset.detach().to(torch.int64, copy=True))
        self.padding_mode: PaddingMode = padding(padding_mode)
        strides = per_axis("stride", stride, offset.shape[1])
        self.stride = strides if set(strides) != {1} else 1  # the operator knows a plain 1 fastest
        self.activation: Activation | None = activation

    @classmethod
    def from_conv(
        cls,
        conv: Conv,
        norm: Norm | None = None,
        offset: Tensor | None = None,
        padding_mode: PaddingMode = "zeros",
        activation: Activation | None = None,
    ) -> "ShiftLinear":
        """What a shift, a 1x1 convolution, a normalisation by running statistics and an activation compute in turn.

        Args:
            conv: 1x1, ungrouped, unpadded, of any stride.
            norm: in evaluation mode, or None.
            offset: of the shift before ``conv``, ``[in_channels, D]``; None for none.
            padding_mode: of the shift.
            activation: what follows.

        Raises:
            ValueError: a convolution that is no such one.
        """
        axes = len(conv.kernel_size)
        padded = conv.padding != "valid" and conv.padding != "same" and any(conv.padding)
        if set(conv.kernel_size) != {1} or conv.groups != 1 or padded:
            raise ValueError(f"only an ungrouped, unpadded 1x1 convolution fuses with a shift, got {conv}")
        if offset is None:
            offset = torch.zeros(conv.in_channels, axes, dtype=torch.int64, device=conv.weight.device)
        weight, bias = folded(conv, norm)
        fused = cls(offset, conv.out_channels, True, padding_mode, conv.stride, activation)
        fused.weight, fused.bias = nn.Parameter(weight.flatten(1)), nn.Parameter(bias)
        return fused.train(conv.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rest: tuple[Any, ...] = (self.padding_mode, self.stride, self.activation, residual)
        return shift_linear(x, self.offset, self.weight, self.bias, *rest)

    def extra_repr(self) -> str:
        text = f"{self.weight.shape[1]}, {self.weight.shape[0]}, moved={int(self.offset.any(1).sum())}"
        text += f", padding_mode={self.padding_mode!r}" if self.padding_mode != "zeros" else ""
        text += f", stride={self.stride}" if self.stride != 1 else ""
        return text + (f", activation={self.activation!r}" if self.activation else "")


def fold_norm(conv: Conv, norm: Norm) -> Conv:
    """A convolution with bias that computes ``norm(conv(x))`` by running statistics; see :func:`folded`."""
    weight, bias = folded(conv, norm)
    fused = copy.deepcopy(conv)
    fused.weight, fused.bias = nn.Parameter(weight), nn.Parameter(bias)
    return fused


def folded(conv: Conv, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes ``norm(conv(x))`` by running statistics; summed in float64.

    Raises:
        ValueError: a normalisation without running statistics.
    """
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().double()
    if norm is not None:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"a normalisation without running statistics cannot be folded: {norm}")
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double() * scale
        if norm.affine:
            scale, shift = scale * norm.weight.detach().double(), shift * norm.weight.detach().double()
            shift = shift + norm.bias.detach().double()
        weight, bias = weight * scale.view(-1, *(1,) * (weight.ndim - 1)), bias * scale + shift
    return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
