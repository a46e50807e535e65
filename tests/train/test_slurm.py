"""Jobs of Slurm, with a Slurm of three small shell scripts."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from shiftconv.train.launch import STOPPED
from shiftconv.train.slurm import Job, script, submit


def program(folder, name, body):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of programs on PATH that note how they were called in ``calls``."""
    folder = tmp_path / "bin"
    calls = tmp_path / "calls"
    log = f'{{ printf "%s" "$(basename "$0")"; printf " <%s>" "$@"; echo; }} >> "{calls}"'
    program(folder, "sbatch", f"{log}\necho '4711;cluster'")
    program(folder, "srun", f"{log}\nexit ${{STATUS:-0}}")
    program(folder, "scontrol", log)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def directives(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def run(path, status):
    env = os.environ | {"STATUS": str(status), "SLURM_JOB_ID": "4711"}
    return subprocess.run(["bash", path], env=env, capture_output=True, text=True, timeout=10, check=False)


@pytest.mark.parametrize("status", [0, 1, 2, STOPPED, 137])
def test_a_stopped_run_alone_is_queued_again(slurm, status):
    assert submit(Job(), ["train", "r"], slurm / "run") == "4711"
    (slurm / "calls").unlink()
    done = run(slurm / "run" / "job.sbatch", status)
    assert (done.returncode, done.stderr) == (status, "")
    calls = (slurm / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["srun"] + ["scontrol"] * (status == STOPPED)
    assert status != STOPPED or calls[1] == "scontrol <requeue> <4711>"


def test_arguments_and_folders_with_spaces_arrive_whole(slurm):
    out = slurm / "my run 100%"
    submit(Job(gpus=4, cpus_per_gpu=6), ["train", "it's", "--model_args={'a': $b}"], out)
    assert (slurm / "calls").read_text() == f"sbatch <--parsable> <{out}/job.sbatch>\n"
    (slurm / "calls").unlink()
    run(out / "job.sbatch", 0)
    options = f"<--cpus-per-task=6> <--kill-on-bad-exit=0> <{sys.executable}> <-m> <shiftconv>"
    rest = f"<train> <it's> <--model_args={{'a': $b}}> <--resume> <auto> <--out> <{out}>"
    assert (slurm / "calls").read_text() == f"srun {options} {rest}\n"
    lines = directives((out / "job.sbatch").read_text())
    assert f'--output="{slurm}/my run 100%%/slurm-%j.out"' in lines and '--job-name="my run 100%"' in lines


def test_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job(2, 4, 0.75, "gpu", "me", "long", 3, ("--constraint=a100",), "source env/bin/activate\n")
    text = script(job, ["train", "r"], "run")
    assert directives(text) == [
        "--job-name=run",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=3",
        "--time=0:45:00",
        "--partition=gpu",
        "--account=me",
        "--qos=long",
        f"--chdir={tmp_path}",
        f"--output={tmp_path}/run/slurm-%j.out",
        "--open-mode=append",
        "--signal=USR1@120",
        "--requeue",
        "--constraint=a100",
    ]
    first, *rest = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert first == "source env/bin/activate" and rest[1].startswith("srun --cpus-per-task=3")
    assert " python -m shiftconv train r --resume auto --out " in rest[1]
    plain = directives(script(Job(hours=30.0001), [], "run"))
    assert "--time=30:00:01" in plain and not any(line.startswith(("--partition", "--qos")) for line in plain)


def test_a_machine_without_sbatch_says_where_the_script_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no sbatch; the job is in .*run/job\.sbatch"):
        submit(Job(), ["train", "r"], tmp_path / "run")
    assert (tmp_path / "run" / "job.sbatch").read_text().startswith("#!/bin/bash\n#SBATCH ")


def test_a_refusal_of_sbatch_is_told(slurm):
    program(slurm / "bin", "sbatch", "echo 'sbatch: error: invalid\npartition' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"refused .*job\.sbatch: sbatch: error: invalid partition$"):
        submit(Job(), ["train", "r"], slurm / "run")


@pytest.mark.parametrize("argument", ["--out", "--out=x", "--resume", "--resume=auto"])
def test_what_the_script_gives_itself_cannot_be_given(argument):
    with pytest.raises(ValueError, match=r"leave .* out"):
        script(Job(), ["train", "r", argument], "run")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"nodes": 0}, ValueError),
        ({"gpus": "8"}, TypeError),
        ({"hours": 0.03}, ValueError),
        ({"partition": "a b"}, ValueError),
        ({"account": 3}, TypeError),
        ({"extra": "--x"}, TypeError),
        ({"extra": ["x"]}, ValueError),
        ({"extra": ["--a\n#SBATCH --b"]}, ValueError),
        ({"setup": 1}, TypeError),
    ],
)
def test_a_job_is_checked(wrong, error):
    with pytest.raises(error, match=r"job\."):
        replace(Job(), **wrong)


def test_a_list_of_options_from_yaml_becomes_a_tuple():
    assert Job(extra=["--exclusive"]).extra == ("--exclusive",)  # pyright: ignore[reportArgumentType]


def test_a_folder_that_sbatch_cannot_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        script(Job(), [], tmp_path / 'a"b')
