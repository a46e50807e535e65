"""What this floor asks of a torch convolution before it counts on what one computes."""

from torch import nn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def check_conv(conv: nn.Module) -> tuple[Conv, int]:
    """A plain convolution and its number of spatial axes.

    Raises:
        TypeError: ``conv`` is none, or computes something of its own (as subclasses that pad by themselves do).
    """
    for ndim, plain in _CONVS.items():
        if isinstance(conv, plain):
            if type(conv).forward is not plain.forward:
                raise TypeError(f"{type(conv).__name__} is no plain {plain.__name__}: it has a forward of its own")
            return conv, ndim
    raise TypeError(f"expected an nn.Conv1d, nn.Conv2d or nn.Conv3d, got {type(conv).__name__}")
