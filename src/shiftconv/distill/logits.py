"""Losses on logits that need no labels: knowledge distillation (KD) and relations (DIST)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftconv.distill.arguments import number
from shiftconv.distill.standardize import prepare

_DIST_EPS = 1e-8  # as in the authors' code; classes that are improbable in the whole batch hardly count


def kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    hard: bool = False,
    standardize: bool = False,
) -> Tensor:
    """The teacher's part of knowledge distillation.

    ::

        T^2 * mean over images of KL(softmax(teacher / T) || softmax(student / T))
        hard: mean over images of -log softmax(student)[argmax teacher]

    The usual loss of the labels is to be added to it: ``alpha * kd(...) + (1 - alpha) * task_loss``.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2. Hard: Touvron
    et al., "Training data-efficient image transformers", arXiv:2012.12877, equation 3, with an alpha of 0.5.

    Args:
        student: logits ``[N, K]``.
        teacher: logits ``[N, K]``; no gradient reaches them.
        temperature: ``T``, above 0; ``hard`` has none.
        hard: learn the teacher's most probable class instead of its probabilities.
        standardize: :func:`standardize_logits` of both first.

    Raises:
        TypeError: logits that are no floating-point tensors, a temperature that is no number.
        ValueError: other shapes, a temperature that is not above 0.
    """
    number("temperature", temperature, above=0)
    student, teacher = prepare(student, teacher, standardize)
    if hard:
        return F.cross_entropy(student, teacher.argmax(1))
    log_p, log_q = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """DIST: the student's probabilities need only be correlated with the teacher's, not equal to them.

    ::

        p, q = softmax(student / T), softmax(teacher / T)
        T^2 * (beta * (1 - mean over images of corr(p[n, :], q[n, :]))
               + gamma * (1 - mean over classes of corr(p[:, k], q[:, k])))

    with Pearson's correlation. Where a row or column does not vary, as all columns in a batch of one image, the
    correlation is 0 and has no gradient.
    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536, section
    3, the losses called inter and intra; ``T^2`` and the 1e-8 that is added to the norms' product are from the authors'
    code.

    Args:
        student: logits ``[N, K]``.
        teacher: logits ``[N, K]``; no gradient reaches them.
        temperature: ``T``, above 0.
        beta: weight of the relation between the classes of an image, at least 0.
        gamma: weight of the relation between the images in a class, at least 0.
        standardize: :func:`standardize_logits` of both first.

    Raises:
        TypeError: logits that are no floating-point tensors, a temperature or weight that is no number.
        ValueError: other shapes, a temperature that is not above 0, a negative weight.
    """
    number("temperature", temperature, above=0)
    number("beta", beta)
    number("gamma", gamma)
    student, teacher = prepare(student, teacher, standardize)
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    between = 1 - _correlations(p, q, 1).mean()
    within = 1 - _correlations(p, q, 0).mean()
    return temperature**2 * (beta * between + gamma * within)


def _correlations(p: Tensor, q: Tensor, axis: int) -> Tensor:
    """Pearson's correlation of ``p`` and ``q`` along ``axis``; 0 where one of them does not vary."""
    p, p_variation = _centred(p, axis)
    q, q_variation = _centred(q, axis)
    flat = (p_variation == 0) | (q_variation == 0)
    norm = p_variation.masked_fill(flat, 1).sqrt() * q_variation.masked_fill(flat, 1).sqrt()
    return ((p * q).sum(axis) / (norm + _DIST_EPS)).masked_fill(flat, 0)


def _centred(p: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """``p`` minus its mean, and the sum of its squares: exactly 0 where it is only what rounding of the mean leaves."""
    mean = p.mean(axis, keepdim=True)
    centred = p - mean
    variation = centred.square().sum(axis)
    least = (8 * torch.finfo(p.dtype).eps * mean.detach().squeeze(axis)).square() * p.shape[axis]
    return centred, variation.masked_fill(variation.detach() <= least, 0)
