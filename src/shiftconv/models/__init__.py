"""Floor 3: the networks, registered with timm; importing this package is what registers them."""

from typing import Any

import timm
from torch import nn

from shiftconv.models import active_resnet, fenet, replknet, shiftnet, shiftresnet, shiftwise, slak, unireplknet
from shiftconv.names import closest, unknown

__all__ = ["create_model", "list_models"]

# timm's registry knows a network's module by its last name
_NETWORKS = (active_resnet, fenet, replknet, shiftnet, shiftresnet, shiftwise, slak, unireplknet)
_MODULES = [module.__name__.rpartition(".")[2] for module in _NETWORKS]
_NONE_IS_A_CHOICE = ("small_kernel_size", "layer_scale")  # timm drops every None; there 0 means the same


def create_model(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """A network of this package, or any other that timm knows: ``timm.create_model`` with helpful errors.

    Args:
        name: one of :func:`list_models`, or a name of timm's.
        pretrained: load the weights that timm's registry has for the name.
        arguments: the network's own, such as ``expansion``, and timm's: ``num_classes``, ``in_chans``,
            ``global_pool``, ``drop_rate``, ``features_only`` ...

    Raises:
        ValueError: an unknown name, or a value that makes no network.
        TypeError: an argument that the network does not have.

    >>> create_model("shiftresnet20", expansion=3, num_classes=100)
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a model must be a string, got {name!r}")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = closest(name, timm.list_models(), cutoff=0.8)  # timm knows a thousand more, too many to list
        raise unknown("model", name, {*list_models(), *([near] if near else [])})
    arguments = {key: 0 if value is None and key in _NONE_IS_A_CHOICE else value for key, value in arguments.items()}
    return timm.create_model(name, pretrained=pretrained, **arguments)


def list_models(filter: str = "*") -> list[str]:
    """The names of this package's networks that match a shell-style ``filter``, in natural order."""
    return timm.list_models(filter, module=_MODULES)
