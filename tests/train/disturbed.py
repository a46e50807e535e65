"""The command line in processes of its own, with something done to it at a certain update, and what a run leaves."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import torch
import yaml

import shiftconv
from shiftconv.train import checkpoint as ck

# `python -m shiftconv` finds this one first. $AT is the rank and the update (counted over all epochs, from 1) after
# which it does $DO; from then on each update takes longer, so that what was done has its effect before the run ends.
_MAIN = """
import json, os, signal, sys, time
from pathlib import Path

from shiftconv.cli import main

rank, restart = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
launcher = "--gpus" in sys.argv and "RANK" not in os.environ
if not launcher and "AT" in os.environ:
    from shiftconv.train.trainer import Trainer

    update, updates = Trainer._update, 0
    who, when = map(int, os.environ["AT"].split(":"))
    Path(os.environ["PIDS"], f"{rank}.{restart}").write_text(str(os.getpid()))

    def watched(self):
        global updates
        update(self)
        updates += 1
        if restart == 0 and updates == when and rank == who:
            exec(os.environ["DO"], {**globals(), "trainer": self})
        elif restart == 0 and updates >= when:
            time.sleep(0.1)

    Trainer._update = watched
main()
"""
_TIMES = ("images_per_second", "seconds", "restarted_workers", "skipped_images")


def make_program(folder):
    """A folder for PYTHONPATH with that program."""
    home = Path(folder) / "shiftconv"
    home.mkdir(parents=True)
    (home / "__main__.py").write_text(_MAIN)
    real = str(Path(shiftconv.__file__).parent)
    start = f"__path__.append({real!r})\n__file__ = {real + '/__init__.py'!r}\nexec(open(__file__).read())\n"
    (home / "__init__.py").write_text(start)
    return home.parent


def write_recipe(recipe, path):
    path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
    return path


def start(program, *arguments, at="", do="", prefix=()):
    """A process of ``shiftconv train ARGUMENTS``, with one thread each."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program), "PIDS": str(program), "COLUMNS": "200"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "AT", "SHIFTCONV_TRACEBACK"):
        env.pop(name, None)
    if at:
        for path in program.glob("?.?"):
            path.unlink()
        env |= {"AT": at, "DO": do}
    command = [*prefix, sys.executable, "-m", "shiftconv", "train", *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(program, *arguments, at="", do="", prefix=()):
    """Run that to its end; gives the exit status and the lines on stderr."""
    process = start(program, *arguments, at=at, do=do, prefix=prefix)
    _, err = process.communicate(timeout=120)
    return process.returncode, err.splitlines()


def told(lines):
    """The lines of stderr that are no headline, epoch or note of a run that goes on as it should."""
    return [line for line in lines if line.startswith(("shiftconv: ", "Traceback"))]


def notes(lines):
    return [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


def rows(folder):
    """The rows of metrics.jsonl without what is different from run to run."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in _TIMES} for row in found]


def result(folder):
    found = json.loads((Path(folder) / "result.json").read_text())
    for part in ("val", "test"):
        found[part].pop("images_per_second")
    return found


def same_run(one, two):
    """Assert that two runs ended with the very same numbers."""
    assert rows(one) == rows(two)
    assert result(one) == result(two)
    for name in ("last.pt", "best.pt"):
        first, second = ck.load(Path(one) / name), ck.load(Path(two) / name)
        assert first.age == second.age
        for field in fields(ck.Checkpoint):
            if field.name in ("model", "ema", "task", "sparse", "optimizer", "scheduler"):
                _same(getattr(first, field.name), getattr(second, field.name), f"{name}: {field.name}")


def _same(one, two, where):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            _same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two, strict=True)):
            _same(*pair, f"{where}.{number}")
    else:
        assert one == two, where


def alive(program):
    """The processes of a run that are still there."""
    there = []
    for path in program.glob("?.?"):
        try:
            state = Path(f"/proc/{path.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            continue
        there += [path.name] * (state != "Z")
    return there
