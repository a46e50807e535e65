"""Showing a run: a live bar in a terminal, one plain line per epoch elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shiftconv.train.events import EpochDone, Event, Note, Started, Step

ROW = "{epoch:>{width}}/{epochs}  {parts}  lr {lr:.2e}  {images_per_second:,.0f} images/s  {seconds:.1f} s"


class RichProgress:
    """Give it to ``train`` or ``evaluate``; it opens at the start of a run and closes at its end, however it ends.

    Args:
        console: where to write; none: standard error, so that results can be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Started):
            self._line(_headline(event))
        elif isinstance(event, EpochDone):
            width, mark = len(str(event.epochs)), "  best" if event.is_best else ""
            parts = "  ".join(_part(event.row, part) for part in ("train", "val", "ema") if f"{part}_loss" in event.row)
            self._line("epoch " + ROW.format(**event.row, parts=parts, epochs=event.epochs, width=width) + mark)
        elif isinstance(event, Note):
            self._line(f"note: {event.text}")
        else:
            self.close()

    def close(self) -> None:
        """Remove the bar; a later event opens a new one."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def _step(self, event: Step) -> None:
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=1, figures="")
        assert self._task is not None
        name = f"epoch {event.epoch}" if event.epoch else event.part
        figures = f"loss {event.loss:.4f}  {_score(event.score)}  {event.images_per_second:,.0f} images/s"
        if event.memory:
            figures += f"  {event.memory / 2**30:.1f} GiB"
        total = max(event.steps, event.step)
        self._bar.update(self._task, description=name, completed=event.step, total=total, figures=figures)


def _part(row: dict[str, Any], part: str) -> str:
    """Loss and first score of a part, as ``val 0.1234  98.76%``."""
    scores = [value for name, value in row.items() if name.startswith(f"{part}_") and name != f"{part}_loss"]
    return " ".join([part, f"{row[f'{part}_loss']:.4f}", *(f"{_score(score):>7}" for score in scores[:1])])


def _score(score: float) -> str:
    return f"{score:.2%}" if 0 <= score <= 1 else f"{score:.4f}"


def _headline(event: Started) -> str:
    recipe = event.recipe
    args = "".join(f" {name}={value}" for name, value in recipe.model_args.items())
    goes_on = f", going on after epoch {event.finished}" if event.finished else ""
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    return (
        f"{recipe.model}{args} ({event.parameters:,} parameters) on {recipe.data.name}: {event.train:,} train, "
        f"{event.val:,} val, {event.test:,} test images; {epochs} on {event.device} "
        f"into {event.folder}{goes_on}"
    )
