"""Runs of several processes on this machine, over gloo, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from shiftconv.train import checkpoint as ck

# A run in float64, for in float32 rounding grows by the square of the batch norms from update to update.
SCRIPT = """
import json, sys, warnings

import torch

torch.set_num_threads(1)
if sys.argv[3] == "float64":
    torch.set_default_dtype(torch.float64)
from shiftconv.train.device import Compute
from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe

move = Compute.move


def widened(self, values):
    values = move(self, values)
    return values.to(torch.get_default_dtype()) if torch.is_tensor(values) and values.is_floating_point() else values


Compute.move = widened
train(Recipe.from_dict(json.loads(sys.argv[1])), sys.argv[2], resume=sys.argv[4] or None, device="cpu")
"""


def run(recipe, out, world, dtype="float64", resume=""):
    """Train in ``world`` processes; gives the folder."""
    arguments = [json.dumps(recipe.to_dict()), str(out), dtype, resume]
    launched = start(arguments, world)
    output, _ = launched.communicate(timeout=240)
    assert launched.returncode == 0, output
    return Path(out)


def start(arguments, world, script=SCRIPT):
    """Processes under torchrun that run a script, which lies beside the run's folder."""
    out = Path(arguments[1])
    path = out.parent / f"{out.name}.py"
    path.write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*torchrun, f"--nproc-per-node={world}", "--local-addr=localhost"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def distance(one, two):
    """The largest difference between the weights of two runs' last checkpoints."""
    one, two = ck.load(Path(one) / "last.pt"), ck.load(Path(two) / "last.pt")
    pairs = [(one.model, two.model), (one.ema, two.ema)]
    return max(float((a[key] - b[key]).abs().max()) for a, b in pairs for key in a if a[key].is_floating_point())
