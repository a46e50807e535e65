"""Build, cache and load the C++ kernels: one shared library per operator, from ``csrc/<op>.cpp``.

Parts of a large one are in files ``csrc/<op>.<part>.cpp``, which are compiled side by side.

They stand on LibTorch's stable ABI, so a build takes seconds and needs a C++20 compiler, but no headers of Python.
A library is compiled at the first use on a machine and kept in a cache folder, under a name that is a digest of all it
depends on. Processes that start together compile once; nothing half-written is ever visible under its final name.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
TARGET = "0x020b000000000000"  # the oldest torch whose stable ABI the sources use: 2.11
INSTALL = "install g++ or clang++ (Debian: apt install g++; conda: gxx), or name one in CXX"
_BUILD_LIMIT_S = 300


class NativeError(RuntimeError):
    """Why there is no native kernel, in one sentence."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler's command, from ``$CXX`` or the usual names; raises :class:`NativeError` if none answers."""
    named = os.environ.get("CXX", "")
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) and _answer(*command, "--version"):
            return tuple(command)
    what = f"CXX={named} is no working C++ compiler" if named else "no C++ compiler (c++, g++, clang++) found"
    raise NativeError(f"{what}; {INSTALL}")


@functools.cache
def compiler_version() -> str:
    """First line of ``--version`` of :func:`compiler`."""
    return _answer(*compiler(), "--version").partition("\n")[0]


def _answer(*command: str) -> str:
    """Standard output of a command, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def operators() -> list[str]:
    """Names of the operators that have a C++ kernel."""
    return sorted(path.stem for path in SOURCES.glob("*.cpp") if "." not in path.stem)


def _units(op: str) -> list[Path]:
    """The files that are compiled for ``op``."""
    return [SOURCES / f"{op}.cpp", *sorted(SOURCES.glob(f"{op}.*.cpp"))]


@functools.cache
def library(op: str) -> Path:
    """Where the library of ``op`` lies in the cache, whether built yet or not."""
    return cache_folder() / f"{op}-{_digest(op)}.so"


def is_built(op: str) -> bool:
    """Whether :func:`load` of ``op`` would find an undamaged library in the cache."""
    return _is_whole(library(op))


def _digest(op: str) -> str:
    """Digest of what a build depends on: sources, flags, torch, compiler and the processor's instruction set."""
    digest = hashlib.sha256()
    for path in _sources(_units(op)):
        digest.update(path.read_bytes())
    for part in (torch.__version__, compiler_version(), *compiler(), *_flags(native_code=True), *processor()):
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:24]


def _sources(units: list[Path]) -> list[Path]:
    """``units`` and the files of ours that they include, directly or not, each once."""
    found = [*units]
    for file in found:  # grows as it goes
        names = re.findall(r'^#include "(\w+\.h)"', file.read_text(), re.MULTILINE)
        found += [p for name in names if (p := SOURCES / name) not in found]
    return found


@functools.cache
def processor() -> tuple[str, ...]:
    """Machine type and, where the system tells, the processor's features: a shared home may serve several machines."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine(), *sorted(line.partition(":")[2].split())
    return platform.machine(), platform.processor()


def _flags(native_code: bool) -> list[str]:
    root = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}"]
    flags += ["-march=native"] if native_code else []
    flags += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu"]
    # The process has loaded libtorch already, from wherever it lies, so no path to it is recorded.
    return [*flags, "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else flags


def cache_folder() -> Path:
    """``$SHIFTCONV_CACHE``, else shiftconv in ``$XDG_CACHE_HOME`` or ``~/.cache``, else a private temporary folder.

    Raises:
        NativeError: none of them can be written, or the temporary one belongs to somebody else.
    """
    named = os.environ.get("SHIFTCONV_CACHE")
    if named:
        if folder := _writable(Path(named).expanduser()):
            return folder
        raise NativeError(f"SHIFTCONV_CACHE={named} must be a folder that can be written")
    with suppress(RuntimeError):  # no home folder is known
        base = os.environ.get("XDG_CACHE_HOME")
        if folder := _writable((Path(base) if base else Path.home() / ".cache") / "shiftconv"):
            return folder
    return _private_temporary_folder()


def _writable(folder: Path) -> Path | None:
    """``folder``, made if need be, when files can be created in it and only its owner can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    except OSError:
        return None


def _private_temporary_folder() -> Path:
    """A folder of this user alone in the temporary folder, where others could have put one of that name."""
    user = os.getuid() if sys.platform != "win32" else "user"
    folder = Path(tempfile.gettempdir()) / f"shiftconv-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    safe = stat.S_ISDIR(state.st_mode) and (
        sys.platform == "win32" or (state.st_uid == os.getuid() and not state.st_mode & 0o077)
    )
    if not safe or _writable(folder) is None:
        raise NativeError(f"{folder} must be a folder of this user with mode 0700; remove it or set SHIFTCONV_CACHE")
    return folder


def load(op: str) -> Path:
    """Register the C++ kernel of ``op`` with the dispatcher, compiling it first if the cache has none.

    Returns:
        The library's path.

    Raises:
        NativeError: no kernel, no compiler, a refused compilation, or a library that does not load.
    """
    if op not in operators():
        raise NativeError(f"there is no C++ kernel for {op}")
    path = library(op)
    if not _is_whole(path):
        build(op)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        path.unlink(missing_ok=True)  # whole, yet unusable: the next process builds it anew
        raise NativeError(f"the compiled {op} kernel does not load: {error}") from error
    return path


def build(op: str) -> Path:
    """Compile ``op`` into the cache unless another process does so first; see :func:`load`."""
    path = library(op)
    with _lock(path.with_suffix(".lock")):
        if _is_whole(path):
            return path
        with tempfile.TemporaryDirectory(prefix=f".{op}-", dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            _compile(op, fresh)
            _seal(path).unlink(missing_ok=True)
            digest = fresh.with_suffix(".sha256")
            digest.write_text(_checksum(fresh))
            fresh.replace(path)
            digest.replace(_seal(path))
    return path


def _compile(op: str, target: Path) -> None:
    """Run the compiler, for this very processor if it can."""
    units = [str(unit) for unit in _units(op)]
    objects = [f"{target}.{i}.o" for i in range(len(units))]
    refused = ""
    for native_code in (True, False):
        flags = _flags(native_code)
        if len(units) == 1:
            refused = _refused(op, [[*compiler(), *units, "-o", str(target), *flags]])
        else:
            pairs = zip(units, objects, strict=True)
            refused = _refused(op, [[*compiler(), "-c", unit, "-o", part, *flags] for unit, part in pairs])
            refused = refused or _refused(op, [[*compiler(), *objects, "-o", str(target), *flags]])
        if not refused:
            return
    lines = [line for line in refused.splitlines() if "error" in line] or refused.splitlines()
    raise NativeError(f"{compiler()[0]} could not compile the {op} kernel: {lines[0]}")


def _refused(op: str, commands: list[list[str]]) -> str:
    """Run the commands side by side; what the first one that failed has said, or nothing if all went well."""

    def run(command: list[str]) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeError(f"{compiler()[0]} could not compile the {op} kernel: {error}") from error
        return "" if done.returncode == 0 else done.stderr.strip() or "no message"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return next((text for text in pool.map(run, commands) if text), "")


def _seal(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(path: Path) -> bool:
    """Loading a truncated library kills the process, so its checksum is compared first."""
    try:
        return _seal(path).read_text() == _checksum(path)
    except OSError:
        return False


@contextmanager
def _lock(path: Path) -> Generator[None]:
    """Hold an exclusive lock between processes, as far as the file system has locks: without one, two compile."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("a") as file:
        deadline = time.monotonic() + _BUILD_LIMIT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
