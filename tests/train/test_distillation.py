"""What a teacher adds to training: its losses against plain numbers, and that it stays as it was."""

import copy
import math
import re
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shiftconv.models import create_model
from shiftconv.train import checkpoint as ck
from shiftconv.train.device import Compute
from shiftconv.train.distillation import FromTeacher, Teacher, create_teacher
from shiftconv.train.events import EpochDone
from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Distillation, Mix, Optim

from ..distill import papers
from . import processes

SMALL = {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "patch_size": 2}
LARGE = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 12], "patch_size": 2}
DIGITS = ((0.3055,) * 3, (0.3235,) * 3)
CPU = Compute(torch.device("cpu"))
K, SIZE = 5, 32


@pytest.fixture(autouse=True)
def own_random_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network(args, classes=K):
    """With weights that are far from those of a start, so that logits differ."""
    made = create_model("convnext_atto", num_classes=classes, **args)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def batch(soft=False, count=6):
    labels = torch.randint(K, (count,))
    shares = 0.7 * F.one_hot(labels, K) + 0.3 * F.one_hot(labels.flip(0), K)
    return torch.randn(count, 3, SIZE, SIZE), shares.float() if soft else labels


def recipe_with(**settings):
    recipe = {name: settings.pop(name) for name in ("loss", "label_smoothing", "amp") if name in settings}
    return Recipe(
        model="convnext_atto", model_args=SMALL, distill=Distillation(teacher="convnext_atto", **settings), **recipe
    )


def task_of(student, teacher, normalisation=None, compute=CPU, **settings):
    return FromTeacher(student, Teacher(teacher, compute, normalisation), recipe_with(**settings), SIZE)


def seen(net, images):
    """Logits, and what the last stage gives."""
    maps = []
    handle = net.stages[-1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    logits = net(images)
    handle.remove()
    return logits, maps[0]


def task_loss(logits, targets, smoothing):
    """Cross entropy in plain numbers; mixed labels are smooth already."""
    total, rows = 0.0, logits.tolist()
    for row, target in zip(rows, targets.tolist(), strict=True):
        p = papers.softmax(row)
        if isinstance(target, int):
            shares = [(1 - smoothing) * (k == target) + smoothing / len(p) for k in range(len(p))]
        else:
            shares = target
        total -= sum(share * math.log(q) for share, q in zip(shares, p, strict=True))
    return total / len(rows)


def logits_loss(how, student, teacher, targets, smoothing):
    own = task_loss(student, targets, smoothing)
    s, t = student.tolist(), teacher.tolist()
    if how.standardize:
        s, t = [papers.z_scores(row) for row in s], [papers.z_scores(row) for row in t]
    if how.logits == "none":
        return own
    if how.logits == "kd":
        if how.hard:
            named = [max(range(K), key=row.__getitem__) for row in t]
            taught = -sum(math.log(papers.softmax(row)[k]) for row, k in zip(s, named, strict=True)) / len(s)
        else:
            taught = papers.kd(s, t, how.temperature)
        return how.alpha * taught + (1 - how.alpha) * own
    if how.logits == "nkd":
        loss = papers.nkd if targets.ndim == 1 else papers.soft_nkd
        taught = loss(s, t, targets.tolist(), how.temperature, how.alpha)
    else:
        taught = papers.dist(s, t, how.temperature, how.beta, how.gamma)
    return taught + own if how.keep_task_loss else taught


def feature_loss(how, task, found, wanted, random):
    if how.features == "none":
        return 0.0
    module, count = task.beside["features"], len(found)
    weight, bias = module.align.weight[:, :, 0, 0], module.align.bias
    aligned = torch.einsum("ki,nihw->nkhw", weight, found) + bias[:, None, None]
    if how.features == "mgd":
        first, _, second = module.generation
        hidden = aligned * (random >= how.mask_share)
        hidden = F.conv2d(hidden, first.weight, first.bias, padding=1).clamp(min=0)
        made = F.conv2d(hidden, second.weight, second.bias, padding=1)
        return 7e-5 * float((made - wanted).square().sum()) / count
    d = (aligned - wanted).abs()
    squares = d.square()
    return float((squares if how.features == "mse" else torch.where(d < 2, squares / 4, d - 1)).mean())


LOGITS = {
    "kd": dict(logits="kd", temperature=3.0, alpha=0.7),
    "kd hard": dict(logits="kd", hard=True, alpha=0.5),
    "kd standardised": dict(logits="kd", temperature=2.0, alpha=1.0, standardize=True),
    "nkd": dict(logits="nkd", temperature=2.0, alpha=1.5),
    "nkd alone": dict(logits="nkd", keep_task_loss=False, standardize=True),
    "dist": dict(logits="dist", temperature=2.0, beta=2.0, gamma=0.5),
    "dist alone": dict(logits="dist", keep_task_loss=False),
    "none": dict(logits="none"),
}
FEATURES = {
    "none": {},
    "smooth_l1": dict(features="smooth_l1", feature_weight=0.3),
    "mse": dict(features="mse", feature_weight=0.3),
    "mgd": dict(features="mgd", feature_weight=3000.0, mask_share=0.4),
}


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "mixed"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("logits", LOGITS)
def test_the_loss_is_that_of_plain_numbers(logits, features, soft):
    if logits == features == "none":
        pytest.skip("is no distillation")
    student, teacher = network(SMALL), network(LARGE).eval()
    settings = {**LOGITS[logits], **FEATURES[features]}
    task = task_of(student, copy.deepcopy(teacher), label_smoothing=0.1, **settings)
    with torch.no_grad():
        for parameter in task.beside.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    images, targets = batch(soft)
    torch.manual_seed(5)
    loss, outputs = task(images, targets)
    torch.manual_seed(5)
    random = torch.rand(len(images), LARGE["dims"][-1], 1, 1)
    with torch.no_grad():
        own, found = seen(student, images)
        known, wanted = seen(teacher, images)
        torch.testing.assert_close(outputs, own, atol=1e-5, rtol=1e-5)
        how = task._settings
        expected = logits_loss(how, own.double(), known.double(), targets, 0.1)
        expected += how.feature_weight * feature_loss(how, task, found, wanted, random)
    assert loss.item() == pytest.approx(expected, rel=2e-4, abs=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.beside.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_binary_cross_entropy_takes_the_place_of_the_usual_loss():
    student, teacher = network(SMALL), network(LARGE).eval()
    task = task_of(student, teacher, loss="bce", logits="kd", alpha=0.25, temperature=2.0)
    images, labels = batch()
    loss, outputs = task(images, labels)
    own = F.binary_cross_entropy_with_logits(outputs, F.one_hot(labels, K).float(), reduction="none").sum(1).mean()
    known = teacher(images).tolist()
    assert loss.item() == pytest.approx(0.25 * papers.kd(outputs.tolist(), known, 2.0) + 0.75 * own.item(), rel=1e-4)


@pytest.mark.parametrize("features", ["none", "mgd"])
def test_the_teacher_stays_as_it_is(features):
    teacher = create_model("resnet18", num_classes=K, layers=[1, 1, 1, 1], channels=[4, 4, 8, 8])  # has batch norms
    before = copy.deepcopy(teacher.state_dict())
    task = task_of(network(SMALL), teacher, **FEATURES[features])
    task.train()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    for _ in range(2):
        task(*batch())[0].backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in task.parameters()}
    assert {name.partition(".")[0] for name in task.state_dict()} == {"network"} | (
        {"beside"} if features != "none" else set()
    )


def test_asking_for_channels_leaves_no_trace_on_the_student():
    student = create_model("resnet18", num_classes=K, layers=[1, 1, 1, 1], channels=[4, 4, 8, 8])
    student.layer1.eval()
    modes, before = [m.training for m in student.modules()], copy.deepcopy(student.state_dict())
    task_of(student, network(LARGE), features="mse")
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_validation_looks_at_the_network_alone():
    student = network(SMALL).eval()
    task = task_of(student, network(LARGE), **FEATURES["mgd"])
    images, labels = batch()
    loss, logits = task.measure(student, images, labels)
    assert loss.item() == pytest.approx(task_loss(logits, labels, 0.0), rel=1e-5)


@pytest.mark.parametrize(
    ("amp", "teacher_amp", "half"), [("none", "bf16", True), ("bf16", "none", False), ("bf16", "same", True)]
)
def test_the_teacher_has_its_own_precision(tmp_path, amp, teacher_amp, half):
    teacher = network(LARGE)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    settings = dict(teacher_args=LARGE, teacher_checkpoint=str(tmp_path / "teacher.pt"), teacher_amp=teacher_amp)
    compute = replace(CPU, amp=amp)
    made = create_teacher(recipe_with(amp=amp, **settings), K, DIGITS, compute)
    images, _ = batch()
    with compute.autocast():
        logits, _ = made.look(images, with_map=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = teacher.eval()(images)
    assert logits.dtype == (torch.bfloat16 if half else torch.float32)
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)


def test_a_teacher_of_timm_gets_images_as_it_knows_them():
    teacher = network(LARGE)
    teacher.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.125)}
    pixels = torch.rand(2, 3, SIZE, SIZE)
    ours = (pixels - torch.tensor(DIGITS[0]).view(3, 1, 1)) / torch.tensor(DIGITS[1]).view(3, 1, 1)
    theirs = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.25, 0.5, 0.125]).view(3, 1, 1)
    with torch.no_grad():
        expected, plain = teacher.eval()(theirs), teacher(ours)
    renormalised, _ = Teacher(teacher, CPU, DIGITS).look(ours, with_map=False)
    torch.testing.assert_close(renormalised, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(renormalised, plain, atol=1e-2)
    alike, _ = Teacher(teacher, CPU, ((0.5, 0.4, 0.3), (0.25, 0.5, 0.125))).look(ours, with_map=False)
    torch.testing.assert_close(alike, plain, atol=0, rtol=0)


def test_maps_of_other_sizes_are_compared_too():
    teacher = network({**LARGE, "patch_size": 4})
    loss, _ = task_of(network(SMALL), teacher, **FEATURES["smooth_l1"])(*batch())
    loss.backward()
    assert loss.isfinite()


def error_of(recipe, classes=K):
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)) as caught:
        FromTeacher(network(SMALL), create_teacher(recipe, classes, DIGITS, CPU), recipe, SIZE)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_teacher_of_other_classes(tmp_path):
    torch.save(network(LARGE, classes=7).state_dict(), tmp_path / "seven.pt")
    file = str(tmp_path / "seven.pt")
    line = error_of(recipe_with(teacher_args=LARGE, teacher_checkpoint=file))
    assert line.startswith(f"{file} does not fit ConvNeXt") and "head.fc" in line
    args = {**LARGE, "num_classes": 7}
    line = error_of(recipe_with(teacher_args=args, teacher_checkpoint=file))
    assert line == "distill.teacher_args.num_classes is 7, but the data digits has 5 classes"
    by_maps = recipe_with(teacher_args=args, teacher_checkpoint=file, logits="none", features="mse")
    teacher = create_teacher(by_maps, K, DIGITS, CPU)
    assert FromTeacher(network(SMALL), teacher, by_maps, SIZE)(*batch())[0].isfinite()


def test_a_new_head_knows_nothing():
    """Timm would give the teacher one, for its weights are for 1000 classes; nothing is downloaded for that."""
    line = error_of(replace(recipe_with(), distill=Distillation(teacher="resnet18")))
    assert re.search(
        "weights of the teacher resnet18 are for 1000 classes, the data has 5; .*--teacher-checkpoint", line
    )


def test_missing_weights(tmp_path, monkeypatch):
    line = error_of(recipe_with(teacher_args=LARGE, teacher_checkpoint=str(tmp_path / "nowhere.pt")))
    assert line == f"no checkpoint {tmp_path / 'nowhere.pt'}"
    line = error_of(replace(recipe_with(), distill=Distillation(teacher="shiftresnet20")), classes=1000)
    assert re.match(
        r"the teacher shiftresnet20 has no weights here \(.*\); name a file with --teacher-checkpoint$", line
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    line = error_of(replace(recipe_with(), distill=Distillation(teacher="test_convnext")), classes=1000)
    assert re.match(
        r"the teacher test_convnext has no weights here \(.*\); name a file with --teacher-checkpoint$", line
    )


def test_networks_without_maps(tmp_path):
    old = create_model("shiftresnet20", num_classes=K, expansion=1)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    distill = Distillation("shiftresnet20", {"expansion": 1}, str(tmp_path / "old.pt"), features="mse")
    line = error_of(replace(recipe_with(), distill=distill))
    assert line == "distill.features needs networks with timm's forward_intermediates, which CifarNet has not"


def test_a_teacher_for_other_images():
    class Large(nn.Module):
        def forward(self, images):
            raise AssertionError(f"Input height ({images.shape[2]}) doesn't match model (224).")

    with pytest.raises(
        ValueError, match=r"^the teacher Large cannot take an image of shape \[1, 3, 32, 32\]: Input height"
    ):
        task_of(network(SMALL), Large())


def test_half_precision_that_the_device_has_not(tmp_path):
    line = error_of(recipe_with(teacher_args=LARGE, teacher_checkpoint="x", teacher_amp="fp16"))
    assert line == "distill.teacher_amp 'fp16' needs a CUDA device, got cpu; use 'bf16' or 'none'"


@pytest.fixture(scope="module")
def taught(tmp_path_factory, pictures):
    """Two epochs of three updates with all that a teacher can bring, and mixed images."""
    file = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.save(network(LARGE, classes=2).state_dict(), file)
    distill = Distillation("convnext_atto", LARGE, str(file), logits="nkd", features="mgd", feature_weight=100.0)
    return Recipe(
        model="convnext_atto",
        model_args=SMALL,
        data=Data("folder", folder=str(pictures), image_size=SIZE, workers=0),
        epochs=2,
        batch_size=8,
        micro_batch_size=4,
        optim=Optim("adamw", lr=1e-2),
        mix=Mix(mixup=0.8),
        label_smoothing=0.1,
        distill=distill,
        tensorboard=False,
    )


class Broken(Exception):
    pass


def break_off(event):
    if isinstance(event, EpochDone):
        raise Broken


def test_what_is_trained_beside_the_network_is_saved_and_resumed(taught, tmp_path):
    whole = train(taught, tmp_path / "whole", device="cpu")
    with pytest.raises(Broken):
        train(taught, tmp_path / "run", device="cpu", progress=break_off)
    first = ck.load(tmp_path / "run" / "last.pt")
    assert first.epoch == 1
    resumed = train(taught, tmp_path / "run", resume="auto", device="cpu")
    one, two = (ck.load(run.folder / "last.pt") for run in (whole, resumed))
    assert {*one.task} == {
        f"features.{name}"
        for name in (
            *("align.weight", "align.bias"),
            *(f"generation.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")),
        )
    }
    for state in ("task", "model"):
        assert all(torch.equal(value, getattr(two, state)[name]) for name, value in getattr(one, state).items())
    assert not torch.equal(first.task["features.align.weight"], one.task["features.align.weight"])
    assert not any("align" in name or "generation" in name for name in one.model)


def test_half_precision_trains(taught, tmp_path):
    result = train(replace(taught, amp="bf16", epochs=1), tmp_path / "run", device="cpu")
    assert all(math.isfinite(row["train_loss"]) for row in result.history)


@pytest.mark.slow
def test_pieces_on_two_processes_give_the_numbers_of_one(taught, tmp_path):
    """Feature maps come by another method than a call of the network, which gathers its pieces, too."""
    file = tmp_path / "teacher.pt"
    torch.save(network(LARGE, classes=2).double().state_dict(), file)
    distill = replace(taught.distill, teacher_checkpoint=str(file), features="smooth_l1", feature_weight=1.0)
    args = {**SMALL, "dims": [4, 4, 8, 128]}  # the last blocks are large enough to be pieces of their own
    recipe = replace(taught, model_args=args, epochs=1, distill=distill, mix=Mix())
    one = processes.run(recipe, tmp_path / "one", 1)
    two = processes.run(replace(recipe, parallel="fsdp"), tmp_path / "two", 2)
    assert processes.distance(one, two) < 1e-9
