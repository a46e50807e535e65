"""Trackers, each a small module with the signatures of the real one's calls (wandb 0.31, mlflow 3.18, trackio 0.43)."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from shiftconv.train.loggers import open_loggers, tagged

ROW = {"epoch": 3, "step": 30, "train_loss": 0.5, "val_accuracy": 0.75, "lr": 0.1, "note": "x", "best": True}
TAGS = {"loss/train": 0.5, "accuracy/val": 0.75, "run/lr": 0.1}
CONFIG = {"model": "m", "optim": {"lr": 0.1, "betas": [0.9, 0.99]}}


class Wandb(ModuleType):
    def __init__(self, calls):
        super().__init__("wandb")
        self.calls = calls

    def init(
        self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, resume=None
    ):
        self.calls.append(("init", dict(project=project, dir=dir, id=id, name=name, config=config, resume=resume)))
        return self

    def log(self, data, step=None, commit=None):
        self.calls.append(("log", data, step))

    def finish(self, exit_code=None):
        self.calls.append(("finish", exit_code))


class Mlflow(ModuleType):
    def __init__(self, calls):
        super().__init__("mlflow")
        self.calls = calls

    def set_experiment(self, experiment_name=None, experiment_id=None, trace_location=None):
        self.calls.append(("set_experiment", experiment_name))

    def start_run(self, run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None, tags=None):
        self.calls.append(("start_run", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

    def log_params(self, params, synchronous=None, run_id=None):
        assert len(params) <= 100
        self.calls.append(("log_params", params))

    def log_metrics(self, metrics, step=None, synchronous=None, run_id=None, timestamp=None, model_id=None):
        self.calls.append(("log_metrics", metrics, step))

    def end_run(self, status="FINISHED"):
        self.calls.append(("end_run", status))


class Trackio(ModuleType):
    def __init__(self, calls):
        super().__init__("trackio")
        self.calls = calls

    def init(self, project, name=None, group=None, space_id=None, server_url=None, config=None, resume="never"):
        self.calls.append(("init", project, name, config, resume))

    def log(self, metrics, step=None):
        self.calls.append(("log", metrics, step))

    def finish(self):
        self.calls.append(("finish",))


KINDS = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


@pytest.fixture
def calls(monkeypatch):
    """What each tracker was called with; a fresh list for each name."""
    made = {name: [] for name in KINDS}
    for name, kind in KINDS.items():
        monkeypatch.setitem(sys.modules, name, kind(made[name]))
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return made


def opened(folder, *names, finished=0, config=CONFIG):
    return open_loggers(names, folder=folder, run_name="sw", config=config, finished=finished)


def ids(folder):
    return json.loads((folder / "loggers.json").read_text())


def test_wandb(calls, tmp_path):
    loggers = opened(tmp_path, "wandb")
    assert loggers.add(ROW) == [] == loggers.close()
    known = ids(tmp_path)["wandb"]
    assert calls["wandb"] == [
        ("init", dict(project="shiftconv", dir=str(tmp_path), id=known, name="sw", config=CONFIG, resume="allow")),
        ("log", TAGS, 3),
        ("finish", 0),
    ]
    assert opened(tmp_path, "wandb", finished=3).close(failed=True) == []
    assert calls["wandb"][3][1]["id"] == known and calls["wandb"][4] == ("finish", 1)


def test_mlflow(calls, tmp_path):
    loggers = opened(tmp_path, "mlflow")
    assert loggers.add(ROW) == [] == loggers.close()
    assert calls["mlflow"] == [
        ("set_experiment", "shiftconv"),
        ("start_run", None, "sw"),
        ("log_params", {"model": "m", "optim.lr": 0.1, "optim.betas": [0.9, 0.99]}),
        ("log_metrics", TAGS, 3),
        ("end_run", "FINISHED"),
    ]
    calls["mlflow"].clear()
    opened(tmp_path, "mlflow", finished=3).close(failed=True)
    assert calls["mlflow"] == [("start_run", "m1", None), ("end_run", "FAILED")]


def test_trackio(calls, tmp_path):
    loggers = opened(tmp_path, "trackio")
    assert loggers.add(ROW) == [] == loggers.close()
    name = ids(tmp_path)["trackio"]
    assert name.startswith("sw-") and len(name) == 9
    assert calls["trackio"] == [("init", "shiftconv", name, CONFIG, "never"), ("log", TAGS, 3), ("finish",)]
    opened(tmp_path, "trackio", finished=3).close()
    assert calls["trackio"][3] == ("init", "shiftconv", name, CONFIG, "allow")


def test_a_new_run_in_an_old_folder_is_a_new_logged_run(calls, tmp_path):
    opened(tmp_path, "wandb", "trackio").close()
    before = ids(tmp_path)
    opened(tmp_path, "wandb", "trackio").close()
    assert all(ids(tmp_path)[name] != before[name] for name in before)


def test_a_logger_that_comes_later_begins_and_the_others_stay_known(calls, tmp_path):
    opened(tmp_path, "wandb").close()
    before = ids(tmp_path)
    opened(tmp_path, "mlflow", finished=2).close()
    assert ids(tmp_path) == before | {"mlflow": "m1"}
    assert calls["mlflow"][1] == ("start_run", None, "sw")


def test_a_damaged_list_of_ids_begins_anew(calls, tmp_path):
    (tmp_path / "loggers.json").write_text("{")
    opened(tmp_path, "mlflow", finished=2).close()
    assert ids(tmp_path) == {"mlflow": "m1"}


def test_the_environment_names_the_project(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    opened(tmp_path, "wandb", "mlflow").close()
    assert calls["wandb"][0][1]["project"] == "mine" and calls["mlflow"][0][0] == "start_run"


def test_mlflow_takes_many_settings_in_parts(calls, tmp_path):
    opened(tmp_path, "mlflow", config={f"a{i}": i for i in range(250)}).close()
    assert [len(call[1]) for call in calls["mlflow"] if call[0] == "log_params"] == [100, 100, 50]


def test_a_missing_package_is_told_before_anything_begins(calls, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ModuleNotFoundError, match="the logger trackio needs its package: pip install trackio"):
        opened(tmp_path, "wandb", "trackio")
    assert calls["wandb"] == [] and not list(tmp_path.iterdir())


def test_a_logger_that_cannot_begin_is_told_and_the_others_end(calls, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no\nkey")

    monkeypatch.setattr(Trackio, "init", refuse)
    with pytest.raises(RuntimeError, match=r"^the logger trackio cannot begin: no key$"):
        opened(tmp_path, "wandb", "trackio")
    assert calls["wandb"][-1] == ("finish", 1) and not list(tmp_path.iterdir())


def test_a_logger_that_fails_is_given_up_and_the_run_goes_on(calls, tmp_path, monkeypatch):
    def broken(self, metrics, step=None):
        raise ConnectionError("the network\nis gone")

    loggers = opened(tmp_path, "trackio", "wandb")
    monkeypatch.setattr(Trackio, "log", broken)
    assert loggers.add(ROW) == ["trackio takes no more rows: the network is gone"]
    assert loggers.add(ROW) == [] == loggers.close() == loggers.close()
    assert [call[0] for call in calls["wandb"]] == ["init", "log", "log", "finish"]
    assert [call[0] for call in calls["trackio"]] == ["init"]


def test_no_loggers_leave_nothing(tmp_path):
    loggers = opened(tmp_path)
    assert loggers.add(ROW) == [] == loggers.close() and not list(tmp_path.iterdir())


def test_an_unknown_logger_is_told(tmp_path):
    with pytest.raises(ValueError, match="unknown logger 'wanb'; did you mean 'wandb'"):
        opened(tmp_path, "wanb")


def test_rows_become_tags():
    assert tagged(ROW) == TAGS
