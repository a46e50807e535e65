"""Files of ``torch.save`` that are damaged, or that claim what they do not hold."""

import io
import random
import struct
import zipfile

import pytest
import torch

from shiftconv.models.convert import read_checkpoint
from shiftconv.models.convert.torch_file import LegacyFile


def small_network(old_torch):
    """A file of about 4 KB with all that the big ones have."""
    writer = old_torch(release=0.3)
    weights = {"conv1.weight": torch.randn(2, 3), "bn1.weight": torch.ones(2), "bn1.running_mean": torch.zeros(2)}
    weights |= {"layer1.0.conv1.weight": torch.randn(2, 2, 1, 1)}
    return writer.file(dict(net=writer.network(weights, "ShiftConv"), acc=90, epoch=3))


def saved(**options):
    buffer = io.BytesIO()
    torch.save({"net": {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3)}, "epoch": 4}, buffer, **options)
    return buffer.getvalue()


@pytest.fixture(params=["python 2", "legacy", "zip"])
def genuine(request, old_torch):
    options = dict(_use_new_zipfile_serialization=request.param == "zip")
    return small_network(old_torch) if request.param == "python 2" else saved(**options)


def test_truncated_at_every_byte(genuine, tmp_path):
    path = tmp_path / "x.t7"
    path.write_bytes(genuine)
    read_checkpoint(path)
    for end in range(len(genuine)):
        path.write_bytes(genuine[:end])
        with pytest.raises(ValueError, match=r"cannot read .*x\.t7: "):
            read_checkpoint(path)


def test_random_damage(genuine, tmp_path):
    generator, path = random.Random(0), tmp_path / "x.t7"
    for _ in range(600):
        data = bytearray(genuine)
        for _ in range(generator.choice([1, 1, 2, 8])):
            data[generator.randrange(len(data))] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        path.write_bytes(data)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert "x.t7" in str(error)


def legacy(old_torch, tensor=None, **changes):
    """A state dict of one tensor in which something of its description is changed."""
    writer = old_torch()
    call = writer.tensor(torch.arange(12.0).view(3, 4) if tensor is None else tensor)
    names = ("storage", "offset", "size", "stride")
    call.args = tuple(changes.pop(n, a) for n, a in zip(names, call.args[:4], strict=True)) + call.args[4:]
    kind, cls, key, location, numel, view = call.args[0].pid
    pid = (kind, changes.pop("cls", cls), key, location, changes.pop("numel", numel), changes.pop("view", view))
    call.args = (type(call.args[0])(pid), *call.args[1:])
    assert not changes
    return writer.file(dict(net=dict(a=call)))


BIG = 10**15
CLAIMS = {
    "count": (dict(numel=BIG), "12 elements|count says 12"),
    "negative numel": (dict(numel=-1), "without class, key or number"),
    "offset": (dict(offset=1), r"shape \[3, 4\] in a storage of 12 elements"),
    "huge offset": (dict(offset=2**70), "not a number from 0 to"),
    "negative offset": (dict(offset=-1), "not a number from 0 to"),
    "size": (dict(size=(4, 4)), r"shape \[4, 4\] in a storage of 12"),
    "negative size": (dict(size=(-3, -4)), "not a number from 0 to"),
    "boolean size": (dict(size=(True, 4)), "not a number from 0 to"),
    "stride": (dict(stride=(5, 1)), "in a storage of 12"),
    "negative stride": (dict(stride=(-4, 1)), "not a number from 0 to"),
    "expanded": (dict(size=(2**36, 4), stride=(0, 1)), "in a storage of 12"),
    "other rank": (dict(stride=(1,)), "2 sizes and 1 strides"),
    "many axes": (dict(size=(1,) * 5000, stride=(1,) * 5000), "up to 16 numbers"),
    "list for size": (dict(size=[3, 4]), "no tuple of up to 16"),
    "no storage": (dict(numel=12, view=5), "part of storage"),
    "outside view": (dict(view=("1", 8, 5)), "part of storage"),
    "negative view": (dict(view=("1", -1, 5)), "part of storage"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_that_the_storage_does_not_hold(name, old_torch, tmp_path):
    changes, message = CLAIMS[name]
    (tmp_path / "x.t7").write_bytes(legacy(old_torch, **changes))
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "x.t7")


def test_empty_tensors_of_absurd_shapes(old_torch, tmp_path):
    (tmp_path / "x.t7").write_bytes(legacy(old_torch, size=(0, 2**39, 2**39), stride=(1, 1, 1)))
    assert read_checkpoint(tmp_path / "x.t7").state_dict["a"].numel() == 0


@pytest.mark.parametrize("count", [-1, 13, 2**62, -(2**63)])
def test_counts_that_are_not_those_of_the_pickle(count, old_torch, tmp_path):
    data = bytearray(legacy(old_torch))
    data[-56:-48] = struct.pack("<q", count)
    (tmp_path / "x.t7").write_bytes(data)
    with pytest.raises(ValueError, match=f"its count says {count}"):
        read_checkpoint(tmp_path / "x.t7")


def test_huge_storage_that_agrees_with_itself(old_torch, tmp_path):
    data = bytearray(legacy(old_torch, numel=BIG))
    data[-56:-48] = struct.pack("<q", BIG)
    (tmp_path / "x.t7").write_bytes(data)
    with pytest.raises(ValueError, match="48 bytes are left in the file"):
        read_checkpoint(tmp_path / "x.t7")


def test_storages_listed_twice_or_never(old_torch, tmp_path):
    writer = old_torch()
    content = dict(net=dict(a=writer.tensor(torch.ones(2)), b=writer.tensor(torch.ones(3))))
    whole = writer.storages
    for keys, message in (([0, 0], "listed twice"), ([0], "is not in the file")):
        writer.storages = Keys([list(whole)[i] for i in keys], whole)
        (tmp_path / "x.t7").write_bytes(writer.file(content))
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "x.t7")
    writer.storages = whole | {"unknown": torch.ones(1)}
    (tmp_path / "x.t7").write_bytes(writer.file(content))
    with pytest.raises(ValueError, match="never described"):
        read_checkpoint(tmp_path / "x.t7")


@pytest.mark.parametrize("changes", [dict(dtype="DoubleStorage"), dict(numel=1)])
def test_storages_described_in_two_ways(changes, old_torch, tmp_path):
    writer = old_torch()
    first, second = (writer.tensor(torch.ones(2)[:]) for _ in range(2))
    kind, cls, _, location, numel, view = second.args[0].pid
    cls = old_torch.name("torch", changes.get("dtype", cls.name))
    pid = (kind, cls, first.args[0].pid[2], location, changes.get("numel", numel), view)
    second.args = (type(second.args[0])(pid), 0, (1,), (1,), *second.args[4:])
    (tmp_path / "x.t7").write_bytes(writer.file(dict(a=first, b=second)))
    with pytest.raises(ValueError, match="described in two ways"):
        read_checkpoint(tmp_path / "x.t7")


class Keys:
    """Storages under chosen keys, some of them more than once."""

    def __init__(self, keys, storages):
        self.keys, self.storages = keys, storages

    def __iter__(self):
        return iter(self.keys)

    def values(self):
        return [self.storages[key] for key in self.keys]


@pytest.mark.parametrize("name", ["torch.QInt8Storage", "torch.Float", "os.system", "os.FloatStorage"])
def test_storage_classes_without_numbers(name, old_torch, tmp_path):
    (tmp_path / "x.t7").write_bytes(legacy(old_torch, cls=old_torch.name(*name.split("."))))
    with pytest.raises(ValueError, match=f"storage class '{name}'"):
        read_checkpoint(tmp_path / "x.t7")


def test_many_tensors_of_few_bytes(old_torch, tmp_path):
    writer = old_torch()
    tensor = writer.tensor(torch.ones(100_000))
    (tmp_path / "x.t7").write_bytes(writer.file({f"layer{i}": tensor for i in range(1000)}))
    with pytest.raises(ValueError, match="more than 4 times the bytes of the file"):
        read_checkpoint(tmp_path / "x.t7")


def module(old_torch, depth, **tensors):
    writer = old_torch()
    call = writer.module(small := writer.name("a", "B"), tensors, {})
    for _ in range(depth):
        call = writer.module(small, {}, {"x": call, "y": call})
    return writer.file(call)


def test_modules_that_hold_each_other_in_two_ways(old_torch, tmp_path):
    (tmp_path / "x.t7").write_bytes(module(old_torch, 3, weight=torch.ones(2)))
    assert len(read_checkpoint(tmp_path / "x.t7").state_dict) == 8
    for depth, message in ((40, "more than 100000 weights and modules"), (60, "nested deeper")):
        (tmp_path / "x.t7").write_bytes(module(old_torch, depth, weight=torch.ones(2)))
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "x.t7")


def test_modules_of_long_names(old_torch, tmp_path):
    writer = old_torch()
    call = writer.module(writer.name("a", "B"), dict(weight=torch.ones(2)), {})
    call = writer.module(writer.name("a", "B"), {}, {"x" * 600: call})
    (tmp_path / "x.t7").write_bytes(writer.file(writer.module(writer.name("a", "B"), {}, {"y" * 600: call})))
    with pytest.raises(ValueError, match="nested deeper"):
        read_checkpoint(tmp_path / "x.t7")


def test_dicts_and_lists_that_hold_themselves(tmp_path):
    (tmp_path / "x.zip").write_bytes(rezip(b"\x80\x02}q\x00(U\x03neth\x00U\x05modelh\x00u."))
    with pytest.raises(ValueError, match="holds no network, only 'net', 'model'"):
        read_checkpoint(tmp_path / "x.zip")
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        pickled = archive.read("archive/data.pkl")
    metrics = b"X\x07\x00\x00\x00metrics]q\xf0" + b"h\xf0a" * 10
    (tmp_path / "x.zip").write_bytes(rezip(pickled.removesuffix(b"u.") + metrics + b"u."))
    checkpoint = read_checkpoint(tmp_path / "x.zip")
    assert list(checkpoint.state_dict) == ["a", "b"]
    assert isinstance(checkpoint.meta["metrics"], list)


def test_a_module_that_holds_itself(tmp_path):
    state = b"}q\x01(U\x08_modules}U\x01xh\x00su"
    (tmp_path / "x.zip").write_bytes(rezip(b"\x80\x02ca\nb\n)\x81q\x00" + state + b"b."))
    with pytest.raises(ValueError, match="nested deeper"):
        read_checkpoint(tmp_path / "x.zip")


def test_identifiers_are_not_copied_for_the_asking():
    """The text of a class is as long as one likes, and each use of it another object."""
    pid = b"(U\x06modulecos\nsystem\n" + b"N" * 200_000 + b"tq\x01" + b"Q0h\x01" * 300_000 + b"Q."
    with pytest.raises(ValueError, match="neither a storage nor a class"):
        LegacyFile(io.BytesIO(pid := b"\x80\x02" + pid), len(pid))


def test_lists_are_not_copied_for_the_asking():
    """Forty thousand sets of one list of 200 000 would be 64 GB."""
    data = b"\x80\x02c__builtin__\nset\nq\x00](" + b"N" * 200_000 + b"e\x85q\x01(" + b"h\x00h\x01R" * 40_000 + b"t."
    facts = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    pickles = facts + data + b"\x80\x02]."
    assert len(LegacyFile(io.BytesIO(pickles), len(pickles)).content) == 40_000
    pairs = b"\x80\x02ccollections\nOrderedDict\nq\x00](" + b"N" * 200_000 + b"e\x85q\x01(" + b"h\x00h\x01R" * 40_000
    pickles = facts + pairs.replace(b"N" * 200_000, b"U\x01aN\x86q\x02" + b"h\x02" * 200_000) + b"t.\x80\x02]."
    with pytest.raises(ValueError, match="more than 2000000 opcodes"):
        LegacyFile(io.BytesIO(pickles), len(pickles))


def rezip(pickled=None, compression=zipfile.ZIP_STORED, **more):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            data = pickled if name.endswith("data.pkl") and pickled else old.read(name)
            new.writestr(name, more.pop(name.rpartition("/")[2], data))
    return buffer.getvalue()


def test_zip_entries(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(rezip())
    a = read_checkpoint(path).state_dict["a"]
    swapped = a.view(torch.uint8).view(-1, 4).flip(1).contiguous().numpy().tobytes()
    path.write_bytes(rezip(byteorder=b"big", **{"0": swapped, "1": struct.pack(">3q", 0, 1, 2)}))
    torch.testing.assert_close(read_checkpoint(path).state_dict["a"], a)
    for data, message in (
        (rezip(compression=zipfile.ZIP_DEFLATED), "compressed entries"),
        (rezip(**{"0": b"\0" * 23}), "should have 24 bytes, and is 23 bytes"),
        (rezip(**{"0": b"\0" * 2_000_000}), "should have 24 bytes, and is 2000000 bytes"),
        (rezip().replace(b"data/1", b"data/7"), "should have 24 bytes, and is missing"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


def test_zip_entries_that_overlap(tmp_path):
    """A thousand directory entries for the same megabyte: a gigabyte from a megabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", b"\0" * 1_000_000)
        (entry,) = archive.infolist()
        archive.filelist.extend([entry] * 1000)
    (tmp_path / "x.zip").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="larger than the file"):
        read_checkpoint(tmp_path / "x.zip")
