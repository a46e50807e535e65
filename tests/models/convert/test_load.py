"""Weights end where they belong, or nowhere: loading, converting, and the errors of both."""

import errno
import json
import os
import threading
import time

import pytest
import torch
from safetensors import safe_open

from shiftconv.models import create_model
from shiftconv.models.convert import convert, load_checkpoint, read_checkpoint

ARGS = dict(expansion=2.5, num_classes=7)


@pytest.fixture(scope="module")
def t7(tmp_path_factory, old_torch, make_weights):
    """A shiftresnet20 as a GPU with torch 0.3 saved it: no counters, in DataParallel."""
    writer = old_torch(release=0.3, cuda=True)
    network = writer.parallel(writer.network(make_weights("shiftresnet20", **ARGS), "ShiftConv"))
    path = tmp_path_factory.mktemp("released") / "shiftresnet20_2.5.t7"
    path.write_bytes(writer.file(dict(net=network, acc=91.25, epoch=147)))
    return path


@pytest.fixture(scope="module")
def expected(make_weights):
    network = create_model("shiftresnet20", **ARGS)
    network.load_state_dict(make_weights("shiftresnet20", **ARGS))
    return logits(network)


def logits(network):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(x)


def test_into_a_given_network_and_into_a_new_one(t7, expected):
    given = create_model("shiftresnet20", **ARGS)
    assert load_checkpoint(given, t7) is given
    state = torch.random.get_rng_state()
    for network in (given, load_checkpoint(None, t7)):
        torch.testing.assert_close(logits(network), expected, rtol=0, atol=0)
        assert network.state_dict()["bn1.num_batches_tracked"] == 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_converted_files_give_identical_logits(suffix, t7, expected, tmp_path):
    target = tmp_path / f"x{suffix}"
    report = convert(t7, target)
    parameters = sum(p.numel() for p in create_model("shiftresnet20", **ARGS).parameters())
    assert (report.kind, report.model, report.parameters) == ("t7-module", "shiftresnet20", parameters)
    assert report.model_args == ARGS
    assert report.meta == dict(acc=91.25, epoch=147)
    what = f"shiftresnet20(expansion=2.5, num_classes=7), {parameters} parameters, epoch 147, acc 91.25"
    assert str(report) == f"{t7} (t7-module) -> {target}: {what}"
    again = tmp_path / "again.safetensors"
    convert(target, again)
    for path in (target, again):
        torch.testing.assert_close(logits(load_checkpoint(None, path)), expected, rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([target.name, again.name])
    if suffix == ".pth":
        weights = torch.load(target, weights_only=True)
        torch.testing.assert_close(weights, load_checkpoint(None, t7).state_dict(), rtol=0, atol=0)
    else:
        with safe_open(again, framework="pt") as file:
            said = file.metadata()
        assert said["model"] == "shiftresnet20"
        assert json.loads(said["model_args"]) == ARGS
        assert (said["source"], said["acc"], said["epoch"]) == ("safetensors", "91.25", "147")


def test_own_training_checkpoint(make_weights, tmp_path):
    content = dict(format="shiftconv.checkpoint", version=1, model_name="shiftresnet20", model_args=ARGS, epoch=3)
    content |= dict(model=make_weights("shiftresnet20", **ARGS), metrics=dict(accuracy=0.5))
    torch.save(content, tmp_path / "best.pt")
    network = load_checkpoint(None, tmp_path / "best.pt")
    torch.testing.assert_close(network.state_dict(), content["model"], rtol=0, atol=0)
    report = convert(tmp_path / "best.pt", tmp_path / "best.safetensors")
    assert report.meta == dict(epoch=3, metrics=dict(accuracy=0.5))
    assert read_checkpoint(tmp_path / "best.safetensors").meta["metrics"] == dict(accuracy=0.5)


FORGED = {
    "must not set pretrained": dict(model_args=dict(ARGS, pretrained=True)),
    "must not set checkpoint_path": dict(model_args=dict(ARGS, checkpoint_path="/etc/passwd")),
    "must not set pretrained_cfg": dict(model_args=dict(ARGS, pretrained_cfg=dict(file="/etc/passwd"))),
    "is not one that timm knows": dict(model_name="hf-hub:somebody/something"),
    "unknown model 'shiftresnett20'; did you mean 'shiftresnet20'": dict(model_name="shiftresnett20"),
    "has no argument 'expanse'": dict(model_args=dict(expanse=2.5)),
    "nearest to shiftresnet20\\(expansion=3\\)": dict(model_args=dict(expansion=3)),
    "100000000000000, 64\\]": dict(model_args=dict(ARGS, num_classes=10**14)),
    "cannot tell the network": dict(model_args=dict(ARGS, expansion=1e30)),
    "arguments of its network are not a dict": dict(model_args=[1]),
}


@pytest.mark.parametrize("message", FORGED)
def test_what_a_file_says_of_its_network_is_not_trusted(message, make_weights, tmp_path):
    content = dict(format="shiftconv.checkpoint", version=1, model_name="shiftresnet20", model_args=ARGS)
    torch.save(content | dict(model=make_weights("shiftresnet20", **ARGS)) | FORGED[message], tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(None, tmp_path / "x.pt")


def test_another_network_is_named_and_left_as_it_was(t7, tmp_path):
    network = create_model("resnet20")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit CifarNet.*; it holds shiftresnet20\(expansion=2.5, num.*=7\)"):
        load_checkpoint(network, t7)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"of another shape: linear.weight \[7, 64\] instead of \[10, 64\], lin"):
        load_checkpoint(create_model("shiftresnet20", expansion=2.5), t7)


def test_errors_name_at_most_five_keys(make_weights, tmp_path):
    weights = make_weights("resnet20")
    for key in list(weights)[:8]:
        weights[f"more.{key}"] = weights.pop(key)
    weights["linear.bias"] = weights["linear.bias"].to(torch.int64)
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        load_checkpoint(create_model("resnet20"), tmp_path / "x.pth")
    text = str(error.value)
    assert "missing: conv1.weight, bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and 2 more" in text
    assert "left over: more.conv1.weight" in text
    assert "and 3 more" in text
    assert "linear.bias [10] of torch.int64 instead of [10]" in text
    with pytest.raises(ValueError, match=r"cannot tell the network of .*x\.pth"):
        load_checkpoint(None, tmp_path / "x.pth")


def test_wrong_types_and_paths(t7, tmp_path):
    with pytest.raises(TypeError, match="must be a network or None, got str"):
        load_checkpoint("resnet20", t7)
    with pytest.raises(ValueError, match=r"must end in .safetensors or .pth, got .*x.onnx"):
        convert(t7, tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere for x\.pth"):
        convert(t7, tmp_path / "nowhere" / "x.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        convert(tmp_path / "x.t7", tmp_path / "x.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        convert(t7, tmp_path / "folder.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pth"]


@pytest.mark.parametrize("link", [os.link, os.symlink, None])
def test_a_source_is_never_overwritten(link, t7, tmp_path):
    source = target = tmp_path / "x.pth"
    convert(t7, source)
    if link is not None:
        link(source, target := tmp_path / "y.pth")
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is the source itself"):
        convert(source, target)
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_nothing_half_written_is_left(name, t7, tmp_path, monkeypatch):
    target = tmp_path / name
    target.write_bytes(b"earlier")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        convert(t7, target)
    assert target.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_readers_see_the_old_file_or_the_new_one(t7, tmp_path):
    target, seen, stop = tmp_path / "x.safetensors", [], threading.Event()
    convert(t7, target)

    def read():
        while not stop.is_set():
            seen.append(len(read_checkpoint(target).state_dict))
            time.sleep(0)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5):
        convert(t7, target)
    stop.set()
    reader.join()
    assert set(seen) == {len(read_checkpoint(target).state_dict)}
