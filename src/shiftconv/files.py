"""Floor 0: files that are either whole or not there. Imports nothing of ours, so every floor may use it."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

SUFFIX = ".partial"  # of files that are being written; one that lies about was left by a killed process


def write(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file at once: readers, and a machine that loses its power, see the old content or the new, never a part.

    Args:
        path: the file.
        content: all of it.
        keep: where the old content goes once the new is on the disk; none: nowhere.

    Raises:
        FileNotFoundError: if its folder does not exist.
        OSError: if it cannot be written; names the file. The old content stays, and nothing else is left.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())  # mkstemp lets nobody else read
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


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


def _umask() -> int:
    mask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(mask)
    return mask
