"""NKD with labels and soft labels, against the paper's words and against the expectation written out."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftconv.distill import nkd

from . import papers


def _logits(rows=5, classes=7, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    return student.clone().requires_grad_(), teacher, torch.randint(classes, (rows,), generator=generator)


def _one_by_one(student, teacher, soft, **more):
    """The expectation, from a call with labels for each class of each image."""
    rows, classes = soft.shape
    total = student.new_zeros(())
    for n in range(rows):
        for k in range(classes):
            total = total + soft[n, k] * nkd(student[n : n + 1], teacher[n : n + 1], torch.tensor([k]), **more)
    return total / rows


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (3.0, 1.5), (0.5, 0.0)])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (5, 7), (3, 63)])
def test_nkd_is_that_of_the_paper(rows, classes, temperature, alpha):
    student, teacher, labels = _logits(rows, classes)
    expected = papers.nkd(student.tolist(), teacher.tolist(), labels.tolist(), temperature, alpha)
    assert nkd(student, teacher, labels, temperature=temperature, alpha=alpha).item() == pytest.approx(
        expected, abs=1e-11
    )


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (3.0, 1.5), (0.5, 0.0)])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (5, 7), (3, 63)])
@pytest.mark.parametrize("kind", ["smooth", "mixed", "any"])
def test_soft_nkd_is_the_expectation_over_the_labels(kind, rows, classes, temperature, alpha):
    student, teacher, labels = _logits(rows, classes)
    one_hot = F.one_hot(labels, classes).double()
    soft = {
        "smooth": 0.9 * one_hot + 0.1 / classes,
        "mixed": 0.7 * one_hot + 0.3 * one_hot.flip(0),
        "any": torch.randn(rows, classes, generator=torch.Generator().manual_seed(9), dtype=torch.float64).softmax(1),
    }[kind]
    expected = papers.soft_nkd(student.tolist(), teacher.tolist(), soft.tolist(), temperature, alpha)
    value = nkd(student, teacher, soft, temperature=temperature, alpha=alpha)
    assert value.item() == pytest.approx(expected, abs=1e-11)
    by_hand = _one_by_one(student, teacher, soft, temperature=temperature, alpha=alpha)
    one, other = (torch.autograd.grad(loss, student)[0] for loss in (value, by_hand))
    torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_labels_are_the_expectation_for_sure_networks_too(scale, temperature):
    """In float32, in which probabilities near 1 and 0 have lost all their figures."""
    student, teacher, labels = _logits(8, 6, scale=scale, dtype=torch.float32)
    teacher[:3] = student[:3].detach()  # both sure of the same class
    soft = 0.9 * F.one_hot(labels, 6) + 0.1 / 6
    value = nkd(student, teacher, soft, temperature=temperature)
    exact = student.detach().double().requires_grad_()
    expected = _one_by_one(exact, teacher.double(), soft, temperature=temperature)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad(loss, logits)[0].double() for loss, logits in ((value, student), (expected, exact))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-5)


@given(
    rows=st.integers(1, 5),
    classes=st.integers(2, 9),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_a_one_hot_soft_label_is_a_label(rows, classes, seed, scale, dtype):
    student, teacher, labels = _logits(rows, classes, seed, scale, dtype)
    hard = nkd(student, teacher, labels, temperature=2.0)
    soft = nkd(student, teacher, F.one_hot(labels, classes).to(dtype), temperature=2.0)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(soft, hard, rtol=16 * precision, atol=64 * precision)
    one, other = (torch.autograd.grad(loss, student)[0] for loss in (hard, soft))
    torch.testing.assert_close(other, one, rtol=1e-3, atol=64 * precision)


def test_equally_probable_top_classes_are_both_counted():
    student = torch.tensor([[50.0, 50.0, 0.0, -50.0]], dtype=torch.float64)
    teacher = torch.tensor([[9.0, 0.0, 9.0, 9.0]], dtype=torch.float64)
    soft = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    expected = papers.soft_nkd(student.tolist(), teacher.tolist(), soft.tolist(), 1.0, 1.0)
    assert nkd(student, teacher, soft).item() == pytest.approx(expected, rel=1e-12)


def test_a_teacher_without_doubt_still_tells_the_others_apart():
    """Its other probabilities are 0 in float32; the softmax over the other classes is not."""
    teacher = torch.tensor([[1e4, 2.0, 1.0, 0.0]])
    student = torch.tensor([[0.0, 1.0, 0.5, -2.0]])
    rest = F.cross_entropy(student[:, 1:], teacher[:, 1:].softmax(1))
    expected = F.cross_entropy(student, torch.tensor([0])) + rest
    for target in (torch.tensor([0]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])):
        torch.testing.assert_close(nkd(student, teacher, target), expected)


def test_no_tensor_has_a_side_for_each_pair_of_classes():
    student, teacher, _ = _logits(2, 500, dtype=torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        nkd(student, teacher, teacher.softmax(1)).backward()
    assert max(sizes) == 1000


def test_no_gradient_reaches_soft_labels():
    student, teacher, _ = _logits()
    soft = teacher.softmax(1).requires_grad_()
    nkd(student, teacher, soft).backward()
    assert soft.grad is None


X = torch.zeros(3, 4)
LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        ([0, 1, 2], TypeError, r"target must be a tensor, labels \[N\] or soft labels \[N, K\], got list"),
        (LABELS.int(), TypeError, "target must be int64 if it is labels .*, got torch.int32"),
        (LABELS.float(), TypeError, "target must be int64 if it is labels .*, got torch.float32"),
        (X.long(), TypeError, "target must be floating-point if it is soft labels .*, got torch.int64"),
        (LABELS[:2], ValueError, r"target must have shape \(3,\) or \(3, 4\) for these logits, got \(2,\)"),
        (X[:, :3], ValueError, r"target must have shape \(3,\) or \(3, 4\) for these logits, got \(3, 3\)"),
        (LABELS + 4, ValueError, "target must be labels from 0 to 3, got 4"),
        (LABELS - 1, ValueError, "target must be labels from 0 to 3, got -1"),
    ],
)
def test_a_wrong_target_is_told(target, error, words):
    with pytest.raises(error, match=words):
        nkd(X, X, target)


def test_a_single_class_and_a_wrong_weight_are_told():
    with pytest.raises(ValueError, match=r"at least 2 classes, got shape \(3, 1\)"):
        nkd(X[:, :1], X[:, :1], LABELS)
    with pytest.raises(ValueError, match=r"alpha must be at least 0 and finite, got -0\.1"):
        nkd(X, X, LABELS, alpha=-0.1)
