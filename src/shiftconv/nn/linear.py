"""A linear layer that runs where it is fastest on a CPU."""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_PLAIN = (Tensor, nn.Parameter)


class Linear(nn.Linear):
    """``nn.Linear``, by oneDNN where torch would take MKL on a processor that MKL has no fast code for.

    So it is on AMD's: oneDNN takes 0.75 to 0.95 of the time there, most where a number of channels is no multiple of 8
    (docs/log.md). Elsewhere, for other types than float32, and where graphs are captured it is ``nn.Linear`` alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _is_for_onednn(input, self.weight):
            return _Linear.apply(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in _PLAIN  # nor a fake one, or one of a class that has kernels of its own
        and type(weight) in _PLAIN
        and x.ndim > 1
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        and torch.backends.mkldnn.enabled
        and _mkl_is_slow()
    )


@cache
def _mkl_is_slow() -> bool:
    """Whether torch has both libraries, and the processor is none of Intel's."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processor = Path("/proc/cpuinfo")
    return processor.exists() and "AuthenticAMD" in processor.read_text()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN; both may be transposed views."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = grad_weight = None
        if torch.is_grad_enabled():  # a second derivative is wanted: by torch's own operators, which have it
            grad_x = grad @ weight if wants_x else None
            grad_weight = rows.t() @ inputs if wants_weight else None
        else:
            grad_x = _product(grad, weight.t()) if wants_x else None
            if wants_weight and rows.shape[1] <= inputs.shape[1]:  # the longer side of the result is the inner loop's
                grad_weight = _product(rows.t(), inputs.t())
            elif wants_weight:
                grad_weight = _product(inputs.t(), rows.t()).t()
        return grad_x, grad_weight, rows.sum(0) if wants_bias else None


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        """Two for each multiplication and addition, of shapes."""
        return 2 * math.prod(x) * weight[0]
