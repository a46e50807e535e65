"""Weights from any checkpoint into a network, and from one file format or layout into another."""

import inspect
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from shiftconv import files
from shiftconv.models import create_model
from shiftconv.models.convert.checkpoint import Checkpoint, read_checkpoint
from shiftconv.models.convert.identity import COUNTER, Identity, compare, identify, verify
from shiftconv.models.convert.translate import Found, recognise, to_ours, to_theirs, unwrapped
from shiftconv.names import unknown

_StrPath = str | os.PathLike[str]
Names = Literal["ours", "authors", "authors-merged"]
"""Whose names the weights of a file have; ``authors-merged``: as the authors' code merges them for inference."""
# A file may say how its network is built, but not what else is read or downloaded.
_FORBIDDEN_ARGS = set(inspect.signature(timm.create_model).parameters)


@dataclass(frozen=True)
class Report:
    """What :func:`convert` read and wrote.

    Attributes:
        source: the file that was read.
        target: the file that was written.
        kind: of the source, see :class:`~shiftconv.models.convert.Checkpoint`.
        model: name of the network.
        model_args: its arguments.
        parameters: number of weights, buffers not counted.
        meta: what else the source said, such as ``epoch`` and ``acc``; ``unused``: what of it is not in the target.
        layout: whose keys the source had, by our name of their family; None if they were ours.
        merged: what had been merged for inference in it.
        assumed: the arguments that the source does not say, which are the published ones.
    """

    source: Path
    target: Path
    kind: str
    model: str
    model_args: dict[str, Any]
    parameters: int
    meta: dict[str, Any]
    layout: str | None = None
    merged: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def __str__(self) -> str:
        facts = "".join(f", {key} {self.meta[key]}" for key in ("epoch", "acc") if key in self.meta)
        what = f"{Identity(self.model, self.model_args)}, {self.parameters} parameters{facts}"
        text = f"{self.source} ({self.kind}) -> {self.target}: {what}"
        notes = [
            ("the authors' keys, with merged", self.merged),
            ("not in the file, so as published", self.assumed),
            ("not used", self.meta.get("unused", ())),
        ]
        return text + "".join(f"; {note}: {', '.join(words)}" for note, words in notes if words)


def load_checkpoint(model: nn.Module | None, path: _StrPath, ema: bool = False) -> nn.Module:
    """Fill ``model`` with the weights of a file, all of them; or build the network that the file holds.

    The keys may be ours or the authors', of a network that trains or of one merged for inference; SLaK's stripes load
    into split kernels and back. A network with ``features_only`` leaves the head of the file out, and keeps the norms
    of its features where the file has none.

    Args:
        model: a network of this package or of timm; None builds one from the file. Unchanged if there is an error.
        path: see :func:`~shiftconv.models.convert.read_checkpoint`.
        ema: see there.

    Returns:
        ``model``, or the new network, on the CPU and in training mode as ``create_model`` makes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or a weight is missing, left over or of another shape; says which, and
            which network the file holds instead.
    """
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f"model must be a network or None, got {type(model).__name__}")
    checkpoint = read_checkpoint(path, ema)
    model = _build(_identity(checkpoint, path)) if model is None else model
    inner = unwrapped(model)
    try:
        weights = _fitted(recognise(checkpoint.state_dict), model)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {type(inner).__name__}: {error}{_what_instead(checkpoint)}") from None
    inner.load_state_dict(weights)
    return model


def _fitted(found: Found, model: nn.Module) -> dict[str, Tensor]:
    """All that ``model`` needs, and no more.

    Raises:
        ValueError: says what is missing, left over or of another shape.
    """
    inner = unwrapped(model)
    needed, weights = inner.state_dict(), to_ours(found, model)
    if inner is not model:
        weights = _backbone(weights, needed)
    if (difference := compare(weights, needed)) and (twin := _trained_form(inner, needed)) is not None:
        twin.load_state_dict(_fitted(found, twin))
        twin.reparameterize()  # pyright: ignore[reportCallIssue]
        weights = twin.state_dict()
        difference = compare(weights, needed)
    if difference:
        raise ValueError(str(difference))
    return _with_counters(weights, needed)


def _backbone(weights: dict[str, Tensor], needed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the head and stages that a backbone lacks, and with the norms of its features as they are at first."""
    there = {_module(key) for key in needed}
    kept = {key: value for key, value in weights.items() if _module(key) in there}
    return kept | {key: needed[key] for key in needed if key.startswith("feature_norms.") and key not in kept}


def _module(key: str) -> str:
    """``stages.3`` of the key of one of its weights."""
    return ".".join(key.split(".")[:2])


def _trained_form(network: nn.Module, needed: dict[str, Tensor]) -> nn.Module | None:
    """The network as it was before it was reparameterized, if it was and says how it was made."""
    arguments, name = getattr(network, "model_args", None), getattr(network, "pretrained_cfg", {}).get("architecture")
    if name is None or not isinstance(arguments, dict) or not any(".mix.merged." in key for key in needed):
        return None
    return _build(Identity(name, arguments)).to(next(network.parameters()).dtype)


def _build(identity: Identity) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the first weights, soon replaced, must not move the global generator
        return create_model(identity.model, **identity.model_args)


def _identity(checkpoint: Checkpoint, path: _StrPath) -> Identity:
    """What the file says it holds, else what its shapes say; either way it fits."""
    name, arguments = checkpoint.meta.get("model"), checkpoint.meta.get("model_args", {})
    try:
        if name is None:
            return identify(checkpoint.state_dict)
        if not isinstance(name, str) or ":" in name:
            raise ValueError("the name of its network is not one that timm knows")
        if not isinstance(arguments, dict):
            raise ValueError("the arguments of its network are not a dict")
        if refused := _FORBIDDEN_ARGS & set(arguments):
            raise ValueError(f"a checkpoint must not set {', '.join(sorted(refused))}")
        identity = Identity(name, arguments)
        verify(identity, recognise(checkpoint.state_dict))
    except Exception as error:  # constructors were not written for arguments that a file makes up
        raise ValueError(f"cannot tell the network of {path}: {error}") from error
    return identity


def _what_instead(checkpoint: Checkpoint) -> str:
    try:
        return f"; it holds {identify(checkpoint.state_dict)}, which load_checkpoint(None, ...) builds"
    except ValueError:
        return ""


def _with_counters(state_dict: dict[str, Tensor], needed: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` in the order of ``needed``, with zeros for the counters that old files do not have."""
    zeros = {key: torch.zeros_like(need, device="cpu") for key, need in needed.items() if key.endswith(COUNTER)}
    return {key: state_dict[key] if key in state_dict else zeros[key] for key in needed}


def convert(
    source: _StrPath,
    target: _StrPath,
    names: Names = "ours",
    ema: bool = False,
    model: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> Report:
    """Write the weights of any checkpoint as safetensors or as a state dict of ``torch.save``.

    Args:
        source: see :func:`~shiftconv.models.convert.read_checkpoint`.
        target: ends in ``.safetensors``, with the network's name and arguments, and accuracy and epoch if known, in its
            metadata; or in ``.pth``. Replaced in one step if it exists: at no time it is half written.
        names: ``ours``, ``authors``, for the code of the network's authors, or ``authors-merged``, for that code once
            it has merged its branches; of those a ``.pth`` has the weights under "model", where that code looks.
        ema: see :func:`~shiftconv.models.convert.read_checkpoint`.
        model: the network, where the file does not say enough; found out unless given.
        model_args: its arguments.

    Raises:
        FileNotFoundError: no such source, or no folder for the target.
        ValueError: the source is not a network's checkpoint, the suffix is another, or the target is the source; the
            authors have no such network.
    """
    source, target = Path(source), Path(target)
    _check(source, target)
    if names not in get_args(Names):
        raise unknown("names", names, get_args(Names))
    checkpoint = read_checkpoint(source, ema)
    identity = _identity(checkpoint, source) if model is None else Identity(model, model_args or {})
    with torch.device("meta"):
        network = create_model(identity.model, **identity.model_args)
    try:
        found = recognise(checkpoint.state_dict)
        weights = _fitted(found, network)
    except ValueError as error:
        raise ValueError(f"{source} does not fit {identity}: {error}{_what_instead(checkpoint)}") from None
    if names != "ours":
        weights = to_theirs(weights, network, merge=names == "authors-merged")
    weights = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in weights.items()}
    meta = {key: value for key, value in checkpoint.meta.items() if key in ("epoch", "acc", "metrics")}
    if target.suffix == ".pth":
        torch.save(weights if names == "ours" else {"model": weights}, buffer := io.BytesIO())
        files.write(target, buffer.getbuffer())
    else:
        said = dict(format="pt", model=identity.model, model_args=json.dumps(identity.model_args))
        said |= dict(source=checkpoint.meta["kind"], **{key: json.dumps(value) for key, value in meta.items()})
        files.write(target, safetensors.torch.save(weights, said))
    unused = [*checkpoint.meta.get("unused", ()), *found.unused]
    count = sum(parameter.numel() for parameter in network.parameters())
    kind = checkpoint.meta["kind"]
    facts = meta | ({"unused": unused} if unused else {})
    assumed = _assumed(found) if model is None else ()
    what = (identity.model, identity.model_args, count, facts, found.layout, tuple(found.merged), assumed)
    return Report(source, target, kind, *what)


def _check(source: Path, target: Path) -> None:
    if target.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"the target must end in .safetensors or .pth, got {target}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} for {target.name}")
    if target.is_dir():
        raise ValueError(f"the target {target} is a folder")
    if source.exists() and target.exists() and source.samefile(target):
        raise ValueError(f"the target {target} is the source itself; give another name")


def _assumed(found: Found) -> tuple[str, ...]:
    """The arguments of the network that a file with the authors' keys does not tell for certain."""
    if found.layout in ("shiftwise", "shiftwise_v1"):
        return "num_shifts", "kernel_sizes"
    return ("kernel_sizes",) if found.layout in ("slak_weighted", "slak_shuffled", "slak_split") else ()
