"""A network in torch's own operators: what remains when this package's are replaced, so that it runs without it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from shiftconv.deploy.forms import InPlaceForm, MixForm, Place, form_of
from shiftconv.ops.decompositions import decompositions


def lower(model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    """Export ``model`` for inference in standard aten operators.

    Shifts whose offsets are parameters, buffers, or computed from these alone become the fastest form that onnxruntime
    has for them, see :mod:`shiftconv.deploy.forms`; others become a gather at positions computed from the offsets.

    Args:
        model: in eval mode.
        args: example inputs; an axis that is dynamic must be larger than 1.
        dynamic_shapes: as of ``torch.export.export``.

    Returns:
        A program equal to the model within float rounding, and exactly where shifts are by whole pixels.
    """
    with torch.no_grad():
        program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
        return torch.export.export(lower_graph(program.module(check_guards=False)), args, dynamic_shapes=dynamic_shapes)


def lower_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Replace the operators of this package in ``module``, in place, as :func:`lower` does.

    Args:
        module: of an exported program, or of what ``convert_pt2e`` makes of it.

    Returns:
        ``module``.
    """
    formulas: dict[Any, Callable[..., Any]] = {**decompositions()}
    for number, node in enumerate([*module.graph.nodes]):
        if node.op != "call_function" or node.target not in formulas:
            continue
        form = _form(module, node)
        with module.graph.inserting_before(node):
            if form is None:
                new = module.graph.call_function(formulas[node.target], node.args, node.kwargs)
            else:
                name = f"_shift_{number}"
                module.add_submodule(name, form[0])
                new = module.graph.call_module(name, tuple(form[1]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    writes = formulas[torch.ops.shiftconv.shift_.default]
    module.graph.eliminate_dead_code(lambda node: node.op == "call_module" or node.target is writes or node.is_impure())
    _forget_unused(module)
    module.recompile()
    return module


def _form(module: fx.GraphModule, node: fx.Node) -> tuple[nn.Module, Sequence[Any]] | None:
    """A module for what ``node`` computes, and its arguments, if its offsets are known."""
    ops = torch.ops.shiftconv
    if node.target in (ops.active_shift_backward.default, ops.round_offset.default):
        return None
    schema = [argument.name for argument in node.target._schema.arguments]  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    named: dict[str, Any] = {**dict(zip(schema, node.args, strict=False)), **node.kwargs}
    if "offset" not in named:
        return None
    offset, x = _known(module, named["offset"]), named["x"].meta.get("val", node.meta.get("val"))
    if offset is None or x is None or named.get("transpose") or named.get("derivative"):
        return None
    offset = offset.detach()
    if node.target is ops.shift_.default:
        form = form_of(offset, Place(named["padding"]), x)
        return None if form is None else (InPlaceForm(form, len(offset)), [named["x"]])
    if node.target is ops.shift_linear.default:
        form = form_of(offset, Place(named["mode"], stride=named["stride"]), x)
        arguments = [named[name] for name in ("x", "weight", "bias", "residual")]
        return None if form is None else (MixForm(form, named["relu"]), arguments)
    form = form_of(offset, Place(named["mode"], named.get("geometry", ())), x, named.get("rounded", True))
    return None if form is None else (form, [named["x"]])


def _known(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a tensor that depends on no input of the program."""
    if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_function"):
        return None
    if node.op == "get_attr":
        value: Any = module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value
    known = {argument: _known(module, argument) for argument in node.all_input_nodes}
    if any(value is None for value in known.values()) or not callable(node.target) or node.is_impure():
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: known[argument])
    return node.target(*args, **kwargs)


def _forget_unused(module: fx.GraphModule) -> None:
    """Drop the offsets that nothing reads any more, so that they do not travel along."""
    used = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for name in names:
        if not any(name == path or name.startswith(path + ".") for path in used):
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
