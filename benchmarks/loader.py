"""How fast pictures are read: ``python -m benchmarks.loader``.

A folder of synthetic JPEGs, 500x375 pixels as most of ImageNet's are, made in a temporary folder, served at 224 pixels:

    one process   decoding and transforming in a plain loop, nothing else: what a processor can do
    0 workers     the loader in the process that trains
    1, 2 workers  the loader with processes that read

A round visits the candidates in turn. The ratio is a candidate's images per second over the plain loop's, the median of
the paired rounds. Reading needs processors and nothing else, so with as many workers as processors the ratio should be
nearly their number; what is missing goes into handing the images over. Its clock is the wall's: run it on a quiet
machine. A worker's start is no part of the time, nor is its first batch. The processor time per image, of all processes
and with all they do, is the figure to look at on a busy one.
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.bench import RESULTS, commit, machine
from shiftconv.train.data import DataSets, open_data
from shiftconv.train.data.images import FileImages
from shiftconv.train.settings import Data

COLUMNS = ["date", "commit", "machine", "torch", "case", "candidate", "rounds", "images_per_s", "ratio", "cpu_ms"]
BATCH, CLASSES = 32, 4
CASES = {
    "crops": dict(color_jitter=0.0),
    "crops, colours": dict(),
    "crops, RandAugment, erasing": dict(auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", erase_prob=0.25),
}


def pictures(folder: Path, count: int) -> None:
    """So many smooth JPEGs of each class, about 40 kB each."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        place = folder / "train" / f"class {number}"
        place.mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)
            image.save(place / f"{index}.jpg", quality=90)


def check(data: DataSets) -> None:
    """Workers change no number."""
    alone, helped = (replace(data, workers=workers).loader("train", BATCH).steps() for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        if not (torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)):
            raise AssertionError("workers serve other images")


def plain(data: DataSets, epoch: int) -> float:
    """Images per second of a loop that decodes and transforms."""
    assert isinstance(data.train, FileImages)
    samples, transform = data.train.samples, data.train.transform
    start = time.perf_counter()
    for path, _ in samples:
        with Image.open(path) as file:
            transform(file.convert("RGB"))
    return len(samples) / (time.perf_counter() - start)


def loaded(workers: int) -> Callable[[DataSets, int], float]:
    """Images per second of the loader after its first batch."""

    def run(data: DataSets, epoch: int) -> float:
        loader = replace(data, workers=workers).loader("train", BATCH)
        loader.start_epoch(epoch)
        images, start = 0, None
        for batch, *_ in loader.steps():
            now = time.perf_counter()
            start, images = (now, 0) if start is None else (start, images + len(batch))
        assert start is not None
        return images / (time.perf_counter() - start)

    return run


def processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


CANDIDATES = {
    "one process": plain,
    "0 workers": loaded(0),
    "1 worker": loaded(1),
    "2 workers": loaded(2),
}


def rows(case: str, data: DataSets, rounds: int) -> list[list[str]]:
    """One for each candidate, as :data:`COLUMNS`."""
    check(data)
    speeds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    took: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for number in range(rounds):
        for name, run in CANDIDATES.items():
            before = processor_seconds()
            speeds[name].append(run(data, number))
            took[name].append(1e3 * (processor_seconds() - before) / len(data.train))
    place = [time.strftime("%Y-%m-%d"), commit(), machine(), torch.__version__, case]
    found: list[list[str]] = []
    for name, values in speeds.items():
        ratio = statistics.median(v / base for v, base in zip(values, speeds["one process"], strict=True))
        figures = [f"{statistics.median(values):.1f}", f"{ratio:.3f}", f"{statistics.median(took[name]):.2f}"]
        found.append([*place, name, str(rounds), *figures])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description="How fast pictures are read.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "loader.csv"
    new = not path.exists()
    with tempfile.TemporaryDirectory() as folder, path.open("a", newline="") as file:
        pictures(Path(folder), arguments.images // CLASSES)
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for case, settings in CASES.items():
            if arguments.case not in case:
                continue
            data = open_data(Data(name="folder", folder=folder, **settings))  # pyright: ignore[reportArgumentType]
            for row in rows(f"{case} 224 px batch {BATCH}", data, arguments.rounds):
                writer.writerow(row)
                file.flush()
                print(*row[4:6], *row[7:], sep="\t", flush=True)


if __name__ == "__main__":
    main()
