"""Hostile pickles: nothing runs, nothing hangs, nothing grows; one ValueError says what is wrong."""

import io
import pickle
import sys
import time
import tracemalloc

import pytest

from shiftconv.models.convert import inert_pickle
from shiftconv.models.convert.inert_pickle import InertUnpickler, Made, Name, PickleError


def load(data):
    return InertUnpickler(io.BytesIO(data), len(data)).load()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol(protocol):
    value = [None, True, False, 0, 255, 65535, -1, 2**31, -(2**70), 2**2000, 1.5, "text", "ü€😀", "long" * 20_000]
    value += [(), (1,), (1, 2, 3, 4), {"a": [1, {"b": ()}], 3: "x"}]
    value += [value[-1], b"bytes", b"long" * 20_000][: protocol - 1]
    assert load(pickle.dumps(value, protocol)) == value


def test_python_2_strings_and_integers():
    assert load(b"\x80\x02(U\x04caf\xe9T\x01\x00\x00\x00xI4294967296\nL-5L\nt.") == ("café", "x", 2**32, -5)


def test_classes_are_only_described():
    value = load(b"\x80\x02cos\nsystem\nU\x04exit\x85R}U\x01aK\x01sb.")
    assert isinstance(value, Made)
    assert (value.what, value.args, value.state) == (Name("os", "system"), ("exit",), {"a": 1})


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_imported_or_called(protocol, tmp_path):
    load(pickle.dumps({"x": [Evil(tmp_path / "run"), Evil]}, protocol))
    load(b"\x80\x02cantigravity\nfly\n)R" + b"ctests.nothing\nx\n)\x81}b" + b"\x86.")
    assert not (tmp_path / "run").exists()
    assert "antigravity" not in sys.modules


LIMIT = 250_000  # for these tests, which are then quick
DEEP = b"\x80\x02)" + b"\x85" * 200_000
HOSTILE = {
    "memo index of 4 GB": (b"\x80\x02Nr\xff\xff\xff\xff.", None),
    "bytes of 2**62": (b"\x80\x04\x8e" + b"\0" * 7 + b"\x40.", "4611686018427387904 bytes expected"),
    "bytearray of 2**62": (b"\x80\x05\x96" + b"\0" * 7 + b"\x40.", "4611686018427387904 bytes expected"),
    "string of 4 GB": (b"\x80\x02X\xff\xff\xff\xff.", "4294967295 bytes expected"),
    "negative string": (b"\x80\x02T\xff\xff\xff\xff.", "4294967295 bytes expected"),
    "integer of 64 MB": (b"\x80\x02\x8b\x00\x00\x00\x04" + b"\x01" * 2**26 + b".", "an integer of 67108864 bytes"),
    "decimal": (b"\x80\x02I" + b"9" * 5000 + b"\n.", "name without its end"),
    "nested tuples": (DEEP + b".", None),
    "nested tuple as key": (b"\x80\x02}" + DEEP[2:] + b"Ns.", None),
    "doubled tuple as key": (b"\x80\x02})" + b"2\x86" * 100 + b"Ns.", None),
    "nested marks": (b"\x80\x02" + b"(" * 200_000 + b".", "IndexError"),
    "many opcodes": (b"\x80\x02" + b"N0" * 130_000 + b"N.", "more than 250000 opcodes"),
    "endless protocols": (b"\x80\x02" * 260_000 + b"N.", "more than 250000 opcodes"),
    "long name": (b"\x80\x02c" + b"a" * 10_000 + b"\nb\n.", "name without its end"),
    "no stop": (b"\x80\x02N", "1 bytes expected, 0 left"),
    "nothing to stop at": (b"\x80\x02.", "IndexError"),
    "unknown memo": (b"\x80\x02h\x07.", "KeyError"),
    "protocol 0": (b"(lp0\n.", "is not one of protocols 2 to 5"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "extension": (b"\x80\x02\x82\x01.", "is not one of protocols"),
    "key without value": (b"\x80\x02}(Nu.", "key without a value"),
    "items in a number": (b"\x80\x02K\x01(NNu.", "items set in a int"),
    "bad text": (b"\x80\x02X\x01\x00\x00\x00\xff.", "UnicodeDecodeError"),
    "name of a number": (b"\x80\x04K\x01K\x02\x93.", "without a name"),
    "tuple of nothing": (b"\x80\x02N\x87.", "more items than there are"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_cheap(name, monkeypatch):
    monkeypatch.setattr(inert_pickle, "OPCODE_LIMIT", LIMIT)
    data, message = HOSTILE[name]
    tracemalloc.start()
    started = time.perf_counter()
    try:
        if message is None:
            load(data)
        else:
            with pytest.raises(PickleError, match=message):
                load(data)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(data) + 100_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 60


def test_keys_are_plain_and_small():
    """Multiples of 2**61 - 1 have one hash: a dict of them takes quadratic time."""
    keys = b"".join(pickle.dumps(key, 2)[2:-1] + b"N" for key in (1, 2**40, "a", 1.5, (1,), 2**61 - 1, 9 * (2**61 - 1)))
    assert list(load(b"\x80\x02}(" + keys + b"ca\nb\nNu.")) == [1, 2**40, "a", 1.5, 2**61 - 1]


def test_truncated_at_every_byte():
    data = pickle.dumps([{"a": (1, 2.5, "x"), "b": [Name("a", "b")]}, b"xyz", 2**40], 4)
    for end in range(len(data)):
        with pytest.raises(PickleError):
            load(data[:end])
