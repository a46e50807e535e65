"""What ``torch.save`` writes, in both of its formats, read without ``torch.load``: nothing in the file is executed.

Legacy (before torch 1.6, and all ``.t7`` files of ShiftResNet): five pickles (magic number, version, facts about the
writer, the object, the keys of the storages), then for each key an int64 count and the raw little-endian numbers.
Zip: ``<name>/data.pkl`` is the object, ``<name>/data/<key>`` the raw numbers, ``<name>/byteorder`` their order.
Source: ``torch/serialization.py``. Tensors come back as views into their storages, on the CPU.
"""

import io
import math
import zipfile
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

import torch
from torch import Tensor

from shiftconv.models.convert.inert_pickle import InertUnpickler, Made, Name, PickleError

MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    **dict(Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16),
    **dict(Long=torch.int64, Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool),
    **dict(ComplexDouble=torch.complex128, ComplexFloat=torch.complex64, Untyped=torch.uint8),
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")
_LISTS = {Name(module, name) for module in ("__builtin__", "builtins") for name in ("set", "frozenset", "list")}
_TENSORS = {Name("torch._utils", "_rebuild_tensor"), Name("torch._utils", "_rebuild_tensor_v2")}
_WRAPPED_TENSORS = {  # their first argument is the tensor
    Name("torch._utils", "_rebuild_parameter"),
    Name("torch._utils", "_rebuild_parameter_with_state"),
    Name("torch.nn.parameter", "Parameter"),  # torch 0.2 and 0.3
    Name("torch.autograd.variable", "Variable"),
}
_ORDERED_DICT, _SIZE = Name("collections", "OrderedDict"), Name("torch", "Size")
_MAX_DIMS, _MAX_NUMBER = 16, 2**40


@dataclass(eq=False)
class Storage:
    """Numbers in the file: ``numel`` of ``dtype``, from element ``start`` of what is kept under ``key``."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(eq=False)
class TensorRecord:
    """A tensor as the pickle describes it; nothing is checked before :meth:`TorchFile.tensor`."""

    storage: object
    offset: object
    size: object
    stride: object


class TorchUnpickler(InertUnpickler):
    """Knows tensors, storages and plain containers; every other class stays a :class:`Made`."""

    def __init__(self, file: BufferedIOBase, end: int):
        super().__init__(file, end)
        self.storages: dict[str, Storage] = {}

    def make(self, what: object, args: object) -> object:
        first = args[0] if isinstance(args, tuple) and args else None
        if not isinstance(what, Name):
            return Made(what, args)
        if what == _ORDERED_DICT:
            return self._ordered_dict(first)
        if (what in _LISTS and isinstance(first, list)) or (what == _SIZE and isinstance(first, tuple)):
            return first  # not copied: a file can ask for millions of copies
        if what in _TENSORS and isinstance(args, tuple) and len(args) >= 4:
            return TensorRecord(*args[:4])
        if what in _WRAPPED_TENSORS and isinstance(first, TensorRecord):
            return first
        return Made(what, args)

    def _ordered_dict(self, pairs: object) -> dict[Any, Any]:
        """Empty in files of Python 3, where the items follow; a list of ``[key, value]`` in those of Python 2."""
        entries: dict[Any, Any] = {}
        if isinstance(pairs, list):
            self.spend(len(pairs))
            for key, value in pairs:
                self.enter(entries, key, value)
        return entries

    def persistent(self, pid: object) -> object:
        kind, *fields = pid if isinstance(pid, tuple) and 2 <= len(pid) <= 6 else (None,)
        if kind == "module":  # class, source file, source text; the last two are never looked at
            return fields[0]
        if kind != "storage" or len(fields) not in (4, 5):
            self.fail("an outside object that is neither a storage nor a class")
        cls, key, _, numel, *view = fields
        if not (isinstance(cls, Name) and isinstance(key, str) and type(numel) is int and numel >= 0):
            self.fail("a storage without class, key or number of elements")
        base = self.storages.setdefault(key, Storage(key, _dtype(cls), numel))
        if (base.dtype, base.numel) != (_dtype(cls), numel):
            self.fail(f"storage {key[:40]!r} described in two ways")
        return base if not view or view[0] is None else self._view(base, view[0])

    def _view(self, base: Storage, view: object) -> Storage:
        _, start, numel = view if isinstance(view, tuple) and len(view) == 3 else (None, None, None)
        if not (type(start) is int and type(numel) is int and 0 <= start <= start + numel <= base.numel):
            self.fail(f"a part of storage {base.key[:40]!r} that is not in it")
        return Storage(base.key, base.dtype, numel, start)


def _dtype(cls: Name) -> torch.dtype:
    dtype = _DTYPES.get(cls.name.removesuffix("Storage")) if cls.name.endswith("Storage") else None
    if dtype is None or cls.module not in _STORAGE_MODULES:
        raise PickleError(f"storage class {str(cls)[:80]!r} is not one of numbers that torch can compute with")
    return dtype


class TorchFile:
    """A file of ``torch.save``: :attr:`content` describes the object, :meth:`tensor` reads the numbers of a tensor.

    Args:
        file: stays open for as long as tensors are read.
        size: of the file in bytes.

    Raises:
        ValueError: the file is damaged, or claims what it cannot hold.
    """

    content: Any
    storages: dict[str, Storage]

    def __init__(self, file: BufferedIOBase, size: int):
        self.file, self.size = file, size
        self._loaded: dict[str, Tensor] = {}

    def read(self, storage: Storage) -> bytearray:
        """All bytes of the storage."""
        raise NotImplementedError

    def tensor(self, record: TensorRecord) -> Tensor:
        """The tensor itself, a view into its storage, after checking that the storage holds it."""
        storage = record.storage
        if not isinstance(storage, Storage):
            raise PickleError("a tensor without a storage")
        (offset,), size, stride = _numbers((record.offset,)), _numbers(record.size), _numbers(record.stride)
        if len(size) != len(stride):
            raise PickleError(f"a tensor of {len(size)} sizes and {len(stride)} strides")
        numel, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not numel:
            return torch.empty([min(n, 1) for n in size], dtype=storage.dtype)
        # The second test refuses strides of zero, which make much out of little.
        if last >= storage.numel or numel > storage.numel:
            raise PickleError(f"a tensor of shape {list(size)} in a storage of {storage.numel} elements")
        return self._load(storage.key).as_strided(size, stride, storage.start + offset)

    def _load(self, key: str) -> Tensor:
        if key not in self._loaded:
            storage = self.storages[key]
            self._loaded[key] = torch.frombuffer(self.read(storage), dtype=storage.dtype)
        return self._loaded[key]


def _numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MAX_DIMS:
        raise PickleError(f"a tensor whose size or stride is no tuple of up to {_MAX_DIMS} numbers")
    if not all(type(n) is int and 0 <= n < _MAX_NUMBER for n in values):
        raise PickleError(f"a tensor whose size, stride or offset is not a number from 0 to {_MAX_NUMBER}")
    return values


class LegacyFile(TorchFile):
    """The format of torch before 1.6."""

    def __init__(self, file: BufferedIOBase, size: int):
        super().__init__(file, size)
        unpickler = TorchUnpickler(file, size)
        if unpickler.load() != MAGIC:
            raise PickleError("a pickle, but not one that torch.save wrote")
        if (version := unpickler.load()) != 1001:
            raise PickleError(f"version {version if type(version) is int else '?'} of torch's format, expected 1001")
        unpickler.load()  # the writer's byte order and sizes: the numbers are little-endian whatever it says
        self.content = unpickler.load()
        self.storages = unpickler.storages
        self._positions = self._find(unpickler)

    def _find(self, unpickler: TorchUnpickler) -> dict[str, int]:
        keys = unpickler.load()
        if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
            raise PickleError("no list of storage keys")
        positions: dict[str, int] = {}
        for key in keys:
            storage = self.storages.get(key)
            if storage is None or key in positions:
                raise PickleError(f"storage {key[:40]!r} is {'listed twice' if storage else 'never described'}")
            count = int.from_bytes(unpickler.take(8), "little", signed=True)
            positions[key] = self.file.tell()
            need, left = storage.numel * storage.dtype.itemsize, self.size - positions[key]
            if count != storage.numel or need > left:
                raise PickleError(
                    f"storage {key[:40]!r} should have {storage.numel} elements, {need} bytes; "
                    f"its count says {count}, and {left} bytes are left in the file"
                )
            self.file.seek(need, io.SEEK_CUR)
        if missing := set(self.storages) - set(positions):
            raise PickleError(f"storage {min(missing)[:40]!r} is not in the file")
        return positions

    def read(self, storage: Storage) -> bytearray:
        self.file.seek(self._positions[storage.key])
        data = bytearray(storage.numel * storage.dtype.itemsize)
        if self.file.readinto(data) != len(data):
            raise PickleError("the file became shorter while it was read")
        return data


class ZipFile(TorchFile):
    """The format of torch from 1.6 on."""

    def __init__(self, file: BufferedIOBase, size: int):
        super().__init__(file, size)
        self._archive = zipfile.ZipFile(file)
        entries = self._archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise PickleError("a zip archive with compressed entries, which torch.save does not write")
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
            raise PickleError("a zip archive whose entries are larger than the file")
        pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise PickleError(self._what_else([entry.filename for entry in entries]))
        self._folder = pickles[0].removesuffix("data.pkl")
        data = self._archive.read(pickles[0])
        unpickler = TorchUnpickler(io.BytesIO(data), len(data))
        self.content = unpickler.load()
        self.storages = unpickler.storages
        names = self._archive.NameToInfo
        order = f"{self._folder}byteorder"
        self._swap = order in names and self._archive.read(order) == b"big"
        for key, storage in self.storages.items():
            entry = names.get(f"{self._folder}data/{key}")
            need = storage.numel * storage.dtype.itemsize
            if entry is None or entry.file_size != need:
                came = "missing" if entry is None else f"{entry.file_size} bytes"
                raise PickleError(f"storage {key[:40]!r} should have {need} bytes, and is {came}")

    def _what_else(self, names: list[str]) -> str:
        inside = ", ".join(repr(name[:60]) for name in names[:5])
        if any(name.endswith(("/constants.pkl", "/code/")) for name in names):
            return "a TorchScript archive; save the state_dict of the loaded module instead"
        return f"a zip archive, but not one of torch.save; unpack it and give a file inside ({inside or 'it is empty'})"

    def read(self, storage: Storage) -> bytearray:
        data = bytearray(self._archive.read(f"{self._folder}data/{storage.key}"))
        if self._swap:
            width = storage.dtype.itemsize // (2 if storage.dtype.is_complex else 1)
            numbers = torch.frombuffer(data, dtype=torch.uint8).view(-1, width).flip(1)
            data = bytearray(numbers.numpy().tobytes())
        return data
