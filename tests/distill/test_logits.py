"""Losses on logits: against the papers' words, at the ends of the number range, and in other precisions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftconv.distill import dist, kd, nkd, standardize_logits

from . import papers

LOSSES = {
    "kd": lambda s, t, **more: kd(s, t, **more),
    "kd_hard": lambda s, t, **more: kd(s, t, hard=True, **more),
    "dist": lambda s, t, **more: dist(s, t, **more),
    "nkd": lambda s, t, **more: nkd(s, t, torch.arange(len(s)) % s.shape[1], **more),
    "nkd_soft": lambda s, t, **more: nkd(s, t, _smooth(s), **more),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def _smooth(student):
    rows, classes = student.shape
    labels = torch.nn.functional.one_hot(torch.arange(rows) % classes, classes)
    return 0.9 * labels + 0.1 / classes


def _logits(rows=5, classes=7, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (2, 1), (5, 7), (3, 63)])
def test_kd_is_that_of_the_paper(rows, classes, temperature):
    student, teacher = _logits(rows, classes)
    expected = papers.kd(student.tolist(), teacher.tolist(), temperature)
    assert kd(student, teacher, temperature=temperature).item() == pytest.approx(expected, abs=1e-12)


def test_hard_kd_is_the_cross_entropy_with_the_teachers_class():
    student, teacher = _logits()
    rows = [
        -math.log(papers.softmax(s)[t.index(max(t))]) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert kd(student, teacher, hard=True, temperature=3.0).item() == pytest.approx(sum(rows) / 5, abs=1e-12)


@pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 1.0, 1.0), (4.0, 2.0, 0.5), (0.5, 0.0, 1.0)])
@pytest.mark.parametrize(("rows", "classes"), [(2, 2), (5, 7), (3, 63)])
def test_dist_is_that_of_the_paper(rows, classes, temperature, beta, gamma):
    student, teacher = _logits(rows, classes)
    expected = papers.dist(student.tolist(), teacher.tolist(), temperature, beta, gamma)
    loss = dist(student, teacher, temperature=temperature, beta=beta, gamma=gamma)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_dist_is_zero_for_a_student_that_is_the_teacher():
    student, _ = _logits()
    assert dist(student, student).item() == pytest.approx(0, abs=1e-6)


def test_standardised_logits_are_those_of_the_paper():
    student, _ = _logits()
    expected = torch.tensor([papers.z_scores(row) for row in student.tolist()], dtype=torch.float64)
    torch.testing.assert_close(standardize_logits(student), expected, atol=1e-12, rtol=0)


@every_loss
def test_a_standardised_loss_is_the_loss_of_standardised_logits(loss):
    student, teacher = _logits()
    expected = loss(standardize_logits(student), standardize_logits(teacher))
    torch.testing.assert_close(loss(student, teacher, standardize=True), expected)
    shifted = loss(student * 3 + 7, teacher / 5 - 1, standardize=True)
    torch.testing.assert_close(shifted, expected)


@every_loss
@pytest.mark.parametrize("standardize", [False, True])
def test_gradients_are_those_of_finite_differences(loss, standardize):
    student, teacher = _logits(3, 4, scale=1.0)

    def function(logits):
        return loss(logits, teacher, temperature=2.0, standardize=standardize)

    assert torch.autograd.gradcheck(function, student)
    assert torch.autograd.gradgradcheck(function, student)


@every_loss
def test_no_gradient_reaches_the_teacher(loss):
    student, teacher = _logits()
    teacher.requires_grad_()
    loss(student, teacher, standardize=True).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("standardize", [False, True])
def test_gaps_of_ten_thousand_give_finite_losses_and_gradients(loss, dtype, standardize):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 6, generator=generator, dtype=dtype)
    peaks = torch.zeros(9, 6, dtype=dtype)
    peaks[torch.arange(9), torch.arange(9) % 6] = 1e4
    peaks[6:] *= -1
    for student, teacher in ((rows, peaks), (peaks, rows), (peaks, peaks.roll(1, 1)), (peaks, peaks), (peaks, -peaks)):
        logits = student.clone().requires_grad_()
        value = loss(logits, teacher, standardize=standardize)
        value.backward()
        assert value.isfinite()
        assert logits.grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("standardize", [False, True])
def test_equal_logits_give_finite_losses_and_gradients_of_moderate_size(loss, constant, standardize):
    """As those of a head that starts at zero. The relations of such a row are not defined."""
    _, teacher = _logits(dtype=torch.float32)
    for other in (teacher, torch.full_like(teacher, 3.3)):
        student = torch.full_like(teacher, constant).requires_grad_()
        value = loss(student, other, standardize=standardize)
        value.backward()
        assert value.isfinite()
        assert student.grad.abs().max() < 10


@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
def test_equal_logits_are_standardised_to_zero_without_a_gradient(constant):
    for classes in (1, 3, 7, 11, 63, 1000):  # the mean of some is rounded
        logits = torch.full((2, classes), constant).requires_grad_()
        standardised = standardize_logits(logits)
        assert not standardised.any()
        assert not torch.autograd.grad(standardised[:, 0].sum(), logits)[0].any()


@pytest.mark.parametrize("classes", [3, 7, 11, 63, 1000])
def test_a_student_that_never_varies_has_no_correlation_and_no_gradient(classes):
    for rows in (3, 7, 11, 63):  # the mean of some is rounded
        _, teacher = _logits(rows, classes, dtype=torch.float32)
        student = torch.zeros_like(teacher).requires_grad_()
        value = dist(student, teacher, beta=2.0, gamma=3.0)
        assert value == 5
        assert not torch.autograd.grad(value, student)[0].any()


def test_dist_of_one_image_has_only_the_relation_of_its_classes():
    student, teacher = _logits(1)
    between = dist(student, teacher, gamma=0.0)
    value = dist(student, teacher)
    assert value.item() == pytest.approx(between.item() + 1)
    expected, actual = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (between, value))
    torch.testing.assert_close(actual, expected)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = _logits(dtype=dtype)
    value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(student.float(), teacher.float()), atol=0, rtol=0)
    value.backward()
    assert student.grad.dtype == dtype


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(loss, dtype):
    student, teacher = _logits(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher, standardize=True)
    torch.testing.assert_close(value, loss(student, teacher, standardize=True), atol=0, rtol=0)


@every_loss
def test_float64_of_either_stays_float64(loss):
    student, teacher = _logits()
    assert loss(student, teacher).dtype == torch.float64
    assert loss(student.float(), teacher).dtype == torch.float64
    assert loss(student.float(), teacher.half()).dtype == torch.float32


@given(
    rows=st.integers(1, 6),
    classes=st.integers(2, 9),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 0.01, 1.0, 30.0, 1e4]),
    temperature=st.sampled_from([0.1, 1.0, 20.0]),
)
@settings(max_examples=60, deadline=None)
def test_losses_never_fall_below_their_least_value(rows, classes, seed, scale, temperature):
    student, teacher = _logits(rows, classes, seed, scale)
    for loss in LOSSES.values():
        value = loss(student, teacher, temperature=temperature)
        assert value.isfinite()
        assert value >= -1e-6 * temperature**2  # DIST's is missed by the 1e-8 in it
    assert kd(student, student, temperature=temperature).item() == pytest.approx(0, abs=1e-9 * temperature**2)


@pytest.mark.slow
@every_loss
def test_a_loss_compiles_in_one_piece(loss):
    student, teacher = _logits(dtype=torch.float32)
    value = torch.compile(loss, fullgraph=True)(student, teacher, temperature=2.0, standardize=True)
    torch.testing.assert_close(value, loss(student, teacher, temperature=2.0, standardize=True))
    gradient = torch.autograd.grad(value, student)[0]
    expected = torch.autograd.grad(loss(student, teacher, temperature=2.0, standardize=True), student)[0]
    torch.testing.assert_close(gradient, expected)


X = torch.zeros(3, 4)
WRONG = [
    (lambda loss: loss([1.0], X), TypeError, r"student must be a tensor \[N, K\], got list"),
    (lambda loss: loss(X.long(), X), TypeError, "student must be a floating-point tensor, got torch.int64"),
    (lambda loss: loss(X, None), TypeError, r"teacher must be a tensor \[N, K\], got NoneType"),
    (lambda loss: loss(X, X[:, :3]), ValueError, r"same shape \[N, K\], got \(3, 4\) and \(3, 3\)"),
    (lambda loss: loss(X[None], X[None]), ValueError, r"student must have shape \[N, K\].*, got \(1, 3, 4\)"),
    (lambda loss: loss(X[:0], X[:0]), ValueError, r"student must have shape \[N, K\], none of them 0, got \(0, 4\)"),
    (lambda loss: loss(X, X, temperature=0.0), ValueError, "temperature must be above 0 and finite, got 0.0"),
    (lambda loss: loss(X, X, temperature=-1), ValueError, "temperature must be above 0 and finite, got -1"),
    (lambda loss: loss(X, X, temperature=math.inf), ValueError, "temperature must be above 0 and finite, got inf"),
    (lambda loss: loss(X, X, temperature=math.nan), ValueError, "temperature must be above 0 and finite, got nan"),
    (lambda loss: loss(X, X, temperature="1"), TypeError, "temperature must be a number, got '1'"),
    (lambda loss: loss(X, X, temperature=True), TypeError, "temperature must be a number, got True"),
]


@every_loss
@pytest.mark.parametrize(("call", "error", "words"), WRONG)
def test_wrong_logits_and_temperatures_are_told(loss, call, error, words):
    if loss in (LOSSES["nkd"], LOSSES["nkd_soft"]):  # whose target is made of the student's logits
        target = torch.zeros(3, dtype=torch.int64)

        def loss(student, teacher, **more):
            return nkd(student, teacher, target, **more)

    with pytest.raises(error, match=words):
        call(loss)


@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_wrong_weights_of_dist_are_told(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got -1"):
        dist(X, X, **{name: -1})
    with pytest.raises(TypeError, match=f"{name} must be a number, got None"):
        dist(X, X, **{name: None})


def test_wrong_logits_to_standardise_are_told():
    with pytest.raises(ValueError, match=r"logits must have shape \[N, K\], none of them 0, got \(4,\)"):
        standardize_logits(X[0])
    with pytest.raises(TypeError, match=r"logits must be a floating-point tensor, got torch\.bool"):
        standardize_logits(X > 0)
