"""Logit standardisation: only the order and the relative distances of logits are learned, not their size.

Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, algorithm 1.
"""

import torch
from torch import Tensor

from shiftconv.distill.arguments import check_floating, check_logits, exact_pair

_LEAST_DEVIATION = 1e-7  # the authors' code adds as much to the deviation


def standardize_logits(logits: Tensor) -> Tensor:
    """Each row with mean 0 and deviation 1: ``(z - mean) / sqrt(mean((z - mean)^2))``, with the means over classes.

    The deviation is the paper's, of ``K`` numbers; the authors' code divides by ``K - 1`` instead. A row whose logits
    are all equal, as those of a head that starts at zero, has no direction: it becomes 0 and gets no gradient, where
    the authors' code divides by 0 in the gradient.

    Args:
        logits: ``[N, K]``.

    Returns:
        ``[N, K]``, float32, or float64 for float64 logits.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape.
    """
    check_floating("logits", logits, "[N, K]")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mean = logits.mean(1, keepdim=True)
    centred = logits - mean
    variance = centred.square().mean(1, keepdim=True)
    # A mean is rounded, so that equal logits differ from it by some units in the last place.
    least = _LEAST_DEVIATION + 8 * torch.finfo(logits.dtype).eps * mean.detach().abs()
    flat = variance.detach() <= least.square()
    return (centred * variance.masked_fill(flat, 1).rsqrt()).masked_fill(flat, 0)


def prepare(student: Tensor, teacher: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    """Both logits ``[N, K]`` checked, in the precision of the loss, the teacher detached, standardised if so wished."""
    check_logits(student, teacher)
    student, teacher = exact_pair(student, teacher)
    if standardize:
        return standardize_logits(student), standardize_logits(teacher)
    return student, teacher
