"""The demo's folder: a new demo takes the place of the earlier one whole or not at all, and of nothing else."""

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

FORMAT = "shiftconv.demo"
RUNS = ("shiftresnet20", "resnet20")
FILES = ("curves.png", "receptive_field.png", "report.html", "results.json")
WORK, OLD = ".partial", ".replaced"  # a new demo is made in the one; the other takes what it replaces


@contextmanager
def replacing(out: Path) -> Generator[Path]:
    """A folder inside ``out`` to work in; its content takes the place of the earlier demo's if all goes well.

    Raises:
        NotADirectoryError: if ``out`` is a file.
        FileExistsError: if it holds anything else than an earlier demo.
    """
    _check(out)
    new = not out.exists()
    _recover(out)
    work = out / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        _swap(out, work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if new and not any(out.iterdir()):
            out.rmdir()
        raise


def _check(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise NotADirectoryError(f"the demo needs a folder to write to; {out} is a file")
    names = {path.name for path in out.iterdir()}
    foreign = sorted(names - {*RUNS, *FILES, WORK, OLD})
    if foreign:
        raise FileExistsError(f"{out} holds something else than a demo ({foreign[0]}); take another folder")
    if names - {WORK, OLD} and OLD not in names and not _is_demo(out / "results.json"):
        raise FileExistsError(f"{out} holds no complete demo, yet files of such names; take another folder")


def _is_demo(results: Path) -> bool:
    try:
        return json.loads(results.read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _recover(out: Path) -> None:
    """Undo the replacing that a killed demo had begun: the earlier demo is whole again."""
    old = out / OLD
    if not old.exists():
        return
    for path in old.iterdir():
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    old.rmdir()


def _swap(out: Path, work: Path) -> None:
    """Renames only, so that little can go wrong, and what was begun can be undone."""
    old = out / OLD
    old.mkdir()
    for name in (*RUNS, *FILES):
        if (out / name).exists():
            (out / name).rename(old / name)
    for name in (*RUNS, *FILES):
        (work / name).rename(out / name)
    shutil.rmtree(old)
    work.rmdir()
