"""A trained network as a file that runs without this package, written only if it gives the network's outputs."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shiftconv.analysis.mode import evaluating
from shiftconv.deploy.lower import lower
from shiftconv.deploy.optional import require
from shiftconv.deploy.quantize import quantize_onnx, quantize_program
from shiftconv.files import write
from shiftconv.names import unknown

Inputs = tuple[Tensor, ...]

_FLOAT_TOLERANCE = 1e-4  # of the largest output; what other orders of the same sums may change
_HALF_TOLERANCE = 2e-2
_INT8_TOLERANCE = 0.25  # of the outputs' root mean square


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        path: the file.
        size: bytes.
        error: how far its outputs are from the model's: the largest difference over the largest output, or for int8 the
            root mean square of the differences over that of the outputs.
    """

    path: Path
    size: int
    error: float


def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor | Inputs,
    *,
    int8: Iterable[Tensor | Inputs] | None = None,
    compiled: bool = False,
    dynamic_batch: bool = True,
) -> Exported:
    """Write ``model`` for inference to ``net.onnx`` or ``net.pt2``, after its outputs have been compared.

    Both hold standard operators only. ``net.onnx`` runs in onnxruntime and its like. ``net.pt2`` is read by
    ``torch.export.load``, or if ``compiled`` by ``torch._inductor.aoti_load_package`` and, without Python, by its C++
    twin. The model is exported in eval mode and left as it was.

    Args:
        model: takes tensors ``[N, ...]``, returns a tensor or a structure of them.
        path: where to; the suffix says what. An older file there is replaced.
        example: inputs of typical size, on the device of the model.
        int8: inputs to calibrate with, some hundred typical images in batches: then weights and activations are
            quantised to 8 bits. Shifts move the integers, and what they fill is the zero point. To load such a ``.pt2``
            ``torchao.quantization.pt2e`` must have been imported, unless it is ``compiled``.
        compiled: a ``.pt2`` compiled ahead of time for this kind of machine (needs a C++ compiler).
        dynamic_batch: the file takes any ``N``; else that of ``example`` alone.

    Returns:
        The path, the size and the error that was measured.

    Raises:
        ImportError: a package is missing; says which extra brings it.
        TypeError: inputs that are no tensors.
        ValueError: an unknown suffix, ``compiled`` for ONNX, or outputs of the file that differ; then nothing is
            written.
    """
    path = Path(path)
    writers = {".onnx": _write_onnx, ".pt2": _write_pt2}
    if path.suffix not in writers:
        raise unknown("suffix", path.suffix, writers)
    if compiled and path.suffix != ".pt2":
        raise ValueError(f"only a .pt2 can be compiled, got {path.name}")
    inputs = _inputs(example)
    batches = None if int8 is None else [_inputs(batch) for batch in int8]
    if batches == []:
        raise ValueError("int8 takes inputs to calibrate with, got none")
    options = _Options(batches, compiled, dynamic_batch)
    with evaluating(model), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        run = writers[path.suffix](model, draft, inputs, options)
        error = _compare(model, run, inputs, options)
        content = draft.read_bytes()
    write(path, content)
    return Exported(path, len(content), error)


def _inputs(example: Any) -> Inputs:
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) and x.ndim > 0 for x in inputs):
        raise TypeError(f"inputs must be a tensor [N, ...] or a tuple of them, got {type(example).__name__}")
    return inputs


def _write_onnx(model: nn.Module, path: Path, inputs: Inputs, options: "_Options") -> Callable[[Inputs], Any]:
    """Write an ONNX file; returns what runs it."""
    require("onnxscript", "writing ONNX")
    runtime = require("onnxruntime", "checking an ONNX file")
    program = lower(model, *options.traced(inputs))
    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx is not None
    onnx.save(path, external_data=False)
    if options.batches is not None:
        names = [value.name or "" for value in onnx.model.graph.inputs]
        quantize_onnx(path, [dict(zip(names, map(_array, batch), strict=True)) for batch in options.batches])
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = session.run(None, dict(zip(names, map(_array, inputs), strict=True)))
        return [torch.from_numpy(array) for array in arrays]

    return run


def _array(x: Tensor) -> Any:
    return x.detach().cpu().numpy()


def _write_pt2(model: nn.Module, path: Path, inputs: Inputs, options: "_Options") -> Callable[[Inputs], Any]:
    """Write an exported program or a compiled package; returns what runs it."""
    example, shapes = options.traced(inputs)
    if options.batches is None:
        program = lower(model, example, shapes)
    else:
        program = quantize_program(model, example, options.batches, shapes)
    if not options.compiled:
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))  # pyright: ignore[reportPrivateUsage]
        loaded = torch._inductor.aoti_load_package(str(path))  # pyright: ignore[reportPrivateUsage]
    return lambda inputs: loaded(*inputs)


@dataclass(frozen=True)
class _Options:
    """How to export, as :func:`export` was told."""

    batches: Sequence[Inputs] | None
    compiled: bool
    dynamic_batch: bool

    def traced(self, inputs: Inputs) -> tuple[Inputs, Any]:
        """Inputs to trace with, and their dynamic shapes."""
        if not self.dynamic_batch:
            return inputs, None
        if inputs[0].shape[0] == 1:  # would be taken for a constant
            inputs = _resized(inputs, 2)
        return inputs, ({0: torch.export.Dim("batch")},) * len(inputs)


def _resized(inputs: Inputs, size: int) -> Inputs:
    """The same inputs with ``size`` images: the first ones again."""
    return tuple(x[torch.arange(size, device=x.device) % x.shape[0]] for x in inputs)


def _compare(model: nn.Module, run: Callable[[Inputs], Any], inputs: Inputs, options: _Options) -> float:
    """The error that :class:`Exported` tells, of the batch and of another size.

    Raises:
        ValueError: it is more than other orders of sums explain, or for int8 much.
    """
    sizes = [inputs[0].shape[0] + more for more in ((0, 1) if options.dynamic_batch else (0,))]
    worst = 0.0
    for size in sizes:
        batch = _resized(inputs, size)
        expected, came = pytree.tree_leaves(model(*batch)), pytree.tree_leaves(run(batch))
        if [[*y.shape] for y in expected] != [[*y.shape] for y in came]:
            shapes = [[*y.shape] for y in came], [[*y.shape] for y in expected]
            raise ValueError(f"the file gives outputs {shapes[0]} instead of {shapes[1]}; nothing was written")
        for want, got in zip(expected, came, strict=True):
            error, limit = _error(want.cpu(), got.cpu(), options.batches is not None)
            if not error <= limit:  # NaN, too
                raise ValueError(
                    f"the file's outputs differ from the model's by {error:.2g} of their size, more than {limit:.2g}; "
                    "nothing was written"
                )
            worst = max(worst, error)
    return worst


def _error(want: Tensor, got: Tensor, int8: bool) -> tuple[float, float]:
    """The error and its limit."""
    if want.numel() == 0 or torch.equal(want, got):
        return 0.0, 0.0
    limit = _HALF_TOLERANCE if want.itemsize == 2 else _FLOAT_TOLERANCE
    want, got = want.double(), got.double()
    if int8:
        return float((want - got).norm() / want.norm()), _INT8_TOLERANCE
    return float((want - got).abs().max() / want.abs().max()), limit
