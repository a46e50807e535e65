"""Count the networks of docs/models.md and write its table: ``python docs/assets/count_models.py``.

Networks with weights in memory for the sparse figures, so it takes some minutes and 4 GB.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import shiftconv as sc
from shiftconv.analysis.zeros import thin

PAGE = Path(__file__).parents[1] / "models.md"
BEGIN, END = "<!-- table: docs/assets/count_models.py -->", "<!-- end of table -->"
SPARSE = "weights that are not zero"


class Row(NamedTuple):
    """A network, what its authors say it has, and why that is not what it has."""

    model: str
    args: dict[str, Any] = {}  # noqa: RUF012  never changed
    paper: str = "-"
    why: str = ""
    density: float | None = None
    size: int = 224


ROWS = [
    Row("slak_tiny", {}, "30 M, 5.0 G", f"{SPARSE}, fewer by SNIP in layers with many MACs", 0.6),
    Row("slak_tiny", {"kernel_sizes": (31, 29, 27, 13)}, "30 M, 4.8 G", "the same", 0.6),
    Row("slak_tiny", {"kernel_sizes": (61, 59, 57, 13)}, "31 M, 5.2 G", "the same", 0.6),
    Row("slak_small", {}, "55 M, 9.8 G", "the same", 0.6),
    Row("slak_base", {}, "95 M, 17.1 G", "the same", 0.6),
    Row("slak_large"),
    Row("slak_tiny", {"decomposed": False, "width": 1.0}),
    Row(
        "slak_tiny",
        {"kernel_sizes": (7, 7, 7, 7), "small_kernel_size": 0, "decomposed": False, "width": 1.0},
        "29 M, 4.5 G",
        "their ConvNeXt, with batch norms",
    ),
    Row("slak_split_tiny", why="(stripes of 55x5 where 51x5 are named)"),
    Row("slak_weighted_tiny", why="(each small kernel stands in both stripes)"),
    Row("slak_shuffled_tiny", {"width": 1.0}),
    Row("shiftwise_v1_tiny", why="(their way has 5.48 G and its shift-adds)"),
    Row("shiftwise_tiny", why="(5.34 G)"),
    Row("shiftwise_small", why="(9.80 G)"),
    Row("shiftwise_base", why="(17.0 G)"),
    Row("shiftwise_large", why="(37.3 G)"),
    Row("unireplknet_a", {}, "4.4 M, 0.6 G"),
    Row("unireplknet_f", {}, "6.2 M, 0.9 G"),
    Row("unireplknet_p", {}, "10.7 M, 1.6 G"),
    Row("unireplknet_n", {}, "18.3 M, 2.8 G"),
    Row("unireplknet_t", {}, "31 M, 4.9 G", "deployed"),
    Row("unireplknet_s", {}, "56 M, 9.1 G", "the same"),
    Row("unireplknet_b", {}, "98 M, 47.2 G", "deployed", size=384),
    Row("unireplknet_l", {}, "218 M, 105.4 G", "deployed", size=384),
    Row("unireplknet_xl", {}, "386 M, 187 G", "deployed", size=384),
    Row("replknet_31b", {}, "79 M, 15.3 G", "deployed"),
    Row("replknet_31l", {}, "172 M, 96.0 G", "deployed", size=384),
    Row("replknet_xl", {}, "335 M, 128.7 G", "deployed", size=320),
    Row("convnext_tiny", {}, "29 M, 4.5 G", "timm's"),
]
COLUMNS = ("`shiftconv count`", "as trained", "deployed", "not zero", "paper", "what the paper counts")


def main() -> None:
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [cells(row) for row in ROWS]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table, counted."""
    with torch.device("meta" if row.density is None else "cpu"):
        network = sc.create_model(row.model, **row.args)
    counted = sc.count(network, row.size)
    deployed = copy.deepcopy(network)
    fold = getattr(deployed, "reparameterize", None)
    if fold is not None:
        fold()
    folded = sc.count(deployed, row.size)
    costs = both(counted.parameters, counted.macs), both(folded.parameters, folded.macs) if fold else ""
    return command(row), *costs, sparse(network, row), row.paper, row.why


def sparse(network: nn.Module, row: Row) -> str:
    """Parameters that are not 0 and effective MACs at the density that the authors count at."""
    if row.density is None:
        return ""
    thin(network, row.density)
    counted = sc.count(network, row.size)
    return both(counted.nonzero_parameters, counted.effective_macs)


def command(row: Row) -> str:
    words = [row.model, *(f"--{name} {str(value).replace(' ', '').strip('()')}" for name, value in row.args.items())]
    words += [f"--density {row.density}"] if row.density else []
    words += [f"--size {row.size}"] if row.size != 224 else []
    return f"`{' '.join(words)}`"


def both(parameters: int, macs: int) -> str:
    """Parameters in millions and MACs in billions, as papers give them, but to four digits.

    >>> both(50703838, 8704776370)
    '50.7 M, 8.705 G'
    """
    return f"{parameters / 1e6:.4g} M, {macs / 1e9:.4g} G"


if __name__ == "__main__":
    main()
