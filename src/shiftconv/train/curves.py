"""The rows of metrics.jsonl as curves for TensorBoard."""

from pathlib import Path
from typing import Any

from shiftconv.train.loggers import tagged


class Curves:
    """Writes into ``folder``; what a killed run wrote after ``finished`` epochs is hidden."""

    def __init__(self, folder: Path, finished: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # slow to import, and not every run wants it

        self._writer = SummaryWriter(str(folder), purge_step=finished + 1)

    def add(self, row: dict[str, Any]) -> None:
        for tag, value in tagged(row).items():
            self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
