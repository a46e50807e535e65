"""A writer of the files that Python 2 and torch 0.3 to 1.0 wrote, byte for byte, from nothing but opcodes."""

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shiftconv.models as models

STORAGES = {torch.float32: "Float", torch.float16: "Half", torch.float64: "Double", torch.int64: "Long"}
STORAGES |= {torch.int32: "Int", torch.bfloat16: "BFloat16", torch.uint8: "Byte"}


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Persistent:
    pid: tuple


@dataclass(eq=False)
class Call:
    """``what(*args)``, then BUILD with ``state``; ``opcode`` is REDUCE or, for instances, NEWOBJ."""

    what: Any
    args: Any = ()
    state: Any = None
    opcode: bytes = b"R"


@dataclass
class Python2Pickler:
    """Protocol 2 as cPickle writes it: 8-bit strings, everything memoised."""

    out: bytearray = field(default_factory=bytearray)
    memo: dict[Any, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    def dumps(self, value: Any) -> bytes:
        self.out += b"\x80\x02"
        self.save(value)
        return bytes(self.out + b".")

    def put(self, value: Any) -> None:
        key = value if isinstance(value, str | Global) else id(value)
        self.alive.append(value)
        index = self.memo[key] = len(self.memo)
        self.out += b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)

    def save(self, value: Any) -> None:
        index = self.memo.get(value if isinstance(value, str | Global) else id(value))
        if index is not None and not isinstance(value, int | float | None):
            self.out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
            return
        getattr(self, f"save_{type(value).__name__}")(value)

    def save_NoneType(self, value: None) -> None:
        self.out += b"N"

    def save_bool(self, value: bool) -> None:
        self.out += b"\x88" if value else b"\x89"

    def save_int(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif 0 <= value < 65536:
            self.out += b"M" + struct.pack("<H", value)
        elif -(2**31) <= value < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        elif -(2**63) <= value < 2**63:
            self.out += b"I%d\n" % value
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data

    def save_float(self, value: float) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def save_str(self, value: str) -> None:
        data = value.encode("latin1")
        self.out += b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<I", len(data))
        self.out += data
        self.put(value)

    def save_tuple(self, value: tuple) -> None:
        if len(value) > 3:
            self.out += b"("
        for item in value:
            self.save(item)
        self.out += (b")", b"\x85", b"\x86", b"\x87", b"t")[min(len(value), 4)]
        if value:
            self.put(value)

    def save_list(self, value: list) -> None:
        self.out += b"]"
        self.put(value)
        self.out += b"("
        for item in value:
            self.save(item)
        self.out += b"e"

    def save_dict(self, value: dict) -> None:
        self.out += b"}"
        self.put(value)
        self.out += b"("
        for item in value.items():
            self.save(item[0])
            self.save(item[1])
        self.out += b"u"

    def save_Global(self, value: Global) -> None:
        self.out += f"c{value.module}\n{value.name}\n".encode()
        self.put(value)

    def save_Persistent(self, value: Persistent) -> None:
        self.save(value.pid)
        self.out += b"Q"

    def save_Call(self, value: Call) -> None:
        self.save(value.what)
        self.save(value.args)
        self.out += value.opcode
        self.put(value)
        if value.state is not None:
            self.save(value.state)
            self.out += b"b"


def ordered(**items: Any) -> Call:
    return Call(Global("collections", "OrderedDict"), ([[key, value] for key, value in items.items()],))


@dataclass
class OldTorch:
    """What a program of that time would have saved.

    ``release`` 0.3 has Parameters of its own and batch norms without counter; ``cuda`` stores come from a GPU.
    """

    release: float = 1.0
    cuda: bool = False
    package: str = "models.resnet"
    shift: str = "models.shiftnet_cuda_v2.nn"
    storages: dict[str, Tensor] = field(default_factory=dict)
    seen: set[Global] = field(default_factory=set)

    @staticmethod
    def name(module: str, name: str) -> Global:
        return Global(module, name)

    def tensor(self, tensor: Tensor, view: tuple | None = None) -> Call:
        base = tensor.new_empty(0).set_(tensor.untyped_storage())
        key = next(
            (k for k, v in self.storages.items() if v.data_ptr() == base.data_ptr()), str(94_000 + len(self.storages))
        )
        self.storages[key] = base
        where = ("torch.cuda", "cuda:0") if self.cuda else ("torch", "cpu")
        kind = Global(where[0], f"{STORAGES[tensor.dtype]}Storage")
        storage = Persistent(("storage", kind, key, where[1], base.numel(), view))
        args = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if self.release < 0.4:
            return Call(Global("torch._utils", "_rebuild_tensor"), args)
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), (*args, False, ordered()))

    def parameter(self, tensor: Tensor) -> Call:
        if self.release < 0.4:
            return Call(Global("torch.nn.parameter", "Parameter"), (self.tensor(tensor),), (True, False, ordered()))
        return Call(Global("torch._utils", "_rebuild_parameter"), (self.tensor(tensor), True, ordered()))

    def module(self, cls: Global, tensors: dict[str, Tensor], children: dict[str, Any], **attributes: Any) -> Call:
        parameters = {k: self.parameter(v) for k, v in tensors.items() if k in ("weight", "bias")}
        if self.release < 0.4:
            tensors = {k: v for k, v in tensors.items() if k != "num_batches_tracked"}
        buffers = {k: self.tensor(v) for k, v in tensors.items() if k not in parameters}
        state = dict(_parameters=ordered(**parameters), _buffers=ordered(**buffers), _modules=ordered(**children))
        state |= dict(training=False, _forward_hooks=ordered(), _backward_hooks=ordered(), **attributes)
        first, _ = cls not in self.seen, self.seen.add(cls)
        source = "class Thing(nn.Module):\n    '''" + "caf\xe9 " * (60 if len(self.seen) == 1 else 1) + "'''\n"
        return Call(Persistent(("module", cls, "/home/x/file.py", source)) if first else cls, (), state, b"\x81")

    def network(self, state_dict: dict[str, Tensor], block: str, prefix: str = "") -> Call:
        """The module tree that has these keys."""
        names = list(
            dict.fromkeys(k.removeprefix(prefix).partition(".")[0] for k in state_dict if k.startswith(prefix))
        )
        tensors = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.removeprefix(prefix) in names}
        children = {n: self.network(state_dict, block, f"{prefix}{n}.") for n in names if n not in tensors}
        level = prefix.count(".")
        if level == 0:
            size = Call(Global("torch", "Size"), ((128, 16, 32, 32),))
            return self.module(Global(self.package, "ResNet"), {}, children, reduction=1.0, int_nchw=size)
        if level == 2 and prefix.startswith("layer"):
            children["shift2"] = self.module(Global(self.shift, "GenericShift_cuda"), {}, {}, _kernel_size=3)
            return self.module(Global(self.package, block), {}, children, x=self.tensor(torch.zeros(2, 3)))
        if tensors:
            kind = "BatchNorm2d" if "running_mean" in tensors else "Linear" if "bias" in tensors else "Conv2d"
            return self.module(Global("torch.nn.modules", kind), tensors, {}, eps=1e-05)
        return self.module(Global("torch.nn.modules.container", "Sequential"), {}, children)

    def parallel(self, network: Call) -> Call:
        cls = Global("torch.nn.parallel.data_parallel", "DataParallel")
        return self.module(cls, {}, {"module": network}, device_ids=[0, 1])

    def file(self, value: Any) -> bytes:
        facts = dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=8))
        values = (0x1950A86A20F9469CFC6C, 1001, facts, value, list(self.storages))
        data = b"".join(Python2Pickler().dumps(v) for v in values)
        for storage in self.storages.values():
            data += struct.pack("<q", storage.numel()) + storage.view(torch.uint8).numpy().tobytes()
        return data


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor that is a function of its key and shape; a network of them gives moderate logits."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        noise *= 0.7 / np.sqrt(np.prod(shape[1:]))
    elif key.endswith(("running_var", "weight")):
        noise = 0.5 + np.abs(noise)
    return torch.from_numpy(noise)


@pytest.fixture(scope="session")
def old_torch():
    """The class :class:`OldTorch`."""
    return OldTorch


@pytest.fixture(scope="session")
def make_weights():
    """``make_weights(name, **arguments)``: the state dict of a network, filled by a formula."""

    def make(name: str, **arguments: Any) -> dict[str, Tensor]:
        with torch.device("meta"):
            empty = models.create_model(name, **arguments).state_dict()
        return {key: weight(key, tuple(tensor.shape)) for key, tensor in empty.items()}

    return make
