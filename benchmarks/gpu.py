"""Tests and benchmarks of every operator on a GPU: ``python -m benchmarks.gpu``. Says so and ends where there is none.

First come the floors, a large copy and a large matrix product; then the tests that need a GPU; then, for each shape,
the results on fresh random data against the operator's reference in float64, and the times. A candidate's calls, on
inputs that together exceed every cache, are recorded as one CUDA graph, into outputs of their own, so that neither the
launches nor a warm cache count; graphs are replayed in turn and timed by CUDA events. Rows go to ``results/<op>.csv``
with the GPU as machine. Goals: shift and its transpose at least 92 % of a copy, active_shift at most 1.12 of a copy and
its backward 1.7, shift_linear at most 1.05 of the 1x1 convolution alone.
"""

import argparse
import importlib
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Case, append, rows
from shiftconv.ops.active_shift import reference as active_reference
from shiftconv.ops.active_shift import reference_backward
from shiftconv.ops.sampling import MODES
from shiftconv.ops.shift import reference as shift_reference
from shiftconv.ops.shift_linear import reference as linear_reference

SHAPES = {
    "imagenet 96@56": (64, 96, 56, 56),
    "slak 124@56": (64, 124, 56, 56),
    "imagenet 192@28": (64, 192, 28, 28),
    "imagenet 384@14": (64, 384, 14, 14),
    "imagenet 768@7": (64, 768, 7, 7),
    "cifar 48@32": (128, 48, 32, 32),
    "cifar 192@8": (128, 192, 8, 8),
    "large 64@199x333": (2, 64, 199, 333),
    "video 64@16x28x28": (8, 64, 16, 28, 28),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EVERY_MODE = "imagenet 96@56"  # padding modes other than zeros are measured there
ROTATION = 256 << 20  # bytes of inputs and of outputs that a graph goes through
GRAPH = (4, 64)  # calls in it, at least and at most


class Candidate(NamedTuple):
    """One way to do a thing, called with each set of inputs in turn."""

    function: Callable[..., Any]
    inputs: list[tuple[Tensor, ...]]

    def __call__(self) -> list[Any]:
        """All calls; their outputs are returned so that none takes the memory of another."""
        return [self.function(*arguments) for arguments in self.inputs]


def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, candidates in turn; each is a :class:`Candidate`, recorded as one graph."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, object, int]] = {}
    for name, run in candidates.items():
        assert isinstance(run, Candidate)
        run.function(*run.inputs[0])  # compiles, and lets cuDNN choose
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        graphs[name] = graph, outputs, len(run.inputs)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for lap in range(rounds + 3):  # three laps to warm up
        for name, (graph, _, calls) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if lap >= 3:
                times[name].append(1e-3 * start.elapsed_time(end) / calls)
    return times


def maps(device: str) -> Iterator[tuple[str, list[Tensor], torch.dtype]]:
    """Every shape, dtype and memory format: name and random inputs that together exceed the caches."""
    for (name, shape), (kind, dtype), last in itertools.product(SHAPES.items(), DTYPES.items(), (False, True)):
        x = torch.randn(shape, device=device).to(dtype)
        x = x.contiguous(memory_format=FORMATS[x.ndim]) if last else x
        calls = max(GRAPH[0], min(GRAPH[1], ROTATION // (x.numel() * x.itemsize)))
        inputs = [x, *(torch.randn_like(x) for _ in range(calls - 1))]
        yield f"{name} {kind} {'channels_last' if last else 'nchw'}", inputs, dtype


def neighbours(channels: int, axes: int, device: str) -> Tensor:
    """Offsets ``[C, D]`` of a neighbourhood of three pixels along each axis, interleaved over the channels."""
    c = torch.arange(channels, device=device)
    return torch.stack([c // 3 ** (axes - 1 - axis) % 3 - 1 for axis in range(axes)], 1)


def random_offsets(channels: int, axes: int, device: str) -> Tensor:
    return torch.rand(channels, axes, device=device) * 4 - 2


def near(result: Tensor, truth: Tensor, dtype: torch.dtype, what: str, scale: Tensor | None = None) -> None:
    """Compare a ``result`` computed in ``dtype`` with a truth in float64; ``scale`` is what errors count by."""
    tolerance = TOLERANCE[dtype]
    allowed = tolerance * float((truth if scale is None else scale).abs().max())
    error = float((result.double() - truth).abs().max())
    if not error <= allowed:
        raise AssertionError(f"{what} is wrong by {error:.3g}, where {allowed:.3g} is allowed")


def single(function: Callable[..., Any], *lists: list[Tensor]) -> Candidate:
    """A candidate that takes one tensor from each list."""
    return Candidate(function, list(zip(*lists, strict=True)))


def shift_cases(device: str) -> Iterator[Case]:
    """Integer shift and its transpose, against copies and depthwise 3x3 convolutions."""
    run = torch.ops.shiftconv.shift.default
    for name, xs, dtype in maps(device):
        channels, axes = xs[0].shape[1], xs[0].ndim - 2
        offset = neighbours(channels, axes, device)
        modes = MODES if name.startswith(EVERY_MODE) else {"zeros": MODES["zeros"]}
        for direction, transpose in (("forward", False), ("transpose", True)):

            def check(
                x: Tensor = xs[0], offset: Tensor = offset, transpose: bool = transpose, modes: Any = modes
            ) -> None:
                for mode in modes.values():
                    truth = shift_reference(x.double(), offset, mode, transpose)
                    near(run(x, offset, mode, transpose), truth, x.dtype, f"shift in mode {mode}")

            candidates: dict[str, Callable[[], object]] = {"copy": single(torch.clone, xs)}
            for mode, code in modes.items():
                call = lambda x, offset=offset, code=code, transpose=transpose: run(x, offset, code, transpose)  # noqa: E731
                candidates["shift" if mode == "zeros" else f"shift {mode}"] = single(call, xs)
            if axes == 2 and not transpose:
                kernel = torch.randn(channels, 1, 3, 3, device=device, dtype=dtype)
                convolution = lambda x, kernel=kernel: F.conv2d(x, kernel, None, 1, 1, 1, len(kernel))  # noqa: E731
                candidates["conv3x3"] = single(convolution, xs)
            yield Case(name, direction, "copy", candidates, check)


def learned_cases(device: str, rounded: bool) -> Iterator[Case]:
    """A learned shift and its backward, both gradients at once, against copies."""
    name = "sparse_shift" if rounded else "active_shift"
    run, back = torch.ops.shiftconv.active_shift.default, torch.ops.shiftconv.active_shift_backward.default
    for case, xs, _ in maps(device):
        modes = MODES if case.startswith(EVERY_MODE) else {"zeros": MODES["zeros"]}
        offset = random_offsets(xs[0].shape[1], xs[0].ndim - 2, device)
        grads = [x.flip(0) for x in xs]

        def check(x: Tensor = xs[0], grad: Tensor = grads[0], offset: Tensor = offset, modes: Any = modes) -> None:
            for mode in modes.values():
                truth = active_reference(x.double(), offset, mode, rounded, 0, False)
                near(run(x, offset, mode, rounded, 0, False), truth, x.dtype, f"{name} in mode {mode}")
                truths = reference_backward(grad.double(), x.double(), offset.double(), mode, rounded)
                scales = (None, (grad.double() * x.double()).abs().transpose(0, 1).flatten(1).sum(1))
                results, again = back(grad, x, offset, mode, rounded), back(grad, x, offset, mode, rounded)
                for result, truth, scale in zip(results, truths, scales, strict=True):
                    near(result, truth, x.dtype, f"a gradient of {name} in mode {mode}", scale)
                if not all(torch.equal(*pair) for pair in zip(results, again, strict=True)):
                    raise AssertionError(f"the gradients of {name} in mode {mode} differ between two runs")

        forward: dict[str, Callable[[], object]] = {"copy": single(torch.clone, xs)}
        backward: dict[str, Callable[[], object]] = {"copy": single(torch.clone, xs)}
        for mode, code in modes.items():
            label = name if mode == "zeros" else f"{name} {mode}"
            forward[label] = single(lambda x, o=offset, m=code: run(x, o, m, rounded, 0, False), xs)
            backward[label] = single(lambda g, x, o=offset, m=code: back(g, x, o, m, rounded), grads, xs)
        yield Case(case, "forward", "copy", forward, check)
        yield Case(case, "backward", "copy", backward, check)


def linear_cases(device: str) -> Iterator[Case]:
    """The fused 1x1 convolution against itself without a shift, and after a shift of its own; all with relu."""
    run, move = torch.ops.shiftconv.shift_linear.default, torch.ops.shiftconv.shift.default
    for name, xs, dtype in maps(device):
        channels, axes = xs[0].shape[1], xs[0].ndim - 2
        if axes != 2:
            continue
        offset = neighbours(channels, axes, device)
        weight = (torch.randn(channels, channels, device=device) / channels**0.5).to(dtype)
        bias = torch.randn(channels, device=device).to(dtype)

        def plain(x: Tensor, w: Tensor = weight, b: Tensor = bias) -> Tensor:
            return F.conv2d(x, w[:, :, None, None], b).relu_()

        def fused(x: Tensor, o: Tensor = offset, w: Tensor = weight, b: Tensor = bias) -> Tensor:
            return run(x, o, w, b, None, 0, [1, 1], True)

        def apart(x: Tensor, o: Tensor = offset, plain: Callable[[Tensor], Tensor] = plain) -> Tensor:
            return plain(move(x, o, 0, False))

        def check(
            x: Tensor = xs[0],
            o: Tensor = offset,
            w: Tensor = weight,
            b: Tensor = bias,
            fused: Any = fused,
            apart: Any = apart,
        ) -> None:
            wide = [t.double() for t in (x, w, b)]
            truth = linear_reference(wide[0], o, wide[1], wide[2], None, 0, [1, 1], True)
            near(fused(x), truth, x.dtype, "shift_linear")
            near(apart(x), truth, x.dtype, "shift, then conv1x1")

        yield Case(
            name,
            "forward",
            "conv1x1",
            {"conv1x1": single(plain, xs), "shift_linear": single(fused, xs), "shift, conv1x1": single(apart, xs)},
            check,
        )


def _depthwise(name: str) -> Callable[[str], Iterator[Case]]:
    """A suite of the other file, which takes its tools from this one."""
    return lambda device: getattr(importlib.import_module("benchmarks.gpu_depthwise"), name)(device)


SUITES: dict[str, Callable[[str], Iterator[Case]]] = {
    "shift": shift_cases,
    "sparse_shift": lambda device: learned_cases(device, True),
    "active_shift": lambda device: learned_cases(device, False),
    "shift_linear": linear_cases,
    "depthwise_conv": _depthwise("depthwise_cases"),
    "cross_conv": _depthwise("cross_cases"),
    "shiftwise": _depthwise("shiftwise_cases"),
}


def floors(rounds: int) -> None:
    """Show what the GPU can do at best."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = measure({"copy": Candidate(torch.clone, [(x,)]), "product": Candidate(torch.mm, [(a, b)])}, rounds)
    copy, product = (statistics.median(seconds[name]) for name in ("copy", "product"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print(f"copy of 1 GiB: {2 * x.numel() / copy / 1e12:.2f} TB/s, read and written")
    print(f"bfloat16 product of 8192 x 8192: {2 * 8192**3 / product / 1e12:.0f} TFLOP/s")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Test and benchmark on the GPU.")
    parser.add_argument("op", nargs="*", choices=[*SUITES, []], help="operators; all unless given")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="go straight to the benchmarks")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing to test or to measure")
        return 0
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 is checked as such
    floors(arguments.rounds)
    if not arguments.no_tests:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "cuda", "tests/ops"])
        if tests.returncode:
            print("the GPU tests fail: nothing is measured")
            return 1
    wrong = 0
    for op in arguments.op or SUITES:
        for case in SUITES[op]("cuda"):
            if arguments.case not in case.name:
                continue
            try:
                append(op, rows(op, [case], arguments.rounds, measure, (torch.cuda.get_device_name(), "gpu")))
            except AssertionError as error:
                wrong += 1
                print(f"{op} {case.name} {case.direction} is not measured: {error}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
