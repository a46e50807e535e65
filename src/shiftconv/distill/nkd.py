"""Normalised knowledge distillation (NKD): the target's probability, and how the others are distributed.

Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels", ICCV 2023, arXiv:2303.13005, the loss called NKD.
"""

import torch
from torch import Tensor

from shiftconv.distill.arguments import check_target, number
from shiftconv.distill.standardize import prepare


def nkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Normalised knowledge distillation: the mean over images of ::

        L(k) = -q[k] * log p[k] - alpha * T^2 * sum over c != k of q_k[c] * log p_k[c]

    for target ``k``, with ``p = softmax(student)`` and ``q = softmax(teacher)``, and ``p_k``, ``q_k`` the softmax of
    ``student / T``, ``teacher / T`` over the classes other than ``k``. For soft labels ``y`` it is the expectation,
    ``sum over k of y[k] * L(k)``; the authors' code takes ``L(argmax y)``. The usual loss may be added to it.

    All is computed with logarithms of probabilities, so that it is finite for any finite logits, and the gradient too.
    Soft labels cost a few times as much as labels, but no ``[N, K, K]``.

    Args:
        student: logits ``[N, K]``, ``K`` at least 2.
        teacher: logits ``[N, K]``; no gradient reaches them.
        target: labels int64 ``[N]``, or soft labels ``[N, K]``, at least 0, that add up to 1 in each row.
        temperature: ``T``, above 0.
        alpha: weight of the part that is not the target's, at least 0.
        standardize: :func:`standardize_logits` of both first.

    Raises:
        TypeError: logits or soft labels that are no floating-point tensors, labels that are not int64, a temperature or
            weight that is no number.
        ValueError: other shapes, a single class, labels out of range (looked at on a CPU only), a temperature that is
            not above 0, a negative weight.
    """
    number("temperature", temperature, above=0)
    number("alpha", alpha)
    student, teacher = prepare(student, teacher, standardize)
    rows, classes = student.shape
    if classes < 2:
        raise ValueError(f"student and teacher must have at least 2 classes, got shape {tuple(student.shape)}")
    check_target(target, rows, classes)
    named = -teacher.softmax(1) * student.log_softmax(1)
    warm_student, warm_teacher = student / temperature, teacher / temperature
    if target.ndim == 1:
        column = target[:, None]
        named, others = named.gather(1, column).squeeze(1), _others(warm_student, warm_teacher, column)
    else:
        soft = target.detach().to(student.dtype)
        named, others = (soft * named).sum(1), _expected_others(warm_student, warm_teacher, soft)
    return (named + alpha * temperature**2 * others).mean()


def _others(student: Tensor, teacher: Tensor, column: Tensor) -> Tensor:
    """Cross entropy ``[N]`` of the two softmax over all classes but that in ``column``, ``[N, 1]``."""
    q = teacher.scatter(1, column, -torch.inf).softmax(1)
    log_p = student.scatter(1, column, -torch.inf).log_softmax(1).scatter(1, column, 0.0)
    return -(q * log_p).sum(1)


def _expected_others(student: Tensor, teacher: Tensor, soft: Tensor) -> Tensor:
    """``sum over k of soft[k] * _others(k)``, ``[N]``, without a softmax for each ``k``.

    With ``p`` and ``q`` of all classes, ``q_k[c] = q[c] / (1 - q[k])`` and ``p_k`` alike, so that ::

        _others(k) = -(sum over c != k of q[c] * log p[c]) / (1 - q[k]) + log(1 - p[k])

    which loses its figures only where ``p[k]`` or ``q[k]`` is near 1. At most the student's and the teacher's most
    probable class can be: these two are computed as such, and in all others both are at most one half.
    """
    log_p, q = student.log_softmax(1), teacher.softmax(1)
    first, second = teacher.argmax(1, keepdim=True), student.argmax(1, keepdim=True)
    apart = torch.zeros_like(soft, dtype=torch.bool).scatter(1, first, True).scatter(1, second, True)
    rest = soft.masked_fill(apart, 0)
    share = rest / (1 - q).masked_fill(apart, 1)
    # The sum over k is taken first, and its own k out of it for each c: for a single k that leaves exactly 0.
    expected = -(q * (share.sum(1, keepdim=True) - share) * log_p).sum(1)
    expected = expected + (rest * torch.log1p(-log_p.exp().masked_fill(apart, 0))).sum(1)
    for column, weight in ((first, soft), (second, soft.scatter(1, first, 0.0))):  # a class that is both counts once
        expected = expected + weight.gather(1, column).squeeze(1) * _others(student, teacher, column)
    return expected
