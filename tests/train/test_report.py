"""The page that compares runs: what it tells, that it is safe and alone, and what it makes of broken runs."""

import re
import sys
from html.parser import HTMLParser

import pytest

from shiftconv.train.report import report
from shiftconv.train.settings import Data, Optim, Sparsity

from .run_folders import ROWS, make_run, save_weights


class Text(HTMLParser):
    """The text of a page by its headings, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.sections, self.tags, self.heading, self.reads = {"": ""}, [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.reads = tag == "h2"

    def handle_endtag(self, tag):
        self.reads = False

    def handle_data(self, data):
        if self.reads:
            self.heading = data
        self.sections[self.heading] = f"{self.sections.get(self.heading, '')} {data}"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A dense run that has ended, and a sparse one with averaged weights that has not."""
    folder = tmp_path_factory.mktemp("compared")
    result = {"best_epoch": 2, "test": {"top1": 0.7}}
    first = make_run(folder / "<script>", result=result, model_args={"expansion": 1})
    save_weights(first)
    rows = [row | {"ema_accuracy": 0.6, "density": 0.5} for row in ROWS[:2]]
    second = make_run(folder / "&amp;", rows=rows, optim=Optim(lr=0.05), sparse=Sparsity(density=0.5))
    save_weights(second, keep=0.5)
    metrics = second / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"epoch": 3, "tr')
    (second / "environment.json").write_text('[{"torch": "2.11"}, {"torch": "<b>2.12</b>"}]')
    told = report([first, second], folder / "page.html", erf_images=1)
    return told, Text((folder / "page.html").read_text(encoding="utf-8"))


def test_the_page_has_all_that_there_is_to_tell(compared):
    sections = compared[1].sections
    assert "best validation accuracy: <script> 75.00% best test accuracy: <script> 70.00%" in sections[""]
    for text in ("test accuracy 70.00% -", "averaged weights' accuracy - 60.00%", "state finished running or stopped"):
        assert text in re.sub(r"\s+", " ", sections["Side by side"])
    assert "optim.lr 0.1 0.05" in re.sub(r"\s+", " ", sections["Recipes"])
    assert "The same in all runs: data digits, 3 epochs" in sections["Recipes"]
    assert "stem" in sections["Density by layer"] or "conv" in sections["Density by layer"]
    assert "1 validation image" in sections["What one output sees"]
    assert "2.11 → <b>2.12</b>" in sections["Environment"]
    assert "Not recorded: <script>." in sections["Environment"]
    alts = [attrs["alt"] for tag, attrs in compared[1].tags if tag == "img"]
    assert alts[2] == "Validation accuracy, %: <script> ends at 75 %, &amp; ends at 75 %"
    assert len([alt for alt in alts if alt.startswith("Effective receptive field of")]) == 2


def test_the_page_is_one_file_that_runs_and_loads_nothing(compared):
    assert "script" not in [tag for tag, _ in compared[1].tags]
    assert "b" not in [tag for tag, _ in compared[1].tags]
    assert not re.search(r"https?://|@import|url\(", compared[0].path.read_text(encoding="utf-8"))
    assert [path.name for path in compared[0].path.parent.iterdir() if path.is_file()] == ["page.html"]


def test_a_damaged_line_is_told_on_the_page_and_in_the_text(compared):
    told, page = compared
    (note,) = told.notes
    assert note.startswith("&amp;: line 3 of ")
    assert f"Note: {note}" in page.sections["Side by side"]
    assert str(told).splitlines() == [
        "<script>: shiftresnet20 expansion=1, 3 of 3 epochs, finished, validation accuracy 75.00%, "
        "test accuracy 70.00%",
        "&amp;: shiftresnet20, 2 of 3 epochs, running or stopped at epoch 2, step 6, validation accuracy 75.00%, "
        "averaged weights' accuracy 60.00%",
        f"note: {note}",
        f"page  {told.path}",
    ]


def test_a_single_run_that_has_only_begun(tmp_path):
    make_run(tmp_path / "a", rows=None)
    told = report([tmp_path / "a"], tmp_path, erf_images=0)
    assert told.path == tmp_path / "report.html"
    page = Text(told.path.read_text(encoding="utf-8"))
    assert list(page.sections) == ["", "In numbers", "Recipe", "Learning", "Environment"]
    assert "No run has finished an epoch yet." in page.sections["Learning"]
    assert "Where the runs ran was not recorded." in page.sections["Environment"]
    assert "Run a" in page.sections[""]
    assert told.notes == ["a: no weights: the run has no best.pt or last.pt"]


def test_one_run_that_fails_leaves_the_others_their_pictures(tmp_path, monkeypatch):
    from shiftconv.train import trained

    whole = trained.erf
    for name in ("good", "bad"):
        make_run(tmp_path / name, data=Data(image_size=16 if name == "good" else 8))
        save_weights(tmp_path / name)

    def fails_on_small_images(model, images):
        if images.shape[-1] == 8:
            raise ValueError("<too small>")
        return whole(model, images)

    monkeypatch.setattr(trained, "erf", fails_on_small_images)
    told = report([tmp_path / "good", tmp_path / "bad"], tmp_path, erf_images=1)
    section = Text(told.path.read_text(encoding="utf-8")).sections["What one output sees"]
    assert "bad: not measured: <too small>" in section
    assert told.trained[0].erf is not None
    assert told.notes == ["bad: no receptive field: <too small>"]


def test_networks_of_other_depths_have_their_own_picture_of_densities(tmp_path):
    runs = [make_run(tmp_path / name, rows=None, model=name) for name in ("shiftresnet20", "shiftresnet32")]
    for run in runs:
        save_weights(run, keep=0, model=run.name)
    page = Text(report(runs, tmp_path, erf_images=0).path.read_text())
    alts = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert [alt.partition(":")[0] for alt in alts] == ["Density of shiftresnet20", "Density of shiftresnet32"]
    assert "The numbers of shiftresnet32" in page.sections["Density by layer"]


def test_equal_recipes_are_said_to_be_equal(tmp_path):
    runs = [make_run(tmp_path / name, rows=None) for name in ("a", "b")]
    told = report(runs, tmp_path, erf_images=0)
    assert "All runs have the same recipe: data digits, 3 epochs" in Text(told.path.read_text()).sections["Recipes"]


def test_eight_runs_have_eight_colours(tmp_path):
    runs = [make_run(tmp_path / f"run{i}", rows=None) for i in range(8)]
    told = report(runs, tmp_path, erf_images=0)
    marks = [attrs["class"] for tag, attrs in Text(told.path.read_text()).tags if tag == "th" and "class" in attrs]
    assert marks == [f"series-{i}" for i in range(8)]


def test_a_run_that_train_has_made(whole, tmp_path):
    result, _ = whole
    told = report([result.folder], tmp_path, erf_images=1)
    assert told.runs[0].state == "finished"
    assert told.runs[0].best_epoch == result.best_epoch
    assert told.trained[0].failed == {}


def test_errors_come_before_the_work_and_leave_no_page(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    page = tmp_path / "page.html"
    with pytest.raises(ValueError, match="nowhere is no run: expected a folder"):
        report([run, tmp_path / "nowhere"], page)
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        report([run], tmp_path / "gone" / "page.html")
    with pytest.raises(ValueError, match="erf_images must be at least 0, got -1"):
        report([run], page, erf_images=-1)
    with pytest.raises(TypeError, match="erf_images must be a whole number, got True"):
        report([run], page, erf_images=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'a report needs matplotlib: pip install "shiftconv\[demo\]"'):
        report([run], page)
    assert not page.exists()
