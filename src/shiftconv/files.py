"""Floor 0: files that are either whole or not there. Imports nothing of ours, so every floor may use it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".partial"  # of files that are being written; one that lies about was left by a killed process
_CHUNK = 1 << 26  # bytes copied at a time, so that an interrupt does not wait for all
_writing: set[int] = set()


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file at once: readers, and a machine that loses its power, see the old content or the new, never a part.

    Args:
        path: the file.
        keep: where the old content goes once the new is on the disk; none: nowhere.

    Yields:
        A file that takes the place of ``path`` when the block ends without an error.

    Raises:
        FileNotFoundError: if its folder does not exist.
        OSError: if it cannot be written; names the file. The old content stays, and nothing else is left.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        with partial.open("xb") as file:
            _writing.add(file.fileno())
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            finally:
                _writing.discard(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write all of a file at once; arguments and errors are those of ``replacing``."""
    with replacing(path, keep) as file:
        file.write(content)


def copy(source: Path, path: Path) -> None:
    """Write a copy of a file at once.

    Raises:
        OSError: if ``source`` cannot be read, or as ``replacing``.
    """
    with source.open("rb") as old, replacing(path) as new:
        done, size = 0, os.fstat(old.fileno()).st_size
        with suppress(OSError):  # not every pair of file systems can; a full disk is met again below
            in_kernel = getattr(os, "copy_file_range", None)  # Linux: shares the blocks where the file system can
            while in_kernel and (count := in_kernel(old.fileno(), new.fileno(), min(size - done, _CHUNK))):
                done += count
        old.seek(done)
        new.seek(done)
        shutil.copyfileobj(old, new, _CHUNK)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder last, where the system can."""
    with suppress(OSError):  # Windows opens no folders, and some network file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what a killed process had half written."""
    for partial in folder.glob(f".*{SUFFIX}"):
        partial.unlink(missing_ok=True)


def _leave() -> None:
    for handle in _writing:
        with suppress(OSError):
            os.close(handle)
    _writing.clear()


if hasattr(
    os, "register_at_fork"
):  # else a file that is replaced while a data loader's worker lives would keep its disk space
    os.register_at_fork(after_in_child=_leave)
