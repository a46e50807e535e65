"""Sparse checkpoints: weights and masks that were saved apart become weights with zeros.

    {"masks": {"stages.0...weight": mask}}      beside the state dict, as dynamic sparse training keeps them
    weight_orig, weight_mask                    in the state dict, as ``torch.nn.utils.prune`` does

The authors of SLaK save neither, but weights that are zero already.
"""

from collections.abc import Mapping

from torch import Tensor

_ORIGINAL, _MASK = "_orig", "_mask"


def apply_masks(state_dict: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with zeros where a mask is zero; those of ``prune`` under the names that they had before.

    Args:
        state_dict: the weights.
        masks: by the name of their weight, of its shape or one that broadcasts to it.

    Raises:
        ValueError: a mask without its weight, or of another shape.
    """
    weights = dict(state_dict)
    pairs = dict(masks)
    for key in [key for key in weights if key.endswith(_ORIGINAL) and key[: -len(_ORIGINAL)] + _MASK in weights]:
        name = key[: -len(_ORIGINAL)]
        weights[name] = weights.pop(key)
        pairs[name] = weights.pop(name + _MASK)
    for name, mask in pairs.items():
        if (weight := weights.get(name)) is None:
            raise ValueError(f"a mask for {name[:120]!r}, which is not among the weights")
        try:
            fits = mask.expand_as(weight)
        except RuntimeError:
            shapes = f"{list(mask.shape)} for a weight {list(weight.shape)}"
            raise ValueError(f"the mask of {name[:120]!r} is {shapes}") from None
        weights[name] = weight * (fits != 0)
    return weights
