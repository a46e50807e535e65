"""Folders of runs as ``train`` leaves them, made in an instant."""

import json

import torch
import yaml

from shiftconv.models import create_model
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data

ROWS = [
    {"epoch": epoch, "step": 3 * epoch, "train_loss": 2.0 / epoch, "val_loss": 1.0, "val_accuracy": accuracy}
    for epoch, accuracy in ((1, 0.5), (2, 0.75), (3, 0.75))
]


def make_run(folder, rows=ROWS, result=None, **recipe):
    """A run's folder as ``train`` leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    written = Recipe(**{"model": "shiftresnet20", "epochs": 3, "data": Data(image_size=16), **recipe})
    (folder / "config.yaml").write_text(yaml.safe_dump(written.to_dict()))
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def save_weights(folder, name="best.pt", keep=1.0, model="shiftresnet20"):
    """Weights of an untrained network; of the first matrix only the share ``keep`` is not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_model(model, num_classes=10, expansion=1)
    weight = next(value for value in network.parameters() if value.ndim == 4)
    with torch.no_grad():
        weight.view(-1)[round(keep * weight.numel()) :] = 0
    torch.save({"model": network.state_dict()}, folder / name)
    return network
