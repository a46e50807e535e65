import json

import pytest

from shiftconv.analysis import Count
from shiftconv.train import report_facts as facts
from shiftconv.train.record import read
from shiftconv.train.settings import Optim, Sparsity
from shiftconv.train.trained import Trained

from .run_folders import ROWS, make_run


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (float("nan"), "-")],
)
def test_durations(seconds, text):
    assert facts.duration(seconds) == text


def test_numbers_as_text():
    assert [facts.short(n) for n in (0, 95_642, 30.2e6, 4.51e9)] == ["0", "95,642", "30.2 M", "4.51 G"]
    assert facts.value("ema_accuracy", 0.98765) == "98.77%"
    assert facts.value("val_miou", 0.98765) == "0.9877"
    assert [facts.title(key) for key in ("lr", "val_miou", "task_loss")] == [
        "learning rate",
        "validation miou",
        "task loss",
    ]


def rows_of(*records, trained=None):
    rows = facts.numbers(records, trained or [Trained()] * len(records))
    return {name: cells for name, *cells in rows}


def test_the_numbers_of_runs_beside_each_other(tmp_path):
    more = [row | {"images_per_second": 10 * row["epoch"], "seconds": 40, "ema_accuracy": 0.1} for row in ROWS]
    result = {"best_epoch": 3, "test": {"top1": 0.7, "loss": 1, "miou": 0.5}}
    args = {"expansion": 3, "reduction": 1}
    first = read(make_run(tmp_path / "a", rows=more, result=result, model_args=args, sparse=Sparsity(density=0.5)))
    second = read(make_run(tmp_path / "b", rows=ROWS[:1], model_args=args | {"expansion": 9}))
    counts = [Trained(Count("x", (3, 8, 8), 1000, 600, 5000, 4000, 1, ())), Trained()]
    assert rows_of(first, second, trained=counts) == {
        "network": ["shiftresnet20 expansion=3", "shiftresnet20 expansion=9"],
        "state": ["finished", "running or stopped at epoch 1, step 3"],
        "epochs": ["3 of 3", "1 of 3"],
        "best epoch": ["3", "1"],
        "validation accuracy": ["75.00% (epoch 2)", "50.00%"],
        "averaged weights' accuracy": ["10.00% (epoch 1)", "-"],
        "test accuracy": ["70.00%", "-"],
        "test miou": ["0.5", "-"],
        "last training loss": ["0.6667", "2"],
        "last validation loss": ["1", "1"],
        "images per second": ["20", "-"],
        "time": ["2 min 00 s", "-"],
        "parameters": ["1,000", "-"],
        "parameters not 0": ["600", "-"],
        "MACs": ["5,000", "-"],
        "MACs not by 0": ["4,000", "-"],
        "density": ["-", "1"],
    }
    assert facts.network(first, [first]) == "shiftresnet20 expansion=3 reduction=1"


def test_a_dense_network_has_no_rows_about_zeros_and_a_new_run_none_about_results(tmp_path):
    record = read(make_run(tmp_path / "a", rows=None))
    assert set(rows_of(record)) == {"network", "state", "epochs"}
    dense = [Trained(Count("x", (3, 8, 8), 1000, 1000, 5000, 5000, 1, ()))]
    assert set(rows_of(record, trained=dense)) == {"network", "state", "epochs", "parameters", "MACs"}


def test_one_run_in_one_line(tmp_path):
    record = read(make_run(tmp_path / "a", result={"test": {"top1": 0.5}}))
    assert facts.summary(record) == (
        "shiftresnet20, 3 of 3 epochs, finished, validation accuracy 75.00%, test accuracy 50.00%"
    )


def test_settings_that_differ_and_those_that_are_shared(tmp_path):
    first = read(make_run(tmp_path / "a", optim=Optim(lr=0.1), model_args={"expansion": 3}))
    second = read(make_run(tmp_path / "b", optim=Optim(lr=0.05), tensorboard=False))
    third = read(make_run(tmp_path / "c", optim=Optim(lr=0.1), seed=3, model_args={"expansion": 3}))
    assert facts.different([first, first]) == []
    assert facts.different([first, second, third]) == ["model_args.expansion", "optim.lr", "seed"]
    assert [facts.setting(run, "model_args.expansion") for run in (first, second)] == ["3", "-"]
    assert facts.setting(first, "optim.betas") == "none"
    assert facts.setting(first, "data.augment") == "true"
    assert facts.shared([first, second, third]) == (
        "data digits, 3 epochs, batch size 128, sgd, cosine schedule, weight decay 0.0005."
    )


def test_what_a_single_run_changes_of_the_defaults(tmp_path):
    assert facts.changed(read(make_run(tmp_path / "a", optim=Optim(milestones=(2, 3), schedule="step")))) == [
        ["data.image_size", "none", "16"],
        ["epochs", "100", "3"],
        ["optim.schedule", "cosine", "step"],
        ["optim.milestones", "none", "2, 3"],
    ]


def test_where_runs_ran(tmp_path):
    git = {"commit": "0123456789abcdef", "branch": "main", "dirty": True}
    starts = [{"torch": str(n), "device": "cpu", "git": git, "machine": {"cores": 2}} for n in (1, 2, 3)]
    record, other = read(make_run(tmp_path / "a")), read(make_run(tmp_path / "b"))
    assert facts.environment([record]) == []
    (tmp_path / "a" / "environment.json").write_text(json.dumps(starts))
    record = read(tmp_path / "a")
    assert facts.environment([record, other]) == [
        ["starts", "3", "-"],
        ["torch", "1 → ... → 3", "-"],
        ["device", "cpu", "-"],
        ["git", "0123456789 on main, with changes not committed", "-"],
        ["machine", "cores 2", "-"],
    ]
