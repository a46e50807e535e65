import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shiftconv.train.events import Ended, EpochDone, Note, Started, Step
from shiftconv.train.progress import RichProgress

ROW = {
    "epoch": 1,
    "step": 3,
    "train_loss": 1.5,
    "train_accuracy": 0.25,
    "val_loss": 1.2,
    "val_accuracy": 0.5,
    "lr": 0.1,
    "images_per_second": 1234.0,
    "seconds": 2.0,
}


def show(recipe, terminal):
    out = io.StringIO()
    progress = RichProgress(Console(file=out, force_terminal=terminal, width=150, highlight=False))
    progress(Started(recipe, Path("runs/a"), "cpu", 34906, 100, 10, 20, 0))
    progress(Step("train", 1, 2, 3, 1.75, 0.2, 1000.0))
    progress(Note("[bold] is no markup"))
    progress(EpochDone(ROW, 12, True))
    progress(Ended())
    return out.getvalue()


def test_plain_lines(recipe):
    lines = show(recipe, terminal=False).splitlines()
    assert len(lines) == 3
    assert "shiftresnet20 expansion=1 (34,906 parameters) on folder: 100 train, 10 val, 20 test images" in lines[0]
    assert lines[1] == "note: [bold] is no markup"
    assert lines[2].startswith("epoch  1/12  train 1.5000  25.00%  val 1.2000  50.00%")
    assert lines[2].endswith("1,234 images/s  2.0 s  best")


def test_bar_shows_loss_accuracy_and_speed(recipe):
    text = show(recipe, terminal=True)
    assert "loss 1.7500  20.00%  1,000 images/s" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_ended_without_a_start(terminal):
    RichProgress(Console(file=io.StringIO(), force_terminal=terminal))(Ended(ValueError("x")))


def test_one_epoch(recipe):
    out = io.StringIO()
    RichProgress(Console(file=out))(Started(replace(recipe, epochs=1), Path("runs/a"), "cpu", 1, 1, 1, 1, 0))
    assert "; 1 epoch on cpu" in " ".join(out.getvalue().split())
