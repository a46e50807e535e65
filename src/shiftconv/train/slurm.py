"""A run as a job of Slurm that is put back into the queue until it has ended. Imports no torch."""

import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shiftconv import files
from shiftconv.train.checks import integer, number, optional, text
from shiftconv.train.endings import STOPPED

WARNING_S = 120  # before its time is up a run is told, and has so long to write a checkpoint
_OURS = ("--resume", "--out")


@dataclass(frozen=True)
class Job:
    """What a run asks Slurm for.

    Attributes:
        nodes: Machines.
        gpus: GPUs of each machine; each has one process.
        hours: Longest time until the run is stopped and queued again, to go on.
        partition: Where to queue; none: Slurm's default.
        account: Who pays; none: Slurm's default.
        qos: Quality of service; none: Slurm's default.
        cpus_per_gpu: Cores of each process.
        extra: Further options of sbatch, such as --constraint=a100.
        setup: Shell lines before the run, such as those that activate an environment; none: this process's Python runs.
    """

    nodes: int = 1
    gpus: int = 8
    hours: float = 24.0
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_gpu: int = 8
    extra: tuple[str, ...] = ()
    setup: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus", "cpus_per_gpu"):
            integer(f"job.{name}", getattr(self, name), 1)
        number("job.hours", self.hours, above=WARNING_S / 3600)
        if isinstance(self.extra, str):
            raise TypeError(f"job.extra must be a list of options of sbatch, got {self.extra!r}")
        object.__setattr__(self, "extra", tuple(self.extra))  # YAML has lists only
        for name in ("partition", "account", "qos"):
            optional(_word, f"job.{name}", getattr(self, name))
        for option in self.extra:
            text("job.extra", option)
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"job.extra must hold options of sbatch such as --constraint=a100, got {option!r}")
        optional(text, "job.setup", self.setup)


def _word(name: str, value: object) -> None:
    text(name, value)
    if not value or any(c.isspace() for c in str(value)):
        raise ValueError(f"{name} must be one word, got {value!r}")


def script(job: Job, arguments: Sequence[str], out: str | Path) -> str:
    """The job's script: one process on each GPU, warned by SIGUSR1, queued again when it ends with status STOPPED.

    Args:
        job: what to ask for.
        arguments: what follows ``shiftconv`` on the command line, without --resume and --out.
        out: the run's folder; the job begins in the current one.

    Raises:
        ValueError: for arguments that the script gives itself, and folders that sbatch cannot read.
    """
    for argument in arguments:
        if argument.partition("=")[0] in _OURS:
            raise ValueError(f"a job resumes by itself in the folder out; leave {argument!r} out of its arguments")
    folder = Path(out).absolute()
    options = {
        "job-name": _option(folder.name),
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus,
        "gpus-per-node": job.gpus,
        "cpus-per-task": job.cpus_per_gpu,
        "time": _time(job.hours),
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "chdir": _option(str(Path.cwd())),
        "output": _option(str(folder).replace("%", "%%") + "/slurm-%j.out"),
        "open-mode": "append",
        "signal": f"USR1@{WARNING_S}",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    python = shlex.quote(sys.executable) if job.setup is None else "python"
    run = shlex.join([*arguments, "--resume", "auto", "--out", str(folder)])
    # A process that ends first must not get the others killed, for one may be writing; they notice a lost one.
    srun = f"srun --cpus-per-task={job.cpus_per_gpu} --kill-on-bad-exit=0"
    return "\n".join([
        "#!/bin/bash",
        *(f"#SBATCH {line}" for line in (*lines, "--requeue", *job.extra)),
        "",
        *([job.setup.rstrip("\n")] if job.setup else []),
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{job.cpus_per_gpu}}}"',
        f"{srun} {python} -m shiftconv {run}",
        "status=$?",
        f"if [ $status -eq {STOPPED} ]; then  # stopped in time, and can go on",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $status",
        "",
    ])  # fmt: skip


def _time(hours: float) -> str:
    seconds = math.ceil(hours * 3600)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _option(value: str) -> str:
    """A value as sbatch reads it from a script: in quotes if it holds spaces."""
    if any(c in value for c in "\n\"'\\#"):
        raise ValueError(f"sbatch cannot read a folder with quotes, # or a backslash in its name, got {value!r}")
    return f'"{value}"' if any(c.isspace() for c in value) else value


def submit(job: Job, arguments: Sequence[str], out: str | Path) -> str:
    """Write the script to ``job.sbatch`` in the run's folder and queue it.

    Args:
        job: what to ask for.
        arguments: what follows ``shiftconv`` on the command line, without --resume and --out.
        out: the run's folder; made if it is not there.

    Returns:
        The job's number.

    Raises:
        FileNotFoundError: if this machine has no sbatch; the script is there.
        RuntimeError: if sbatch refuses it; the script is there.
        ValueError: for arguments that the script gives itself, and folders that sbatch cannot read.
    """
    content = script(job, arguments, out)
    path = Path(out) / "job.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)  # Slurm writes there, and makes no folder
    files.write(path, content.encode())
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise FileNotFoundError(f"this machine has no sbatch; the job is in {path}: run sbatch {path} where Slurm is")
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise RuntimeError(f"sbatch refused {path}: {reason}")
    return done.stdout.strip().partition(";")[0]  # number;cluster
