"""The demo: the whole of it once, for one epoch; its folder in every state; its errors."""

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shiftconv.recipes import demo as module
from shiftconv.recipes import demo_folder
from shiftconv.recipes.demo import NETWORKS, DemoResult, Network, demo
from shiftconv.recipes.demo_folder import FILES, OLD, RUNS, WORK, replacing


def fill(folder: Path, text: str) -> None:
    """What a finished demo leaves, with ``text`` to tell it from others."""
    for name in RUNS:
        (folder / name).mkdir()
        (folder / name / "best.pt").write_text(text)
    for name in FILES:
        (folder / name).write_text(json.dumps({"format": demo_folder.FORMAT, "text": text}))


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def made(folder: Path, text: str) -> dict[str, str]:
    with replacing(folder) as work:
        fill(work, text)
    return content(folder)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    import torch

    from shiftconv.models import create_model
    from shiftconv.train import checkpoint
    from shiftconv.train.data import open_data
    from shiftconv.train.evaluation import evaluate
    from shiftconv.train.events import EpochDone

    threads, events = torch.get_num_threads(), []
    out = tmp_path / "a demo"
    result = demo(out, seed=3, epochs=1, progress=events.append)
    assert sorted(path.name for path in out.iterdir()) == sorted((*RUNS, *FILES))
    assert torch.get_num_threads() == threads
    assert len([event for event in events if isinstance(event, EpochDone)]) == 1
    saved = json.loads((out / "results.json").read_text())
    assert saved["seed"] == 3
    assert [Network(**values) for values in saved["networks"]] == list(result.networks)
    assert [(n.name, n.parameters, n.macs) for n in result.networks] == [
        ("shiftresnet20", 95642, 16433792),
        ("resnet20", 96206, 14049920),
    ]
    for network in result.networks:
        best = checkpoint.load(out / network.name / "best.pt")
        model = create_model(best.model_name, **best.model_args)
        model.load_state_dict(best.model)
        data = open_data("digits")
        assert evaluate(model, data.loader("test", 256)).top1 == pytest.approx(network.accuracy)
        assert best.recipe["seed"] == 3
    for name in ("curves.png", "receptive_field.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 16
    assert "95,642" in page
    assert f"{result.networks[0].accuracy:.2%}" in page
    assert "shiftconv eval --checkpoint &#x27;" in page  # the path has a space


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    new = made(tmp_path / "deep" / "er", "first")
    assert sorted(new) == sorted((*FILES, *(f"{run}/best.pt" for run in RUNS)))


def test_an_earlier_demo_is_replaced(tmp_path):
    first = made(tmp_path, "first")
    second = made(tmp_path, "second")
    assert second.keys() == first.keys()
    assert all("second" in text for text in second.values())


def test_a_failure_leaves_the_earlier_demo_and_nothing_else(tmp_path):
    first = made(tmp_path, "first")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path) as work:
        fill(work, "second")
        raise KeyboardInterrupt
    assert content(tmp_path) == first
    assert not (tmp_path / WORK).exists()
    with pytest.raises(FileNotFoundError), replacing(tmp_path):
        pass  # an incomplete demo is never put in place
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()


def test_goes_on_from_wherever_an_earlier_demo_was_killed(tmp_path):
    (tmp_path / WORK / "shiftresnet20").mkdir(parents=True)
    first = made(tmp_path, "first")
    for moved in range(len((*RUNS, *FILES)) + 1):
        work, old = tmp_path / WORK, tmp_path / OLD
        work.mkdir()
        old.mkdir()
        fill(work, "second")
        for name in (*RUNS, *FILES):
            (tmp_path / name).rename(old / name)
        for name in (*RUNS, *FILES)[:moved]:
            (work / name).rename(tmp_path / name)
        with pytest.raises(ZeroDivisionError), replacing(tmp_path):
            raise ZeroDivisionError
        assert content(tmp_path) == first
    assert all("third" in text for text in made(tmp_path, "third").values())


def test_anything_else_than_a_demo_is_refused_and_untouched(tmp_path):
    made(tmp_path, "first")
    (tmp_path / "thesis.txt").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=r"something else than a demo \(thesis.txt\); take another folder"):
        demo(tmp_path)
    assert content(tmp_path) == before
    (tmp_path / "other" / "resnet20").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds no complete demo"):
        demo(tmp_path / "other")
    (tmp_path / "other" / "results.json").write_text("[]")
    with pytest.raises(FileExistsError, match="holds no complete demo"):
        demo(tmp_path / "other")
    with pytest.raises(NotADirectoryError, match=r"thesis.txt is a file"):
        demo(tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    ("gone", "names"),
    [({"matplotlib"}, "matplotlib"), ({"matplotlib", "sklearn"}, "matplotlib and scikit-learn")],
)
def test_missing_extras_are_one_clear_error(tmp_path, monkeypatch, gone, names):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in gone else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=rf'^the demo needs {names}: pip install "shiftconv\[demo\]"$'):
        demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(epochs=0), ValueError, "epochs must be at least 1, got 0"),
        (dict(epochs=-2), ValueError, "epochs must be at least 1, got -2"),
        (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (dict(seed="x"), TypeError, "seed must be a whole number"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        demo(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def beside(monkeypatch, code: str) -> list[subprocess.Popen[str]]:
    """Let the network beside the first be this Python program."""
    started = []

    def start(plan, folder):
        started.append(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True))
        return started[-1]

    monkeypatch.setattr(module, "_start", start)
    return started


def test_a_failure_beside_is_told(tmp_path, monkeypatch):
    beside(monkeypatch, "import sys; sys.exit('the disk is full')")
    monkeypatch.setattr("shiftconv.train.loop.train", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match=r"^training resnet20 failed: the disk is full$"):
        demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_process_survives_a_failure_here(tmp_path, monkeypatch):
    started = beside(monkeypatch, "import time; time.sleep(60)")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shiftconv.train.loop.train", fail)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "new")
    assert [process.returncode for process in started] == [-9]


def test_prints_a_table_and_what_comes_next(tmp_path):
    from rich.console import Console

    networks = tuple(Network(name, "r", 0.9876, 95642, 16433792, 1234.5, 1.5, 8, 7, 30.0, 9) for name in NETWORKS)
    result = DemoResult(tmp_path / "my demo", networks, 0, 71.6)
    console = Console(width=100, file=io.StringIO())
    console.print(result.table())
    text = console.file.getvalue()
    for expected in ("98.76%", "95,642", "16,433,792", "1,234", "1.50x", "shiftresnet20", "images / s"):
        assert expected in text
    lines = result.next_steps()
    assert lines[0] == f"Report: {tmp_path / 'my demo' / 'report.html'}  (open it in a browser; 72 s in all)"
    assert any(f"shiftconv eval --checkpoint '{tmp_path}/my demo/shiftresnet20/best.pt'" in line for line in lines)


def test_importing_it_for_the_command_line_imports_no_torch():
    code = (
        "import sys; sys.argv = ['shiftconv']; import shiftconv.recipes.demo; print({'torch', 'timm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
