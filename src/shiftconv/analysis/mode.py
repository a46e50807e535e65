"""Looking at a network without leaving a trace on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, *, frozen: bool = False) -> Iterator[None]:
    """Eval mode inside, and with ``frozen`` no gradients of parameters; every flag is put back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()] if frozen else []
    model.eval()
    try:
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.requires_grad_(grad)


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the model's first floating-point weight lives, and its precision; a model without weights is on the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()
