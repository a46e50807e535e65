"""The losses against numbers of the authors' own code, run in float64.

Inputs and weights are functions of their names.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shiftconv.distill import MGD, FeatureLoss, kd, nkd

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = json.loads((GOLDEN / "distill.json").read_text())
VALUES = DOCUMENT["values"]
with np.load(GOLDEN / "distill.npz") as arrays:
    ARRAYS = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
SALTS = {"a": "kd/", "c": "kdc/"}
SHAPES = {"a": (6, 10), "c": (4, 1000)}


def _generator(name):
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _normal(name, shape, scale=1.0):
    return torch.from_numpy(scale * _generator(name).standard_normal(shape))


def _target(case, kind):
    if kind == "soft":
        return _normal(SALTS[case] + "soft", SHAPES[case]).softmax(1)
    rows, classes = SHAPES[case]
    return torch.from_numpy(_generator(SALTS[case] + "labels").integers(0, classes, size=rows))


def _logit_loss(name, student, teacher):
    """Their loss of that name, made of ours."""
    case, loss, *settings, kind = name.split("|")
    target = _target(case, kind)
    if loss == "nkd":
        temperature, alpha = (float(text.lstrip("tempalh")) for text in settings)
        labels = target if kind == "hard" else target.argmax(1)  # all that they see of a soft label
        return nkd(student, teacher, labels, temperature=temperature, alpha=alpha)
    task_loss = F.cross_entropy(student, target)
    if settings == ["hardflag"]:
        return 0.5 * kd(student, teacher, hard=True) + 0.5 * task_loss
    temperature, alpha = float(settings[0][1:]), float(settings[1].removeprefix("alpha"))
    return alpha * kd(student, teacher, temperature=temperature) + (1 - alpha) * task_loss


@pytest.mark.parametrize("name", [name for name in VALUES if "kd|" in name])
def test_a_loss_on_logits_and_its_gradient_are_those_of_the_authors(name):
    case = name[0]
    student = _normal(SALTS[case] + "student", SHAPES[case], 2.0).requires_grad_()
    teacher = _normal(SALTS[case] + "teacher", SHAPES[case], 3.0).requires_grad_()
    loss = _logit_loss(name, student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(VALUES[name], abs=1e-10, rel=0)
    gradient = student.grad if case == "a" else student.grad[:, ::10]
    torch.testing.assert_close(gradient, ARRAYS[name], atol=1e-10, rtol=0)
    assert teacher.grad is None


def test_there_are_as_many_numbers_as_the_authors_code_gave():
    assert len(VALUES) == 33
    assert sum("kd|" in name for name in VALUES) == 28


@pytest.mark.parametrize("case", SALTS)
@pytest.mark.parametrize(
    ("name", "loss"), [("fd_smoothl1_beta2", FeatureLoss(3, 3)), ("fd_mse", FeatureLoss(3, 3, "mse"))]
)
def test_a_feature_loss_and_its_gradient_are_those_of_the_authors(case, name, loss):
    student = _normal(SALTS[case] + "fs", (2, 3, 5, 5), 3.0).requires_grad_()
    value = loss(student, _normal(SALTS[case] + "ft", (2, 3, 5, 5), 3.0))
    value.backward()
    assert value.item() == pytest.approx(VALUES[f"{case}|{name}"], abs=1e-10, rel=0)
    torch.testing.assert_close(student.grad, ARRAYS[f"{case}|{name}"], atol=1e-10, rtol=0)


def _authors_mgd():
    """MGD with the authors' weights, which have the same names."""
    loss = MGD(6, 8).double()
    weights = {}
    for name, shape in DOCUMENT["mgd_weights"].items():
        scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        weights[name] = _normal("mgd/" + name, shape, scale).float()
    loss.load_state_dict(weights)
    return loss


def test_mgd_and_its_gradient_are_those_of_the_authors():
    student = _normal("mgd/s", (2, 6, 7, 7)).requires_grad_()
    seed = 3  # what they drew with it is ARRAYS["mgd|mask"]
    kept = torch.rand(2, 8, 1, 1, generator=torch.Generator().manual_seed(seed)) >= 0.5
    assert torch.equal(kept, ARRAYS["mgd|mask"])
    value = _authors_mgd()(student, _normal("mgd/t", (2, 8, 14, 14)), torch.Generator().manual_seed(seed))
    value.backward()
    assert value.item() == pytest.approx(VALUES["mgd"], abs=1e-10, rel=0)
    torch.testing.assert_close(student.grad, ARRAYS["mgd"], atol=1e-10, rtol=0)
