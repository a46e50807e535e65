"""Any checkpoint becomes a flat state dict: released ``.t7`` modules, ``torch.save`` files, safetensors, our own."""

import json
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shiftconv.models.convert.inert_pickle import Made, PickleError
from shiftconv.models.convert.masks import apply_masks
from shiftconv.models.convert.torch_file import LegacyFile, TensorRecord, TorchFile, ZipFile

AVERAGES = ("model_ema", "state_dict_ema", "ema")  # of the weights over the steps of training
# Where training programs keep the network; "net" is ShiftResNet's, "model" ours. The averaged weights come last.
WRAPPERS = ("net", "model", "state_dict", "model_state_dict", "module", *AVERAGES)
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_MAX_ITEMS, _MAX_DEPTH, _MAX_KEY = 100_000, 50, 1000
_MAX_REPEATS = 4  # how often, on average, a file may use its bytes: weights can be shared
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OverflowError, OSError, ValueError)


@dataclass
class Checkpoint:
    """The weights of a file, and what it says about them.

    Attributes:
        state_dict: tensors on the CPU under the file's own keys, without the prefixes of DataParallel and compile.
        meta: ``kind`` (``t7-module``, ``t7-state-dict``, ``zip-module``, ``zip-state-dict``, ``shiftconv`` or
            ``safetensors``), ``unused``: what else the file holds, such as ``optimizer``; ``masks``: how many were
            applied; and where the file says so ``class``, ``epoch``, ``acc``, ``metrics``, ``model``, ``model_args``.
    """

    state_dict: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | os.PathLike[str], ema: bool = False) -> Checkpoint:
    """Read the weights without importing or executing anything that the file names.

    Args:
        path: a file of ``torch.save`` in either format, holding a module, a state dict, or one of them in a dict under
            a usual name such as ``net`` or ``state_dict``; or a safetensors file. Masks that lie beside the weights are
            applied to them.
        ema: the averaged weights (``model_ema`` and the like) instead; those are read in any case where the file has
            no others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, hostile, something else than a checkpoint, or has no averaged weights.
    """
    path = Path(path)
    if not path.exists():
        near = get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1)
        raise FileNotFoundError(f"no checkpoint {path}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if not path.is_file():
        raise ValueError(f"{path} is not a file{'; it is a folder' if path.is_dir() else ''}")
    try:
        with path.open("rb") as file:
            return _read(path, file, os.fstat(file.fileno()).st_size, ema)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read(path: Path, file: BufferedIOBase, size: int, ema: bool) -> Checkpoint:
    head = file.read(1024)
    file.seek(0)
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        if ema:
            raise PickleError("a safetensors file has one set of weights, no averaged ones beside them")
        return _read_safetensors(path)
    if head.startswith(b"\x80"):
        return _read_torch(LegacyFile(file, size), "t7", size, ema)
    if head.startswith(b"PK"):
        try:
            return _read_torch(ZipFile(file, size), "zip", size, ema)
        except _ZIP_ERRORS as error:
            if isinstance(error, PickleError):
                raise
            raise PickleError(f"damaged zip archive: {error}") from error
    raise PickleError(f"expected a checkpoint of torch.save or safetensors, got {_looks_like(head)}")


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer; fetch the file itself with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "a web page; the download needs another address"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it, or if torch before 0.1.10 saved it, save it again with a newer one"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive; unpack it first"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text that begins {head[:40].decode('ascii')!r}"
    return f"data that begins {head[:8].hex(' ')}"


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
            said: dict[str, str] = file.metadata() or {}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise PickleError(f"damaged safetensors file ({error})") from error
    meta: dict[str, Any] = {"kind": "safetensors"}
    meta |= {key: _json(said[key]) for key in ("epoch", "acc", "metrics") if key in said}
    if "model" in said and "model_args" in said:
        meta |= {"model": said["model"], "model_args": _json(said["model_args"])}
    return Checkpoint(_strip(state_dict), meta)


def _json(text: str) -> Any:
    """What the text says in JSON, or the text itself: other programs write metadata too."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError):
        return text[:_MAX_KEY]


def _read_torch(file: TorchFile, container: str, size: int, ema: bool) -> Checkpoint:
    top = _entries(file.content)
    found = _find_network({key: top.get(key) for key in AVERAGES} if ema else file.content)
    if found is None and ema:
        raise PickleError(f"it has no averaged weights ({', '.join(AVERAGES)})")
    if found is None:
        keys = ", ".join(repr(str(key)[:40]) for key in list(top)[:8])
        raise PickleError("it holds no network" + (f", only {keys}" if keys else ""))
    records: dict[str, TensorRecord] = {}
    if isinstance(found, Made):
        _Walk(records).module(found, "", 0)
        meta: dict[str, Any] = {"kind": f"{container}-module", "class": str(found.what)[:200]}
    else:
        records = {key: value for key, value in found.items() if isinstance(value, TensorRecord)}
        meta = {"kind": f"{container}-state-dict"}
    meta |= _facts(file, top)
    masks = {str(k): v for k, v in _entries(top.get("masks")).items() if isinstance(v, TensorRecord)}
    used = {"masks"} if masks else set()
    if found is not file.content:
        used |= {key for key in WRAPPERS if key in top and _find_network({key: top[key]}) is found}
        rest = [str(key)[:40] for key in top if key not in (*used, *meta)][:_MAX_KEY]
        if rest and meta["kind"] != "shiftconv":
            meta["unused"] = rest
    state_dict, applied = _load(file, records, size), _load(file, masks, size)
    if applied:
        meta["masks"] = len(applied)
    return Checkpoint(apply_masks(_strip(state_dict), _strip(applied)), meta)


def _load(file: TorchFile, records: Mapping[str, TensorRecord], size: int) -> dict[str, Tensor]:
    """The tensors of a file of ``size`` bytes, unless they are many times as large."""
    total, tensors = 0, dict[str, Tensor]()
    for key, record in records.items():
        try:
            tensors[key] = file.tensor(record)
        except PickleError as error:
            raise PickleError(f"{key[:100]!r} is {error}") from error
        total += tensors[key].nbytes
        if total > _MAX_REPEATS * size:
            raise PickleError(f"its tensors have more than {_MAX_REPEATS} times the bytes of the file")
    return tensors


def _entries(value: object) -> dict[Any, Any]:
    """The items of a dict, or of what would have been an instance of a subclass of it."""
    return value if isinstance(value, dict) else value.entries if isinstance(value, Made) else {}


def _find_network(value: object, depth: int = 0, seen: set[int] | None = None) -> Made | dict[Any, Any] | None:
    """The module or the state dict at ``value``, or inside it under one of ``WRAPPERS``."""
    if isinstance(value, Made) and "_modules" in _entries(value.state):
        return value
    entries, seen = _entries(value), set() if seen is None else seen
    if depth > 4 or id(entries) in seen:
        return None
    seen.add(id(entries))
    for key in WRAPPERS:
        if key in entries and (found := _find_network(entries[key], depth + 1, seen)) is not None:
            return found
    is_state_dict = any(isinstance(v, TensorRecord) for v in entries.values()) and all(type(k) is str for k in entries)
    return entries if is_state_dict else None


class _Walk:
    """Collects the tensors of pickled modules in the order of a state dict."""

    def __init__(self, records: dict[str, TensorRecord]):
        self.records, self.items_left = records, _MAX_ITEMS

    def module(self, module: object, prefix: str, depth: int) -> None:
        state = _entries(module.state) if isinstance(module, Made) else {}
        hidden = state.get("_non_persistent_buffers_set")
        hidden = {h for h in hidden[:_MAX_KEY] if isinstance(h, str)} if isinstance(hidden, list) else ()
        for kind in ("_parameters", "_buffers"):
            for key, name, value in self.items(state, kind, prefix):
                if not (kind == "_buffers" and name in hidden):
                    self.tensor(key, value)
        for key, _, child in self.items(state, "_modules", prefix):
            if depth > _MAX_DEPTH or len(key) > _MAX_KEY:
                raise PickleError("modules nested deeper than in any network")
            self.module(child, f"{key}.", depth + 1)

    def items(self, state: dict[Any, Any], kind: str, prefix: str) -> Iterator[tuple[str, str, object]]:
        """Key, name and value of each item; one dict can stand in many modules, so that small files make many."""
        for name, value in _entries(state.get(kind)).items():
            self.items_left -= 1
            if self.items_left < 0:
                raise PickleError(f"more than {_MAX_ITEMS} weights and modules")
            if isinstance(name, str) and value is not None:
                yield f"{prefix}{name[:_MAX_KEY]}", name, value

    def tensor(self, key: str, value: object) -> None:
        if not isinstance(value, TensorRecord):
            what = value.what if isinstance(value, Made) else type(value).__name__
            raise PickleError(f"{key[:100]!r} is no dense tensor but {str(what)[:80]!r}")
        self.records[key] = value


def _facts(file: TorchFile, top: Mapping[Any, Any]) -> dict[str, Any]:
    """What the file says about its network, as far as it is made of plain numbers, strings, lists and dicts."""
    facts: dict[str, Any] = {}
    for key in ("epoch", "acc", "metrics"):
        value = top.get(key)
        if isinstance(value, TensorRecord):  # an accuracy that torch 0.4 and later computed
            tensor = file.tensor(value)
            value = tensor.item() if tensor.numel() == 1 else None
        if value is not None and (plain := _Plain()(value)) is not None:
            facts[key] = plain
    if top.get("format") == "shiftconv.checkpoint":
        if top.get("version") != 1:
            raise PickleError("a checkpoint of a later shiftconv; update it with `pip install -U shiftconv`")
        facts |= {"kind": "shiftconv", "model": _Plain()(top.get("model_name"))}
        facts["model_args"] = _Plain()(top.get("model_args")) or {}
    return facts


class _Plain:
    """A copy of nested lists and dicts of numbers and strings; None for anything else, or for too much of it."""

    def __init__(self) -> None:
        self.left = 10_000

    def __call__(self, value: object, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0 or depth > 8:
            return None
        if isinstance(value, dict):
            return {str(k)[:_MAX_KEY]: self(v, depth + 1) for k, v in list(value.items())[: self.left]}
        if isinstance(value, list | tuple):
            return [self(v, depth + 1) for v in value[: self.left]]
        return value if isinstance(value, str | int | float) else None


def _strip(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(4):
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state_dict)), None)
        if prefix is None or not state_dict:
            break
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict
