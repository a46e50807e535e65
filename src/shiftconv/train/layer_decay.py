"""Layer-wise learning rates: the nearer a layer is to the images, the slower it learns."""

from typing import Literal, cast

from timm.models import group_parameters
from torch import nn

By = Literal["blocks", "stages"]


def layer_scales(model: nn.Module, decay: float, by: By = "blocks", levels: int | None = None) -> dict[str, float]:
    """What to multiply the learning rate of each parameter by, from the network's ``group_matcher``.

    The groups are numbered from the images on; the last one (norm and head) has the factor 1, group ``i`` of the others
    ``decay ** (levels + 1 - i)``. So the fine-tuning of BEiT and ConvNeXt has it, and that of SLaK's downstream tasks.

    Args:
        model: a network with timm's ``group_matcher``.
        decay: factor from one group to the one before it, in (0, 1].
        by: ``blocks`` (of our large-kernel networks: three blocks of the long stage are one group, the last stage is
            one) or ``stages`` (stem and downsampling are the first group).
        levels: number of the last group but the head's; None: as many as there are. The authors have 12, or 6 for
            the tiny networks downstream, whatever the network is; more than there are slow all but the end down.

    Raises:
        ValueError: if the network tells no groups, or there are more than ``levels``.
    """
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            f"the network {type(model).__name__} has no group_matcher, which layer decay asks for the layers"
        )
    group_of = cast(dict[str, int], group_parameters(model, matcher(coarse=by == "stages"), reverse=True))
    head = max(group_of.values())
    least = max(head - 1, 0)
    levels = least if levels is None else levels
    if levels < least:
        raise ValueError(f"layer decay needs at least {least} levels for {type(model).__name__}, got {levels}")

    def level(group: int) -> int:
        if group == head:
            return levels + 1
        return levels if by == "blocks" and group == head - 1 else group

    return {name: decay ** (levels + 1 - level(group)) for name, group in group_of.items()}
