"""The verb ``train`` on the command line: resuming, teachers, several processes, Slurm."""

import json
from pathlib import Path

import pytest

from shiftconv.cli import main, training
from shiftconv.train.run import read_config

SMALL = [
    "shiftresnet20_digits", "--epochs", "1", "--batch_size", "256", "--model_args.expansion", "1",
    "--optim.warmup_epochs", "0", "--tensorboard", "false", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    calls = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(training, "launch", lambda *arguments: calls.append(arguments) or 0)
    return calls


def words(line):
    return line.split()


def test_a_teacher_by_its_short_name(monkeypatch):
    seen = []
    monkeypatch.setattr(training, "_start", lambda parsed, recipe, name, argv: seen.append(recipe))
    main(words("train shiftresnet20_digits --teacher slak_small --teacher-checkpoint x.pth --distill.logits nkd"))
    distill = seen[0].distill
    assert [distill.teacher, distill.teacher_checkpoint, distill.logits] == ["slak_small", "x.pth", "nkd"]


def test_gpus_start_the_same_line_again(launched):
    main(words("train shiftresnet20_digits --gpus 2 --epochs 3 --max-restarts=1 --out runs/x"))
    assert launched == [(2, words("train shiftresnet20_digits --epochs 3 --out runs/x"), 1)]


def test_a_launched_process_launches_none(launched, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr("shiftconv.train.loop.train", lambda *arguments, **where: seen.append(where))
    main(words("train shiftresnet20_digits --gpus 2"))
    assert not launched and len(seen) == 1


def test_slurm_writes_and_submits(tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 4711\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    main(words("train shiftresnet20_digits --epochs 3 --slurm --job.nodes 2 --job.gpus=4 --job.partition big"))
    assert "submitted job 4711" in capsys.readouterr().out
    script = (tmp_path / "runs" / "shiftresnet20_digits" / "job.sbatch").read_text()
    assert "--nodes=2" in script and "--gpus-per-node=4" in script and "--partition=big" in script
    run = next(line for line in script.splitlines() if line.startswith("srun"))
    assert "shiftconv train shiftresnet20_digits --epochs 3 --resume auto --out" in run
    assert "--job" not in run and "--slurm" not in run


@pytest.mark.slow
def test_resume_needs_nothing_but_the_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", *SMALL, "--out", "mine"])
    first = json.loads(Path("mine/result.json").read_text())
    Path("mine/result.json").unlink()
    capsys.readouterr()
    main(["train", "--resume", "mine", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "best epoch 1" in out and "test  loss" in out
    again = json.loads(Path("mine/result.json").read_text())
    assert again["test"]["loss"] == first["test"]["loss"]
    assert read_config(Path("mine/config.yaml")).epochs == 1
    assert len(json.loads(Path("mine/environment.json").read_text())) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --resume nowhere", "there is no nowhere; resume takes a run's folder"),
        ("train --resume auto", "train needs the name of a recipe or a YAML file first, or --resume RUN alone"),
        ("train shiftresnet20_digits --gpus 0", "the number of processes must be at least 1, got 0"),
        ("train shiftresnet20_digits --slurm --job.nodes 0", "job.nodes must be at least 1, got 0"),
        ("train shiftresnet20_digits --teacher-checkpoint x", "distill.teacher_checkpoint needs distill.teacher"),
        ("train shiftresnet20_digits --device cpu --distill.logits kdd", "did you mean kd?"),
        ("train shiftresnet20_digits --device cpu --optim.name sdg", "unknown optimiser 'sdg'; did you mean 'sgd'"),
    ],
)
def test_mistakes_are_one_line(line, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHIFTCONV_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(words(line))
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.startswith("shiftconv: error: ") and err.count("\n") == 1
    assert message in err
