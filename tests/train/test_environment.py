import json
import os
import subprocess
import sys

import pytest
import torch

from shiftconv._version import __version__
from shiftconv.train import environment as module
from shiftconv.train.environment import environment
from shiftconv.train.ranks import Ranks

CPU = torch.device("cpu")


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=trunk"]
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", *who, *arguments], cwd=folder, env=env, check=True, capture_output=True)


def test_versions_and_machine_are_plain_values(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shiftconv", "train", "a b"])
    facts = environment(Ranks(1, 4, 1, restarts=2), CPU)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["shiftconv"], facts["torch"]) == (__version__, str(torch.__version__))
    assert (facts["processes"], facts["restarts"], facts["threads"]) == (4, 2, torch.get_num_threads())
    assert facts["command"] == "shiftconv train 'a b'"
    assert facts["device"]["kind"] == "cpu" and facts["cores"] >= 1 and facts["time"].endswith("+00:00")


def test_the_state_of_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment(Ranks(), CPU)["git"] is None
    git(tmp_path, "init")
    assert environment(Ranks(), CPU)["git"] is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    clean = environment(Ranks(), CPU)["git"]
    assert len(clean["commit"]) == 40 and clean["branch"] == "trunk" and clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert environment(Ranks(), CPU)["git"] == clean | {"dirty": True}


def test_it_never_fails(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(module.subprocess, "run", broken)
    monkeypatch.setattr(module.platform, "machine", broken)
    facts = environment(Ranks(), torch.device("cuda", 99))
    assert facts["git"] is None and facts["machine"] is None and facts["device"] is None


def test_a_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 20\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "_GIT_S", 0.2)
    assert environment(Ranks(), CPU)["git"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named():
    assert environment(Ranks(), torch.device("cuda"))["device"]["name"]
