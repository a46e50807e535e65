"""Genuine kinds of checkpoints, built byte for byte, and everything that only looks like one."""

import gzip
import io
import json
import os
import sys
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shiftconv.models.convert import read_checkpoint

NETWORKS = {
    "ShiftConv": ("shiftresnet20", dict(expansion=2.5)),
    "BasicBlock": ("resnet20", dict(reduction=7.2, reduction_mode="block", project_shortcuts=True)),
    "DepthWiseWithSkipBlock": ("depthwiseresnet20", dict(reduction=1.12, num_classes=100)),
    "DepthWiseBlock": ("depthwiseresnet20", dict(skip=False)),
    "ShuffleBlock": ("shuffleresnet20", dict()),
    "MobileNetLikeBlock": ("mobileresnet20", dict(reduction=1.12)),
}


def assert_same(state_dict, weights):
    assert list(state_dict) == list(weights)
    for key, tensor in state_dict.items():
        assert tensor.dtype == weights[key].dtype
        torch.testing.assert_close(tensor, weights[key], rtol=0, atol=0)


@pytest.mark.parametrize("block", NETWORKS)
@pytest.mark.parametrize("release", [0.3, 1.0])
@pytest.mark.parametrize("parallel", [False, True])
def test_pickled_modules(block, release, parallel, old_torch, make_weights, tmp_path):
    name, arguments = NETWORKS[block]
    weights = make_weights(name, **arguments)
    writer = old_torch(release=release, cuda=parallel)
    if release < 0.4:
        writer.package, writer.shift = "models.resnet", "shiftnet_cuda_v2.nn"
    network = writer.network(weights, block)
    network = writer.parallel(network) if parallel else network
    (tmp_path / "x.t7").write_bytes(writer.file(dict(net=network, acc=91.5, epoch=147)))
    checkpoint = read_checkpoint(tmp_path / "x.t7")
    expected = {k: v for k, v in weights.items() if release >= 0.4 or not k.endswith("num_batches_tracked")}
    assert_same(checkpoint.state_dict, expected)
    cls = "torch.nn.parallel.data_parallel.DataParallel" if parallel else "models.resnet.ResNet"
    assert checkpoint.meta == {"kind": "t7-module", "class": cls, "epoch": 147, "acc": 91.5}
    assert not {"models", "models.resnet", "shiftnet_cuda_v2"} & set(sys.modules)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16, torch.int32, torch.uint8])
def test_dtypes_views_and_shared_storages(dtype, old_torch, tmp_path):
    base = torch.arange(24).to(dtype)
    views = dict(a=base, b=base[2:20:3], c=base.view(4, 6).T, d=base[5], e=base[:0], f=base.view(2, 3, 4)[1, ::2])
    writer = old_torch()
    (tmp_path / "x.t7").write_bytes(writer.file({k: writer.tensor(v) for k, v in views.items()}))
    assert len(writer.storages) == 1
    torch.save(views, tmp_path / "x.zip")
    torch.save(views, tmp_path / "y.t7", _use_new_zipfile_serialization=False)
    for name, kind in (("x.t7", "t7"), ("x.zip", "zip"), ("y.t7", "t7")):
        checkpoint = read_checkpoint(tmp_path / name)
        assert_same(checkpoint.state_dict, views)
        assert checkpoint.meta["kind"] == f"{kind}-state-dict"
        assert checkpoint.state_dict["c"].data_ptr() == checkpoint.state_dict["a"].data_ptr()


def test_a_storage_that_is_part_of_another(old_torch, tmp_path):
    writer = old_torch()
    part = writer.tensor(torch.arange(10.0), view=("95001", 4, 6))
    part.args = (part.args[0], 1, (2, 2), (2, 1), *part.args[4:])
    (tmp_path / "x.t7").write_bytes(writer.file(dict(a=part)))
    assert read_checkpoint(tmp_path / "x.t7").state_dict["a"].tolist() == [[5, 6], [7, 8]]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.none = None
        self.register_buffer("kept", torch.arange(4))
        self.register_buffer("hidden", torch.arange(4), persistent=False)
        self.register_parameter("absent", None)
        self.shared = self.head


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_modules_of_this_torch(zipped, protocol, tmp_path):
    net = Net()
    torch.save(net, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert_same(checkpoint.state_dict, net.state_dict())
    assert checkpoint.meta["class"].endswith("Net")


@pytest.mark.parametrize("path", [["state_dict"], ["model"], ["a", "ema"], ["model", "net"], ["module"]])
def test_wrappers_and_prefixes(path, tmp_path):
    content = {f"module._orig_mod.{key}": value for key, value in Net().state_dict().items()}
    for name in reversed(path if path[0] != "a" else path[1:]):
        content = {"optimizer": {"state": {}}, name: content, "acc": torch.tensor(90.5), "epoch": 3}
    torch.save(content, tmp_path / "x.pth")
    checkpoint = read_checkpoint(tmp_path / "x.pth")
    assert list(checkpoint.state_dict) == list(Net().state_dict())
    assert (checkpoint.meta["acc"], checkpoint.meta["epoch"]) == (90.5, 3)


def test_own_training_checkpoint(tmp_path):
    content = dict(format="shiftconv.checkpoint", version=1, model_name="shiftresnet20", model_args=dict(expansion=2))
    content |= dict(model=Net().state_dict(), metrics=dict(accuracy=0.5), epoch=7, optimizer=dict(state={}))
    torch.save(content, tmp_path / "last.pt")
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    meta = dict(kind="shiftconv", model="shiftresnet20", model_args=dict(expansion=2), epoch=7)
    assert checkpoint.meta == {**meta, "metrics": dict(accuracy=0.5)}
    assert_same(checkpoint.state_dict, content["model"])
    torch.save(content | dict(version=2), tmp_path / "later.pt")
    with pytest.raises(ValueError, match="later shiftconv"):
        read_checkpoint(tmp_path / "later.pt")


def test_safetensors(tmp_path):
    weights = {f"module.{key}": value.clone() for key, value in Net().state_dict().items()}
    said = dict(model="shiftresnet20", model_args=json.dumps(dict(expansion=3.0)), epoch="5", acc="90.25")
    save_file(weights, tmp_path / "x.safetensors", metadata=said)
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    assert_same(checkpoint.state_dict, {key.removeprefix("module."): weights[key] for key in sorted(weights)})
    meta = dict(kind="safetensors", model="shiftresnet20", model_args=dict(expansion=3.0), epoch=5, acc=90.25)
    assert checkpoint.meta == meta
    save_file(weights, tmp_path / "y.safetensors", metadata=dict(epoch="last", acc="[" * 100_000, model="theirs"))
    assert read_checkpoint(tmp_path / "y.safetensors").meta == dict(kind="safetensors", epoch="last", acc="[" * 1000)


def _zip(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def _tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    return buffer.getvalue()


NOT_CHECKPOINTS = {
    "empty file": b"",
    "a web page": b"\n<!DOCTYPE html><html>404</html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "a tar archive": _tar(),
    "gzip archive": gzip.compress(b"x"),
    "text that begins 'Not Found'": b"Not Found",
    "data that begins ff d8 ff": b"\xff\xd8\xff\xe0" * 100,
    "not one that torch.save wrote": b"\x80\x02K\x01.",
    "give a file inside \\('resnet20.t7'\\)": _zip(**{"resnet20.t7": b""}),
    "a TorchScript archive": _zip(x__constants=b"", **{"x/constants.pkl": b"", "x/code/y.py": b""}),
    "damaged zip archive": b"PK\x03\x04",
    "damaged safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{]",
    "holds no network, only 'epoch'": _zip(**{"x/data.pkl": b"\x80\x02}U\x05epochK\x01s."}),
    "it holds no network$": _zip(**{"x/data.pkl": b"\x80\x02N."}),
    "no dense tensor but 'models.Sparse'": _zip(
        **{"x/data.pkl": b"\x80\x02ca\nb\n)\x81}(U\x08_modules}U\x0b_parameters}U\x01wcmodels\nSparse\n)Rsub."}
    ),
}


@pytest.mark.parametrize("message", NOT_CHECKPOINTS)
def test_other_files_are_called_by_their_names(message, tmp_path):
    (tmp_path / "x.t7").write_bytes(NOT_CHECKPOINTS[message])
    with pytest.raises(ValueError, match=rf"x\.t7: .*{message}"):
        read_checkpoint(tmp_path / "x.t7")


def test_paths(tmp_path):
    (tmp_path / "resnet20.t7").touch()
    with pytest.raises(FileNotFoundError, match=r"did you mean 'resnet20\.t7'"):
        read_checkpoint(tmp_path / "resnet2O.t7")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_checkpoint(tmp_path / "nowhere" / "x.t7")
    with pytest.raises(ValueError, match="it is a folder"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a file"):
        read_checkpoint(tmp_path / "pipe")
