"""The page: complete, self-contained, escaped, well formed; and the pictures that it holds."""

import re
from html.parser import HTMLParser

import matplotlib
import pytest
import torch

from shiftconv.analysis import draw
from shiftconv.analysis.receptive_field import ERF
from shiftconv.analysis.report import Commands, Facts, Picture, Pictures, Report, Section, Table, render, write_report

HOSTILE = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "source", "br"}


class Outline(HTMLParser):
    """Fails on tags that do not nest; collects the tags with their attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def curves() -> list[draw.Panel]:
    epochs = [1, 2, 3]
    loss = [draw.Series("a", epochs, [2.0, 1.0, 0.1]), draw.Series("a", epochs, [2.0, 1.5, 1.0], solid=False)]
    accuracy = [draw.Series("a", epochs, [50, 90, 98.0]), draw.Series("b", epochs, [60, 91, 98.1])]
    return [draw.Panel("Loss", loss, log=True), draw.Panel("Accuracy", accuracy, floor=80, unit=" %")]


def picture(mode: draw.Mode = "light") -> bytes:
    return draw.png(draw.curves(curves()[:1], mode))


def full_report() -> Report:
    table = Table(("network", HOSTILE), [("a", "1"), ("b", HOSTILE)], HOSTILE, coloured=True)
    blocks = [
        HOSTILE,
        table,
        Pictures([Picture(HOSTILE, picture(), picture("dark")), Picture("plain", picture())], HOSTILE),
        Facts({HOSTILE: HOSTILE}, HOSTILE),
        Commands({HOSTILE: HOSTILE}),
    ]
    return Report(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [Section(HOSTILE, blocks)], HOSTILE)


def test_everything_is_shown_as_text_and_nothing_is_markup():
    page = Outline(render(full_report()))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert page.text.count(HOSTILE) == 17
    assert [attrs["alt"] for tag, attrs in page.tags if tag == "img"] == [HOSTILE, "plain"]
    assert [names.count(tag) for tag in ("html", "main", "header", "footer", "h1", "h2", "table")] == [1] * 7


def test_nothing_is_loaded_from_elsewhere():
    page = render(full_report())
    assert not re.search(r"https?://|@import|url\(", page)
    for _, attrs in Outline(page).tags:
        assert "href" not in attrs
        for name in ("src", "srcset"):
            assert attrs.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not any(name.startswith("on") for name in attrs)


def test_dark_pages_get_dark_pictures_and_places_are_reserved():
    tags = Outline(render(full_report())).tags
    (source,) = [attrs for tag, attrs in tags if tag == "source"]
    assert source["media"] == "(prefers-color-scheme: dark)"
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert source["srcset"] != images[0]["src"]
    assert all(int(image["width"]) == 784 and int(image["height"]) == 544 for image in images)


def test_columns_may_carry_the_colours_of_their_series():
    table = Table(("", "a", "b"), [("x", "1", "2")], coloured_columns=True)
    page = Outline(render(Report("Title", "Lead", sections=[Section("S", [table])])))
    marks = [attrs.get("class") for tag, attrs in page.tags if tag == "th"]
    assert marks == [None, "series-0", "series-1", None]
    assert [attrs["class"] for tag, attrs in page.tags if tag == "table"] == ["across"]


def test_a_folded_table_shows_its_caption_only():
    table = Table(("a", "b"), [("x", "1")], HOSTILE, folded=True)
    page = Outline(render(Report("Title", "Lead", sections=[Section("S", [table])])))
    names = [tag for tag, _ in page.tags]
    assert names[names.index("details") : names.index("table")] == ["details", "summary", "div"]
    assert page.text.count(HOSTILE) == 1


def test_what_is_no_unicode_is_written_as_a_question_mark(tmp_path):
    path = write_report(Report("a\udcffb", "Lead"), tmp_path / "report.html")
    assert "<h1>a?b</h1>" in path.read_text(encoding="utf-8")


def test_a_page_may_be_almost_empty():
    assert "<h1>Title</h1>" in render(Report("Title", "Lead"))


def test_writes_whole_files_only(tmp_path):
    path = write_report(full_report(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == render(full_report())
    bad = Report("Title", "Lead", sections=[Section("S", [Table(("a", "b"), [("1",)])])])
    with pytest.raises(ValueError, match=r"must have 2 cells, one per column, got 1: \['1'\]"):
        write_report(bad, path)
    assert path.read_text(encoding="utf-8") == render(full_report())
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        write_report(bad.__class__("Title", "Lead"), tmp_path / "nowhere" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (Pictures([Picture("no picture", b"GIF89a")]), ValueError, "must be a PNG file's bytes, got b'GIF89a'"),
        (Pictures([Picture("dark", picture(), b"")]), ValueError, "must be a PNG file's bytes"),
        (3, TypeError, "a block must be text, Pictures, Table, Facts or Commands, got int"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(block, error, message):
    with pytest.raises(error, match=message):
        render(Report("Title", "Lead", sections=[Section("S", [block])]))


def test_drawing_leaves_the_global_state_of_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    field = ERF(torch.rand(16, 16, dtype=torch.float64), 2)
    weights = {"a": torch.randn(16, 3, 3, 3), "b": torch.randn(9, 1, 3, 3)}
    offset = torch.tensor([[dy, dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    for mode in ("light", "dark"):
        pictures = [
            draw.curves(curves(), mode),
            draw.anatomy(weights, offset, {"a": field, "b": field}, mode),
            draw.receptive_fields({"a": field}, (0.5, 0.9), mode),
            draw.filters(weights, mode),
            draw.offsets(2 * offset, mode),
            draw.gallery(torch.rand(5, 8, 8), list("12345"), [True] * 4 + [False], mode),
        ]
        assert all(draw.png(figure).startswith(b"\x89PNG") for figure in pictures)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="no receptive field"):
        draw.receptive_fields({})


def test_labels_at_the_ends_of_lines_stay_apart_and_inside():
    assert draw.apart([0.5, 0.51, 0.1], 0.13) == pytest.approx([0.5, 0.63, 0.1])
    placed = draw.apart([1.0, 0.99], 0.13)
    assert max(placed) <= 0.96
    assert placed[0] - placed[1] == pytest.approx(0.13)
    assert draw.apart([], 0.1) == []
    assert draw.apart([1.0, 0.99, 0.1], 0.13) == pytest.approx([0.96, 0.83, 0.1]), "only those that are in the way move"


def test_a_line_has_its_colour_in_every_picture():
    (axes,) = draw.curves([draw.Panel("Loss", [draw.Series("b", [1, 2], [2, 1])])], names=["a", "b"]).axes
    assert axes.lines[0].get_color() == draw.THEMES["light"].series[1]


def test_lines_are_named_as_they_are_and_crowded_ones_shortly():
    few = [draw.Series("$\\frac$ \u6570", [1], [2], note="note")]
    many = [draw.Series(f"{i} a name that is much too long {i}", [1], [i]) for i in range(4)]
    figure = draw.curves([draw.Panel("$x^$", few, along="layer", dots=True)])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["$\\frac$ \u6570\nnote"]
    assert axes.get_xlabel() == "layer"
    draw.png(figure)
    (axes,) = draw.curves([draw.Panel("Loss", many)]).axes
    assert axes.texts[3].get_text() == "3 3 a name t\u2026oo long 3"


def linear(colour: str) -> torch.Tensor:
    """The colour in linear light, by the definition of sRGB."""
    value = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=torch.float64) / 255
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(light: torch.Tensor) -> torch.Tensor:
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).double()
    xyz = to_xyz @ light.clamp(0, 1) / torch.tensor([0.9505, 1, 1.089])
    x, y, z = torch.where(xyz > 0.008856, xyz.pow(1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


VISION = {  # Machado et al. 2009, severity 1
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("mode", draw.THEMES)
def test_eight_colours_are_told_apart_and_stand_out_with_every_kind_of_colour_vision(mode):
    theme = draw.THEMES[mode]
    assert len(theme.series) == 8
    for matrix in VISION.values():
        seen = torch.stack([lab(torch.tensor(matrix).double() @ linear(colour)) for colour in theme.series])
        assert torch.pdist(seen).min() > 10
    bright = torch.stack([torch.tensor([0.2126, 0.7152, 0.0722]).double() @ linear(c) for c in theme.series]) + 0.05
    paper = float(torch.tensor([0.2126, 0.7152, 0.0722]).double() @ linear(theme.paper)) + 0.05
    assert torch.maximum(bright / paper, paper / bright).min() > 3, "WCAG 2.1, 1.4.11"


def test_curves_survive_what_training_may_give():
    nan = [draw.Series("a", [1, 2], [float("nan"), float("nan")]), draw.Series("b", [1], [0.0])]
    draw.png(draw.curves([draw.Panel("Loss", nan, log=True), draw.Panel("Empty", [])]))
