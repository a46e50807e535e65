import torch

from shiftconv.analysis import ERF
from shiftconv.train.record import read
from shiftconv.train.report_curves import curve_panels, curve_picture, field_picture

from .run_folders import ROWS, make_run


def test_a_panel_for_each_number_in_order(tmp_path):
    more = [row | {"distill_loss": 1.0, "lr": 0.1, "skipped_images": 0, "density": 0.5, "seconds": 1} for row in ROWS]
    runs = [read(make_run(tmp_path / "a", rows=more)), read(make_run(tmp_path / "b", rows=ROWS[:2]))]
    panels = {panel.title: panel for panel in curve_panels(runs)}
    assert list(panels) == [
        "Training loss", "Validation loss", "Validation accuracy, %", "Learning rate", "Density", "Distill loss",
    ]  # fmt: skip
    assert [line.epochs for line in panels["Training loss"].series] == [[1, 2, 3], [1, 2]]
    assert [line.values for line in panels["Validation accuracy, %"].series] == [[50, 75, 75], [50, 75]]
    assert [line.name for line in panels["Density"].series] == ["a"]
    assert curve_panels([read(make_run(tmp_path / "c", rows=None))]) == []


def panel_of(folder, key, values):
    record = read(make_run(folder, rows=[{"epoch": i, key: value} for i, value in enumerate(values, start=1)]))
    return curve_panels([record])[0]


def test_a_loss_that_falls_far_is_shown_in_decades(tmp_path):
    cases = [([5, 0.1], True), ([2, 1], False), ([5, 0.1, 0], False), ([5, 0.1, float("nan")], True)]
    panels = [panel_of(tmp_path / str(i), "val_loss", values) for i, (values, _) in enumerate(cases)]
    assert [panel.log for panel in panels] == [wide for _, wide in cases]


def test_accuracy_is_shown_from_80_percent_on_once_every_run_is_above(tmp_path):
    cases = [([0.1, 0.9], 80), ([0.9, 0.8], None)]
    panels = [panel_of(tmp_path / str(i), "val_accuracy", values) for i, (values, _) in enumerate(cases)]
    assert [panel.floor for panel in panels] == [floor for _, floor in cases]


def test_pictures_survive_odd_numbers_and_names(tmp_path):
    values = [float("nan"), float("inf"), 1e6]
    panel = panel_of(tmp_path / "$\\frac$ 数字 <b>", "$x^$", values)
    picture = curve_picture(panel, ["other", "$\\frac$ 数字 <b>"])
    assert picture.alt == "$x^$: $\\frac$ 数字 <b> 1,000,000"
    assert picture.light != picture.dark
    field = field_picture("$\\frac$", ERF(torch.rand(16, 16, dtype=torch.float64), 1), "3 px")
    assert field.alt == "Effective receptive field of $\\frac$; half of it: 3 px"
