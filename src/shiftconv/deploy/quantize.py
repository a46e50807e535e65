"""Eight bits: torchao's pt2e for programs, onnxruntime's static quantisation for ONNX files.

A shift moves quantised numbers without arithmetic, so it shares the scale and zero point of what it moves, and what the
padding mode ``zeros`` fills is the zero point, which stands for 0.0 exactly.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from shiftconv.deploy.lower import lower_graph
from shiftconv.deploy.optional import require

_PT2E = "torchao.quantization.pt2e"


def shift_quantizer() -> Any:
    """A torchao quantizer that lets shifts by whole pixels share the quantisation of what they move.

    It goes behind another one, whose consumers of a shift decide whether it is quantised and how::

        ComposableQuantizer([X86InductorQuantizer().set_global(config), shift_quantizer()])

    Raises:
        ImportError: torchao is missing.
    """
    quantizer = require(f"{_PT2E}.quantizer", "int8 for a program")

    class ShiftQuantizer(quantizer.Quantizer):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            for node in reversed(model.graph.nodes):  # consumers first
                if _moves_pixels(node):
                    _share(node, quantizer)
            return model

        def validate(self, model: fx.GraphModule) -> None:
            pass

    return ShiftQuantizer()


def _moves_pixels(node: fx.Node) -> bool:
    """Whether it is a shift by whole pixels."""
    ops, args = torch.ops.shiftconv, cast("tuple[Any, ...]", node.args)
    if node.target is ops.active_shift.default:
        _, _, _, rounded, derivative, *_ = args
        return rounded and derivative == 0
    return node.target is ops.shift.default


def _share(node: fx.Node, quantizer: Any) -> None:
    """Quantise the input of a shift as its consumers want its output, and let the output have the same numbers."""
    wanted = [
        user.meta["quantization_annotation"].input_qspec_map[node]
        for user in node.users
        if "quantization_annotation" in user.meta and node in user.meta["quantization_annotation"].input_qspec_map
    ]
    if not wanted or "quantization_annotation" in node.meta:
        return
    x: Any = node.args[0]
    node.meta["quantization_annotation"] = quantizer.QuantizationAnnotation(
        input_qspec_map={x: wanted[0]},
        output_qspec=quantizer.SharedQuantizationSpec((x, node)),
        _annotated=True,
    )


def quantize_program(
    model: nn.Module, args: tuple[Tensor, ...], batches: Iterable[tuple[Tensor, ...]], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Quantise convolutions, linear layers and shifts to 8 bits, as inductor has them fast on x86; lowered.

    Args:
        model: in eval mode.
        args: example inputs.
        batches: inputs to calibrate with.
        dynamic_shapes: as of ``torch.export.export``.

    Raises:
        ImportError: torchao is missing.
        ValueError: nothing was found to be quantised.
    """
    pt2e = require(f"{_PT2E}.quantize_pt2e", "int8 for a program")
    quantizer = require(f"{_PT2E}.quantizer", "int8 for a program")
    x86 = require(f"{_PT2E}.quantizer.x86_inductor_quantizer", "int8 for a program")
    base = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    both = quantizer.ComposableQuantizer([base, shift_quantizer()])
    with torch.no_grad():
        # Strict, as torchao finds what a node comes from with every torch only then.
        program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=True)
        prepared = pt2e.prepare_pt2e(program.module(check_guards=False), both)
        for batch in batches:
            prepared(*batch)
        module = pt2e.convert_pt2e(prepared)
        if not any("quantize_per_tensor" in str(node.target) for node in module.graph.nodes):
            raise ValueError("torchao found nothing to quantise in the model: no convolution, no linear layer")
        module = lower_graph(shift_integers(module))
        return torch.export.export(module, args, dynamic_shapes=dynamic_shapes)


def shift_integers(module: fx.GraphModule) -> fx.GraphModule:
    """Let shifts between a dequantisation and an equal quantisation move the integers; exact, in place.

    Args:
        module: what ``convert_pt2e`` returns.

    Returns:
        ``module``, to be lowered.
    """
    ops = torch.ops.quantized_decomposed
    for node in [*module.graph.nodes]:
        source = node.args[0] if _moves_pixels(node) else None
        if not isinstance(source, fx.Node) or source.target is not ops.dequantize_per_tensor.default:
            continue
        integers, _, zero, *_, dtype = source.args
        alike = [
            user
            for user in node.users
            if user.target is ops.quantize_per_tensor.default and user.args[1:] == source.args[1:]
        ]
        if not alike:
            continue
        aten = torch.ops.aten
        with module.graph.inserting_before(node):
            # Counted from the zero point, what zeros fill is zero. The integers wrap around alike both times.
            counted = module.graph.call_function(aten.sub.Scalar, (integers, zero))
            moved = module.graph.call_function(node.target, (counted, *node.args[1:]), node.kwargs)
            result = module.graph.call_function(aten.add.Scalar, (moved, zero))
        for new in (counted, moved, result):
            new.meta["val"] = node.meta["val"].to(dtype)
        for user in alike:
            user.replace_all_uses_with(result)
            module.graph.erase_node(user)
        if not node.users:
            module.graph.erase_node(node)
    return module


def quantize_onnx(path: Path, batches: Sequence[Mapping[str, Any]]) -> None:
    """Quantise an ONNX file in place: weights by output channel to int8, activations to uint8.

    Args:
        path: the file.
        batches: arrays to calibrate with, by the names of the inputs.

    Raises:
        ImportError: onnxruntime or onnx is missing.
    """
    onnx = require("onnx", "int8 for an ONNX file")
    quantization = require("onnxruntime.quantization", "int8 for an ONNX file")
    shape_inference = require("onnxruntime.quantization.shape_inference", "int8 for an ONNX file")

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.left, None)

    fused = path.with_suffix(".fused.onnx")  # norms must go into their convolutions before these are quantised
    shape_inference.quant_pre_process(path, fused)
    kinds = quantization.QuantType
    quantization.quantize_static(
        fused, path, Batches(), per_channel=True, activation_type=kinds.QUInt8, weight_type=kinds.QInt8
    )
    model = onnx.load(path)
    used = {node.domain for node in model.graph.node}
    kept = [domain for domain in model.opset_import if domain.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.save(model, path)
