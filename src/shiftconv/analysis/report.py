"""One page that tells a run: self-contained HTML, light and dark, from wide screens to phones.

The page loads nothing and runs nothing: pictures are inlined, there is no script, and all text is escaped::

    loss = Section("Loss", ["It fell.", Pictures([Picture("Loss over epochs", png)])])
    write_report(Report("Run 7", "What happened", sections=[loss]), "report.html")
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from shiftconv import files
from shiftconv.analysis.draw import THEMES, Theme

PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG file's bytes, and perhaps the same for a dark page; ``alt`` says in words what it shows."""

    alt: str
    light: bytes = field(repr=False)
    dark: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Pictures:
    """Pictures that belong together, beside each other where the page is wide enough, above one caption."""

    items: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names its row, the others are set as numbers.

    Attributes:
        columns: the header.
        rows: as many cells each as there are columns.
        caption: what the numbers are, and how they were measured.
        coloured: mark the rows with the colours that their series have in the curves.
        coloured_columns: mark the columns after the first one so, and let their cells wrap.
        folded: show the caption only, until the reader opens the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    coloured: bool = False
    coloured_columns: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values, such as the environment's."""

    items: Mapping[str, str]
    caption: str = ""


@dataclass(frozen=True)
class Commands:
    """What to type, by what it does."""

    items: Mapping[str, str]


Block = str | Pictures | Table | Facts | Commands  # a string is a paragraph


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A page. ``headline`` holds the few numbers to remember, as (number, meaning)."""

    title: str
    lead: str
    headline: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page; the file appears whole or not at all.

    Raises:
        ValueError: if a row has not one cell per column, or a picture is not a PNG file.
        FileNotFoundError: if the folder does not exist.
    """
    path = Path(path)
    files.write(path, render(report).encode(errors="replace"))  # names of files may hold what is no Unicode
    return path


def render(report: Report) -> str:
    """The page as a string."""
    numbers = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(number)}</dd></div>" for number, what in report.headline
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{escape(report.title)}</title>",
        f"<style>{_style()}</style>",
        "</head>",
        "<body>",
        "<header>",
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="lead">{escape(report.lead)}</p>',
        f'<dl class="headline">{numbers}</dl>' if numbers else "",
        "</header>",
        "<main>",
        *(_section(section) for section in report.sections),
        "</main>",
        f"<footer><p>{escape(report.footer)}</p></footer>" if report.footer else "",
        "</body>",
        "</html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f"<section>\n<h2>{escape(section.heading)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>"
        case Table():
            return _table(block)
        case Pictures():
            caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
            pictures = "\n".join(_picture(picture) for picture in block.items)
            return f'<figure>\n<div class="pictures">\n{pictures}\n</div>\n{caption}</figure>'
        case Facts():
            facts = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in block.items.items())
            caption = f"<figcaption>{escape(block.caption)}</figcaption>" if block.caption else ""
            return f'<figure><dl class="facts">{"".join(facts)}</dl>{caption}</figure>'
        case Commands():
            steps = (
                f"<dt>{escape(what)}</dt><dd><pre><code>{escape(command)}</code></pre></dd>"
                for what, command in block.items.items()
            )
            return f'<dl class="commands">{"".join(steps)}</dl>'
    raise TypeError(f"a block must be text, Pictures, Table, Facts or Commands, got {type(block).__name__}")


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"a row must have {len(table.columns)} cells, one per column, got {len(row)}: {list(row)}")
    first, *others = table.columns
    marks = [_mark(i) if table.coloured_columns else "" for i in range(len(others))]
    head = f'<th scope="col">{escape(first)}</th>' + "".join(
        f'<th scope="col"{mark}>{escape(column)}</th>' for mark, column in zip(marks, others, strict=True)
    )
    lines = []
    for i, (name, *cells) in enumerate(table.rows):
        mark = _mark(i) if table.coloured else ""
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row"{mark}>{escape(name)}</th>{numbers}</tr>')
    # The box scrolls by itself where the page is narrow, and takes the focus so that a keyboard can scroll it.
    label = escape(table.caption or " ".join(table.columns))
    caption = f"<figcaption>{escape(table.caption)}</figcaption>" if table.caption else ""
    kind = ' class="across"' if table.coloured_columns else ""
    body = f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
    box = f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">\n{body}\n</div>'
    if table.folded:
        return f"<details>\n<summary>{label}</summary>\n{box}\n</details>"
    return f"<figure>\n{box}\n{caption}</figure>"


def _mark(i: int) -> str:
    return f' class="series-{i % len(THEMES["light"].series)}"'


def _picture(picture: Picture) -> str:
    width, height = _size(picture.light)
    alt = escape(picture.alt)
    image = f'<img src="{_inline(picture.light)}" alt="{alt}" width="{width}" height="{height}">'
    if picture.dark is None:
        return image
    _size(picture.dark)
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(picture.dark)}">'
    return f"<picture>{dark}{image}</picture>"


def _inline(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header; the page reserves the place before the picture is decoded."""
    if not content.startswith(PNG_START) or len(content) < 24:
        raise ValueError(f"a picture must be a PNG file's bytes, got {content[:8]!r}")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def _colours(theme: Theme, page: str, accent: str) -> str:
    series = "".join(f"--series-{i}:{colour};" for i, colour in enumerate(theme.series))
    return (
        f"--page:{page};--paper:{theme.paper};--ink:{theme.ink};--muted:{theme.muted};--faint:{theme.faint};"
        f"--code:{accent};{series}"
    )


def _style() -> str:
    light = _colours(THEMES["light"], page="#f6f8fa", accent="#eef1f4")
    dark = _colours(THEMES["dark"], page="#0d1117", accent="#0d1117")
    marks = "".join(f".series-{i}::before{{background:var(--series-{i})}}" for i in range(len(THEMES["light"].series)))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_LAYOUT}{marks}\n"


_LAYOUT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:clamp(1.25rem,4vw,3.5rem) clamp(1rem,4vw,2rem);max-width:68rem;background:var(--page);
color:var(--ink);font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:0 0 .5rem;font-size:clamp(1.7rem,1.2rem + 2.4vw,2.6rem);line-height:1.15;
letter-spacing:-.02em;text-wrap:balance}
h2{margin:0 0 1rem;font-size:1.25rem;line-height:1.3;letter-spacing:-.01em}
p{margin:0 0 1rem;max-width:42rem;text-wrap:pretty}
.lead{margin-bottom:1.75rem;color:var(--muted);font-size:1.125rem}
section{margin-top:1.5rem;padding:clamp(1rem,3vw,1.75rem);background:var(--paper);border:1px solid var(--faint);
border-radius:.75rem}
section>:last-child{margin-bottom:0}
dl,dd,figure{margin:0}
.headline{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1rem 2rem;
padding:1.25rem 0;border-block:1px solid var(--faint)}
.headline div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
.headline dd{font-size:1.9rem;font-weight:650;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.headline dt{color:var(--muted);font-size:.875rem;line-height:1.4}
figure{margin-bottom:1.25rem}
figcaption{margin-top:.75rem;max-width:42rem;color:var(--muted);font-size:.875rem;line-height:1.5}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.5rem;align-items:start}
img{display:block;width:100%;height:auto}
.scroll{overflow-x:auto}
.scroll:focus-visible{outline:2px solid var(--series-0);outline-offset:4px}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.6rem .9rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--faint)}
th:first-child,td:first-child{padding-left:0;text-align:left}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--muted);font-size:.8125rem;font-weight:500;vertical-align:bottom}
tbody th{font-weight:600}
tbody tr:last-child>*{border-bottom:0}
th[class]::before{content:"";display:inline-block;width:.7em;height:.7em;margin-right:.6em;border-radius:50%}
.across{width:auto;min-width:100%}
.across th,.across td{vertical-align:top}
.across thead th{max-width:14rem;white-space:normal;overflow-wrap:break-word;color:var(--ink);
font-size:.875rem;font-weight:600;vertical-align:bottom}
.across td{min-width:6.5rem;max-width:14rem;white-space:normal;overflow-wrap:break-word}
.across tbody th{color:var(--muted);font-size:.875rem;font-weight:500}
.across th:first-child{position:sticky;left:0;min-width:0;max-width:9rem;padding-right:1rem;background:var(--paper);
white-space:normal}
details{margin-bottom:1.25rem}
summary{margin-bottom:.5rem;color:var(--muted);font-size:.875rem;cursor:pointer}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.5rem;font-size:.9375rem}
.facts dt{color:var(--muted)}
.facts dd{overflow-wrap:anywhere}
.commands dt{margin-bottom:.35rem}
.commands dd{margin-bottom:1.1rem}
.commands dd:last-child{margin-bottom:0}
pre{margin:0;padding:.7rem .9rem;overflow-x:auto;background:var(--code);border:1px solid var(--faint);
border-radius:.5rem}
code{font:.875rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
footer{margin-top:2rem;color:var(--muted);font-size:.875rem}
@media (max-width:36rem){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.6rem}}
@media print{body{max-width:none;background:none}section{break-inside:avoid;border:0;padding:0}}
"""
