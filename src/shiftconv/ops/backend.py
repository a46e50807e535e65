"""Which kernel runs an operator on a device, and why.

==========  =====================================  ==============================================
backend     runs on                                needs
==========  =====================================  ==============================================
reference   every device                           nothing
native      cpu                                    a C++ compiler at the first use, then nothing
triton      cuda; cpu with ``TRITON_INTERPRET=1``  triton
==========  =====================================  ==============================================

The best one that works is taken at the first call on a device and holds for the process.
``SHIFTCONV_BACKEND=reference|native|triton`` forces one, and then it is an error if that one cannot run.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from shiftconv.names import unknown
from shiftconv.ops import native

BACKENDS = ("reference", "native", "triton")
DEVICES = ("cpu", "cuda")
VARIABLE = "SHIFTCONV_BACKEND"

# Operators whose kernels are in files that several share.
SHARED: dict[str, tuple[str, ...]] = dict.fromkeys(("cross_conv", "depthwise_conv"), ("depthwise", "depthwise_weight"))

P = ParamSpec("P")
R = TypeVar("R")

_TRITON = Path(__file__).with_name("triton")
_log = logging.getLogger("shiftconv")
_lock = threading.RLock()
_registered: dict[tuple[str, str], Choice] = {}
_entries: set[tuple[str, str]] = set()  # raw operators that have a Triton kernel on a device
_obstacles: dict[tuple[str, str], str] = {}  # found out at run time: a failed compilation is not tried again
_libraries: list[torch.library.Library] = []  # a registration lives as long as its Library


class Choice(NamedTuple):
    """What runs ``op`` on ``device``: one of :data:`BACKENDS`, and the reason in one sentence."""

    op: str
    device: str
    backend: str
    reason: str


def explain(op: str | None = None, device: str | None = None) -> list[Choice]:
    """What runs, or would run at a first call, without compiling or loading anything.

    Args:
        op: an operator's name, or all of them.
        device: ``cpu``, ``cuda`` or another device type, or those two.

    Raises:
        ValueError: no such operator.
    """
    known = operators()
    if op is not None and op not in (*known, *SHARED):
        raise unknown("operator", op, (*SHARED, *known))
    names = known if op is None else SHARED.get(op, (op,))
    return [_foresee(name, d) for name in names for d in ([device] if device else DEVICES)]


def _foresee(op: str, device: str) -> Choice:
    try:
        return _plan(op, device)
    except RuntimeError as error:  # forced, and impossible
        return Choice(op, device, forced() or "reference", str(error))


def environment() -> dict[str, str]:
    """Versions, compiler, cache folder, compiled kernels, GPU and forced backend, each as a short text."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if _has_triton() else "not installed",
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }
    for name, fact in {
        "compiler": lambda: f"{' '.join(native.compiler())} ({native.compiler_version()})",
        "cache folder": lambda: str(native.cache_folder()),
        "compiled": lambda: ", ".join(op for op in native.operators() if native.is_built(op)) or "nothing yet",
    }.items():
        try:
            facts[name] = fact()
        except native.NativeError as error:
            facts[name] = f"none: {error}"
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts["forced backend"] = forced() or "none"
    return facts


def operators() -> list[str]:
    """Names of the operators that have a kernel of their own."""
    return sorted({*native.operators(), *(path.stem for path in _TRITON.glob("[!_]*.py"))})


def forced() -> str | None:
    """The backend that the environment demands; a ValueError if there is none of that name."""
    name = os.environ.get(VARIABLE)
    if name and name not in BACKENDS:
        raise unknown(f"backend in {VARIABLE}", name, BACKENDS)
    return name or None


def kernel(op: str, device: str, reference: Callable[P, R], entry: str | None = None) -> Callable[P, R]:
    """The function that carries ``op`` out on ``device``; an operator asks where no kernel is registered (yet).

    A native or CUDA kernel is registered with the dispatcher on the way, and then this is not asked again.

    Args:
        op: the operator, that is the file of its kernels.
        device: a device type.
        reference: what runs where there is no kernel.
        entry: the raw operator that is meant, if it is not called ``op``: a file may hold several.

    Raises:
        RuntimeError: the backend that the environment forces cannot run.
    """
    entry = entry or op
    with _lock:
        choice = _plan(op, device)
        if choice.backend == "triton":
            run = vars(_triton_module(op)).get(entry)
            if run is None:  # some entries need no kernel of their own on a GPU
                return reference
            _register_triton(choice, entry, run)
            return run
        if choice.backend == "native" and (op, device) not in _registered:
            try:
                path = native.load(op)
                reason = f"{choice.reason}; {path}" if forced() else f"C++ kernel, {path}"
                _registered[op, device] = choice._replace(reason=reason)
            except native.NativeError as error:
                _obstacles[op, device] = str(error)
                choice = _plan(op, device)
    if choice.backend == "reference":
        _say_once(choice)
        return reference
    return getattr(torch.ops.shiftconv, entry).default


def _plan(op: str, device: str) -> Choice:
    """Choose by what can be known without compiling."""
    if (op, device) in _registered:
        return _registered[op, device]
    demanded = forced()
    if demanded:
        if obstacle := _obstacle(demanded, op, device):
            raise RuntimeError(f"{VARIABLE}={demanded} cannot run {op} on {device}: {obstacle}")
        return Choice(op, device, demanded, f"forced by {VARIABLE}")
    best = {"cpu": "native", "cuda": "triton"}.get(device)
    if best is None:
        return Choice(op, device, "reference", f"there is no kernel for {device}")
    if obstacle := _obstacle(best, op, device):
        return Choice(op, device, "reference", obstacle)
    if best == "triton":
        return Choice(op, device, best, "compiled by Triton for each GPU at the first call")
    built = "compiled, in the cache" if native.is_built(op) else "compiled at the first call, a few seconds"
    return Choice(op, device, best, f"C++ kernel, {built}")


def _obstacle(name: str, op: str, device: str) -> str | None:
    """Why the backend of this name cannot run ``op`` on ``device``, or None if nothing speaks against it."""
    if name == "native":
        if device != "cpu":
            return f"C++ kernels run on cpu, not on {device}"
        if op not in native.operators():
            return f"there is no C++ kernel for {op}"
        try:
            native.library(op)
        except native.NativeError as error:
            return str(error)
    elif name == "triton":
        if not _has_triton():
            return "triton is not installed"
        if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"Triton kernels run on cuda (on cpu with TRITON_INTERPRET=1), not on {device}"
        if not (_TRITON / f"{op}.py").exists():
            return f"there is no Triton kernel for {op}"
    return _obstacles.get((op, device)) if name != "reference" else None


def _register_triton(choice: Choice, entry: str, run: Callable[..., object]) -> None:
    """Put a kernel under the dispatch key of its device for the rest of the process; the interpreter takes turns."""
    if choice.device == "cpu" or (entry, choice.device) in _entries:
        return
    library = torch.library.Library("shiftconv", "IMPL")
    library.impl(entry, run, choice.device.upper())
    _libraries.append(library)
    _entries.add((entry, choice.device))
    _registered[choice.op, choice.device] = choice


def _triton_module(op: str) -> ModuleType:
    return importlib.import_module(f"shiftconv.ops.triton.{op}")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _say_once(choice: Choice) -> None:
    """A slow fall-back is worth one line, unless it was asked for."""
    if not forced():
        _log.warning("%s on %s runs its slow reference: %s", *choice[:2], choice.reason)
