import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shiftconv.train import checkpoint as ck
from shiftconv.train import saving
from shiftconv.train.checkpoint import Checkpoint
from shiftconv.train.recipe import Recipe
from shiftconv.train.run import RunFolder
from shiftconv.train.saving import Memory, Writer, needs, snapshot

RECIPE = Recipe(model="net")


def state(epoch, step=0, size=100_000, best_epoch=None, **changes):
    rows = [{"epoch": n + 1, "val_loss": 1.0, "val_accuracy": 0.5} for n in range(epoch)]
    values = dict(
        model_name="net",
        model_args={},
        model={"weight": torch.full((size,), epoch + step / 1000)},
        optimizer={},
        scheduler={},
        scaler={},
        epoch=epoch,
        step=step,
        metrics={"history": rows, "best_epoch": epoch if best_epoch is None else best_epoch},
        recipe=RECIPE.to_dict(),
    )
    return Checkpoint(**(values | changes))


def begin(path):
    folder = RunFolder(path)
    folder.begin(RECIPE, folder.open(RECIPE, None))
    return folder


def ages(folder):
    """Of last, previous and best, all of which must be whole; none: it is not there."""
    found = []
    for path in (folder.last, folder.previous, folder.best):
        found.append(ck.load(path).age if path.exists() else None)
        assert not path.exists() or ck.load(path).model["weight"][-1] == found[-1][0] + found[-1][1] / 1000
    return found


def partials(folder):
    return list(folder.path.glob(".*"))


# Snapshots


def test_a_snapshot_is_equal_and_shares_no_memory():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).sum().backward()
    optimizer.step()
    model = net.state_dict() | {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0, 3)}
    model |= {"last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "mask": torch.ones(7) > 0}
    live = state(1, model=model, optimizer=optimizer.state_dict(), meter={"seen": torch.tensor(3), "losses": [0.5]})
    copy = snapshot(live)
    for key, value in model.items():
        there = copy.model[key]
        assert torch.equal(there, value) and there.dtype == value.dtype and there.stride() == value.stride()
        value.zero_()
        live.metrics["history"].clear()
    assert copy.model["0.weight"].all() and len(copy.metrics["history"]) == 1
    assert copy.optimizer["state"][0]["exp_avg"].shape == (4, 3)
    assert (copy.optimizer["param_groups"], copy.meter["seen"], copy.meter["losses"]) == (
        live.optimizer["param_groups"],
        3,
        [0.5],
    )


def test_a_snapshot_can_be_written_as_the_original(tmp_path):
    shared = torch.arange(10.0)
    live = state(
        1, model={"a": shared, "b": shared, "view": shared[2:5], "e": torch.empty(0), "i": torch.empty(0).int()}
    )
    for number, one in enumerate((live, snapshot(live))):
        ck.save(one, tmp_path / str(number))
    assert abs((tmp_path / "0").stat().st_size - (tmp_path / "1").stat().st_size) < 200
    there = ck.load(tmp_path / "1").model
    assert torch.equal(there["view"], shared[2:5])
    there["a"][2] = 7  # what shares memory, shares it still
    assert there["b"][2] == there["view"][0] == 7


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(2, device="meta"), torch.ones(1) * 1j])
def test_tensors_of_other_kinds_are_refused(tensor):
    with pytest.raises(TypeError, match="a checkpoint must hold"):
        snapshot(state(1, model={"weight": tensor.conj() if tensor.is_complex() else tensor}))


def test_memory_is_used_again(monkeypatch):
    monkeypatch.setattr(saving, "_SLAB", 1000)
    memory = Memory()
    sizes = [10, 0, 999, 3000, 64, 65, 1]
    first = memory.take(sizes)
    assert [len(piece) for piece in first] == [piece.untyped_storage().nbytes() for piece in first] == sizes
    for number, piece in enumerate(first):
        piece.fill_(number)
    assert [set(piece.tolist()) for piece in first] == [{n} if sizes[n] else set() for n in range(len(sizes))]
    second = memory.take(sizes)
    assert [piece.data_ptr() for piece in first] == [piece.data_ptr() for piece in second]
    memory.reserve([5000, 5])  # more, then less
    assert [len(piece) for piece in memory.take([1, 2, 3])] == [1, 2, 3] and len(memory._slabs) == 1


def test_large_tensors_are_copied_in_pieces(monkeypatch):
    monkeypatch.setattr(saving, "_PIECE", 1000)
    generator = torch.Generator().manual_seed(0)
    model = {str(n): torch.rand(n, generator=generator) for n in (0, 1, 249, 250, 251, 5003)}
    copy = snapshot(state(1, model=model))
    assert all(torch.equal(copy.model[key], model[key]) for key in model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_snapshot_of_a_gpu_is_on_the_cpu(tmp_path):
    memory, generator = Memory(), torch.Generator().manual_seed(0)
    model = {str(n): torch.rand(n, generator=generator).cuda() for n in (0, 1, 1000, 10_000_000)}
    for _ in range(2):
        copy = snapshot(state(1, model={**model, "shared": model["1000"][:10], "cpu": torch.ones(3)}), memory)
        model["1"].add_(1)
        assert all(torch.equal(copy.model[key], value.cpu()) for key, value in model.items() if key != "1")
        assert copy.model["shared"].data_ptr() == copy.model["1000"].data_ptr() and copy.model["1000"].is_pinned()
        assert copy.model["1"] == model["1"].cpu() - 1 and copy.model["cpu"].all()
    assert needs(state(1, model=model))[1]
    ck.save(copy, tmp_path / "a.pt")
    assert torch.equal(ck.load(tmp_path / "a.pt").model["1000"], model["1000"].cpu())


def test_needs_are_what_a_snapshot_takes():
    shared = torch.ones(3)
    assert needs(state(1, model={"a": shared, "b": shared}, ema={"a": torch.ones(5)})) == ([12, 20], False)


# The writer


def test_one_job_at_a_time_and_in_turn():
    writer, done, running = Writer(), [], threading.Lock()

    def job(number):
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        done.append(number)
        running.release()

    for number in range(5):
        writer.submit(lambda number=number: job(number))
        assert len(done) >= number
    writer.wait()
    assert done == [0, 1, 2, 3, 4] and not writer.busy


@pytest.mark.parametrize("error", [RuntimeError("broken"), OSError(28, "full"), KeyboardInterrupt()])
def test_an_error_is_handed_over_once(error):
    def job():
        raise error

    writer, done = Writer(), []
    writer.submit(job)
    with pytest.raises(type(error)):
        writer.submit(lambda: done.append(1))
    writer.submit(lambda: done.append(2))
    writer.wait()
    writer.wait()
    assert done == [2]


# Saves


class Slow:
    """Holds the writing of checkpoints until ``go``; counts them."""

    def __init__(self, monkeypatch):
        self.go, self.entered, self.count = threading.Event(), threading.Event(), 0
        self._save = ck.save
        monkeypatch.setattr(ck, "save", self)

    def __call__(self, *arguments, **named):
        self.count += 1
        self.entered.set()
        assert self.go.wait(10)
        self._save(*arguments, **named)


@pytest.fixture
def slow(monkeypatch):
    return Slow(monkeypatch)


def test_training_may_change_the_weights_meanwhile(tmp_path, slow):
    with begin(tmp_path / "run") as folder:
        live = state(1)
        folder.save(live, is_best=True)
        assert slow.entered.wait(10) and not folder.last.exists() and folder.busy
        live.model["weight"].fill_(9)
        assert folder.take_notes() == []
        slow.go.set()
        folder.wait()
        assert ages(folder) == [(1, 0), None, (1, 0)] and not folder.busy
        assert folder.metrics.read_text().count("\n") == 1


def test_a_save_during_a_save_waits_for_it(tmp_path, slow):
    with begin(tmp_path / "run") as folder:
        folder.save(state(1), is_best=True)
        threading.Timer(0.1, slow.go.set).start()
        folder.save(state(1, 7), is_best=False)  # must not overwrite the memory of the first
        assert folder.last.exists()
        folder.save(state(2), is_best=True)
        folder.wait()
        assert ages(folder) == [(2, 0), (1, 7), (2, 0)]


def test_close_during_a_save_waits_for_it(tmp_path, slow):
    folder = begin(tmp_path / "run")
    folder.save(state(1), is_best=True)
    threading.Timer(0.1, slow.go.set).start()
    folder.close()
    assert ages(folder) == [(1, 0), None, (1, 0)]


def test_a_run_that_breaks_off_during_its_first_save_keeps_it(tmp_path, slow):
    with pytest.raises(ZeroDivisionError), begin(tmp_path / "run") as folder:
        folder.save(state(0, 5), is_best=False)
        threading.Timer(0.1, slow.go.set).start()
        raise ZeroDivisionError
    assert ages(folder) == [(0, 5), None, None]


def test_an_error_that_is_not_the_disks_ends_the_run(tmp_path):
    with pytest.raises(TypeError, match="dense"), begin(tmp_path / "a") as folder:
        folder.save(state(1, model={"weight": torch.eye(3).to_sparse()}), is_best=True)
    with pytest.raises(Exception, match="pickle"), begin(tmp_path / "b") as folder:
        folder.save(state(1, scheduler={"f": threading.Lock}), is_best=True)
        folder.save(state(1, scheduler={"f": lambda: 0}), is_best=True)
        folder.wait()
    assert not list(tmp_path.glob("*/.*"))


def test_prepare_takes_the_memory_of_the_save(tmp_path):
    with begin(tmp_path / "run") as folder:
        folder.prepare(state(0, 1))
        folder.save(state(0, 1), is_best=False)
        folder.wait()
        assert ages(folder) == [(0, 1), None, None]


def test_the_step_of_a_small_loop_goes_on_meanwhile(tmp_path):
    """The writer leaves the interpreter to others: no step waits for all of a large file."""
    large = state(1, size=20_000_000)
    with begin(tmp_path / "run") as folder:
        folder.save(large, is_best=True)
        steps, start = 0, time.perf_counter()
        while folder.busy:
            sum(range(1000))
            steps += 1
        assert steps > 50 * (time.perf_counter() - start)


# Disks that take no more


class Full:
    """A disk that is full after so many bytes; -1: it has space."""

    def __init__(self, monkeypatch, error=errno.ENOSPC):
        self.left, self.error, self.path_open = -1, error, Path.open
        monkeypatch.setattr(Path, "open", self.open_of())

    def open_of(self):
        disk = self

        def opened(path, mode="r", *arguments, **named):
            file = disk.path_open(path, mode, *arguments, **named)
            return file if mode != "xb" else Wrapped(file, disk)

        return opened


class Wrapped:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        if 0 <= self.disk.left < len(content):
            self.file.write(memoryview(content)[: self.disk.left])
            raise OSError(self.disk.error, os.strerror(self.disk.error))
        if self.disk.left >= 0:
            self.disk.left -= len(content)
        return self.file.write(content)


@pytest.fixture
def disk(monkeypatch):
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    return Full(monkeypatch)


SIZE = 400_000  # bytes of the tensor


@pytest.mark.parametrize("left", [0, 100, SIZE // 2, SIZE + 500, "best"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_the_old_files_and_the_run_goes_on(tmp_path, disk, left, error):
    disk.error = error
    with begin(tmp_path / "run") as folder:
        folder.save(state(1), is_best=True)
        folder.save(state(2, best_epoch=1), is_best=False)
        folder.wait()
        before = ages(folder)
        assert before == [(2, 0), (1, 0), (1, 0)]
        disk.left = left if left != "best" else int(1.5 * folder.last.stat().st_size)
        folder.save(state(3), is_best=True)
        with pytest.raises(OSError, match="cannot write") as caught:
            folder.wait()
        assert caught.value.errno == error
        assert ages(folder) == (before if left != "best" else [(3, 0), (2, 0), (1, 0)]) and not partials(folder)
        note = f"could not write the checkpoint after epoch 3: cannot write {tmp_path}"
        [told] = folder.take_notes()
        assert told.startswith(note) and told.endswith(
            f"{os.strerror(error)}; the one before is kept and the run goes on"
        )

        folder.save(state(3, 20), is_best=False)  # the disk is full still
        while folder.busy:
            time.sleep(0.01)
        assert "after epoch 3 and 20 updates" in folder.take_notes()[0] and not folder.take_notes()
        disk.left = -1
        folder.save(state(4, best_epoch=3), is_best=False)
        folder.wait()
        assert ages(folder)[0] == (4, 0) and ages(folder)[2] == (3, 0)  # the best one was not lost
        assert folder.metrics.read_text().count("\n") == 4 and not folder.notes


def test_the_end_of_the_block_tells_what_was_not_saved(tmp_path, disk):
    with pytest.raises(OSError, match="No space left"), begin(tmp_path / "run") as folder:
        disk.left = 1000
        folder.save(state(1), is_best=True)
    assert not (tmp_path / "run").exists()


def script(code, *arguments, prefix=(), **named):
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **named)


MOUNTED = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_saving import ages, begin, partials, state

place = Path(sys.argv[1])
folder = begin(place / "run")
folder.save(state(1), is_best=True)
folder.wait()
filler = place / "filler"
filler.write_bytes(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - 200_000))
folder.save(state(2), is_best=True)
try:
    folder.wait()
except OSError as error:
    print(error.errno, ages(folder), partials(folder), folder.take_notes())
filler.unlink()
folder.save(state(3), is_best=True)
folder.close()
print(ages(folder), folder.notes)
"""


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=2m none {disk} && exec "$@"'
    own = ("unshare", "-rm", "sh", "-c", mount, "sh")
    try:
        if subprocess.run([*own, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a small disk")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    done = script(MOUNTED, disk, Path(__file__).parent, prefix=own)
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{errno.ENOSPC} [(1, 0), None, (1, 0)] [] ['could not write"), done.stderr
    assert second == "[(3, 0), (1, 0), (3, 0)] []"


# Power cuts and rot

FORKS = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from shiftconv import files
from shiftconv.train import checkpoint as ck
from test_saving import ages, begin, partials, state

torch.set_num_threads(1)
replace, write = Path.replace, ck._Sink.write


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def torn(sink, content):
    if len(content) > 1000:
        write(sink, content[:200_000])
        sink.file.flush()
        die()
    return write(sink, content)


def dies_at(name):
    def renamed(path, target):
        done = replace(path, target)
        if Path(target).name == name:
            die()
        return done

    return renamed


def killed(path, moment):
    folder = begin(path)
    folder.save(state(1), is_best=True)
    folder.save(state(2, best_epoch=1), is_best=False)
    folder.wait()
    if moment == "writing":
        ck._Sink.write = torn
    elif moment == "before best":
        files.copy = die
    else:
        Path.replace = dies_at(moment)
    folder.save(state(3), is_best=True)
    folder.wait()


def killed_at_random(path, number):
    folder = begin(path)
    folder.save(state(1), is_best=True)
    folder.wait()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.3 * random.Random(number).random())  # ends the process as it is
    for epoch in range(2, 10000):
        folder.save(state(epoch % 50 + 1), is_best=True)


def limited(path):
    endless = resource.RLIM_INFINITY
    folder = begin(path)
    folder.save(state(1), is_best=True)
    folder.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, endless))
    folder.save(state(2), is_best=True)
    try:
        folder.wait()
    except OSError as error:
        print(error.errno, ages(folder), partials(folder), folder.take_notes())
    resource.setrlimit(resource.RLIMIT_FSIZE, (endless, endless))
    folder.save(state(3), is_best=True)
    folder.close()
    print(ages(folder), folder.notes, flush=True)


place = Path(sys.argv[1])
jobs = {moment: (killed, place / moment, moment) for moment in sys.argv[3:]}
jobs |= {str(number): (killed_at_random, place / f"random {number}", number) for number in range(5)}
jobs["limited"] = limited, place / "limited"
for name, (job, *arguments) in jobs.items():
    child = os.fork()
    if child == 0:
        job(*arguments)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if job is limited else -signal.SIGKILL if job is killed else -signal.SIGALRM), (name, status)
"""
MOMENTS = {"writing": (2, 1), "previous.pt": (2, 1), "last.pt": (3, 3), "before best": (3, 3), "best.pt": (3, 3)}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Folders of runs that were killed, by a process that is loaded once, and what it told."""
    if not hasattr(os, "fork"):
        pytest.skip("the system has no fork")
    place = tmp_path_factory.mktemp("forks")
    done = script(FORKS, place, Path(__file__).parent, *MOMENTS)
    assert done.returncode == 0, done.stderr
    return place, done.stdout.splitlines()


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_leaves_whole_files(forks, moment):
    """The moments are those after a file has got its name, in the middle of writing, and before best.pt is copied."""
    epoch, best = MOMENTS[moment]
    with RunFolder(forks[0] / moment) as folder:
        assert bool(partials(folder)) == (moment in ("writing", "previous.pt"))
        start = folder.open(RECIPE, "auto")
        folder.begin(RECIPE, start)
        assert start.age == (epoch, 0) and start.model["weight"][-1] == epoch
        assert folder.restore_best(start) == best and ck.load(folder.best).age == (best, 0)
        assert not folder.notes and not partials(folder)
        assert len(folder.metrics.read_text().splitlines()) == epoch
        folder.save(state(4), is_best=True)
    assert ages(folder) == [(4, 0), (epoch, 0), (4, 0)]


def test_killed_at_any_time(forks):
    for path in forks[0].glob("random *"):
        assert len([age for age in ages(RunFolder(path)) if age]) >= 2


def test_a_limit_of_the_file_size_is_as_a_full_disk(forks):
    first, second = forks[1]
    assert first.startswith(f"{errno.EFBIG} [(1, 0), None, (1, 0)] [] ['could not write the checkpoint after epoch 2")
    assert second == "[(3, 0), (1, 0), (3, 0)] []"


def test_a_flipped_bit_is_found_or_harmless(tmp_path):
    path = tmp_path / "a.pt"
    generator = torch.Generator().manual_seed(0)
    one = state(3, 5, model={"weight": torch.randn(300, generator=generator)}, meter={"loss": torch.tensor(1.5)})
    ck.save(replace(one, ema={"weight": torch.randn(300, generator=generator)}), path)
    content, rng, found = path.read_bytes(), random.Random(1), 0
    there = ck.load(path)
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            now = ck.load(path)
        except ck.CheckpointError:
            found += 1
            continue
        assert torch.equal(now.model["weight"], there.model["weight"]) and now.age == there.age == (3, 5)
        assert torch.equal(now.ema["weight"], there.ema["weight"]) and now.meter == there.meter
    assert found > 50


def test_the_rows_are_those_of_the_checkpoint(tmp_path):
    with begin(tmp_path / "run") as folder:
        folder.save(state(2), is_best=True)
        folder.save(state(2, 9), is_best=False)
        folder.wait()
        rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        assert rows == ck.load(folder.last).metrics["history"]
