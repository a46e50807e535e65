"""What a mask masks: single weights, whole kernels, outputs, hidden units, or fixed patterns among them.

==============  ========================================================================================================
``weight``      single weights
``kernel``      whole kernels, ``[O, I]`` of a weight ``[O, I, kh, kw]``
``kernel:4``    the kernels of 4 neighbouring outputs together
``channel``     the weights and the bias of an output
``hidden``      an output of a layer with the input of the next one that alone reads it
``2:4``         single weights, exactly 2 of each 4 neighbouring inputs
``fan_in``      single weights, as many for each output
==============  ========================================================================================================

Sources: Li et al., arXiv:2401.12736 (kernels, shared by paths); Mishra et al. 2021, arXiv:2104.08378 (2:4); Lasby et
al. 2023, arXiv:2305.02299 (constant fan-in).
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]  # all convolutions, no public name

from shiftconv.names import unknown
from shiftconv.sparse.chains import Chain, chains
from shiftconv.sparse.group import Member, SparseGroup

Select = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]

KINDS = ("weight", "kernel", "channel", "hidden", "fan_in")
_PATTERN = re.compile(r"(\d+):(\d+)")
_CHUNKS = re.compile(r"kernel:(\d+)")
# What torch's layers call their weights; layers derived from them have parameters of other kinds.
_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CHOOSE = "choose layers that fit by groups(model, granularity, select=...), or sparse.layers of a recipe"
_DENSE_LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, _ConvNd)


@dataclass(frozen=True)
class Granularity:
    """The shape of the masks.

    Args:
        kind: weight, kernel, channel, hidden or fan_in; a pattern is of kind ``weight``.
        pattern: ``(n, m)``: exactly ``n`` of each ``m`` neighbouring inputs are active.
        chunk: neighbouring outputs that share an entry; kernel and channel only.
        share_paths: whether the parameters of one ``nn.ParameterList`` share a mask, as parallel paths do that are
            added; each has a mask of its own otherwise.
    """

    kind: str = "weight"
    pattern: tuple[int, int] | None = None
    chunk: int = 1
    share_paths: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("granularity", self.kind, [*KINDS, "2:4", "kernel:4"])
        if self.pattern is not None and (self.kind != "weight" or not 0 < self.pattern[0] <= self.pattern[1]):
            raise ValueError(f"a pattern n:m masks single weights and has 0 < n <= m, got {self}")
        if self.chunk < 1 or (self.chunk > 1 and self.kind not in ("kernel", "channel")):
            raise ValueError(f"chunk must be at least 1, and 1 unless kernels or channels are masked, got {self}")

    @classmethod
    def parse(cls, text: "str | Granularity") -> "Granularity":
        """The granularity of a name; see the module.

        Raises:
            ValueError: for an unknown name, with a did-you-mean.
        """
        if isinstance(text, Granularity):
            return text
        if match := _PATTERN.fullmatch(text):
            return cls("weight", pattern=(int(match[1]), int(match[2])))
        if match := _CHUNKS.fullmatch(text):
            return cls("kernel", chunk=int(match[1]))
        return cls(text)

    def __str__(self) -> str:
        if self.pattern:
            return f"{self.pattern[0]}:{self.pattern[1]}"
        return self.kind + (f":{self.chunk}" if self.chunk > 1 else "")


def groups(
    model: nn.Module, granularity: str | Granularity = "weight", select: Select | None = None
) -> list[SparseGroup]:
    """The masks of a model, all of them still full.

    Weights are those of linear layers, convolutions and attention, and parameters with four or more axes of other
    modules, such as the kernels of our large-kernel convolutions. Norms, biases, scales and embeddings are none.

    Args:
        model: any model.
        granularity: what a mask masks.
        select: which modules count, with all that is below them: a type, a tuple of types, or a predicate; by default
            all.

    Raises:
        TypeError: for parameters that are distributed in pieces, as those of FSDP are.
        ValueError: for no selected weight, or one that the granularity does not fit.
    """
    granularity = Granularity.parse(granularity)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise TypeError(
                f"{name} is a DTensor, as FSDP makes them; sparse training takes whole parameters, as those under "
                "DistributedDataParallel"
            )
    selected = {id(weight) for module in _selected(model, select) for _, weight, _ in weights_of(module)}
    if granularity.kind == "hidden":
        found = [_hidden(chain) for chain in chains(model) if id(chain.producer.weight) in selected]
    else:
        found = [
            _group(paths, owner, granularity)
            for paths, owner in _paths(model, granularity.share_paths)
            if id(paths[0][1]) in selected
        ]
    if not found:
        what = "weight is selected"
        if granularity.kind == "hidden":
            what = "layer is selected whose outputs only one other layer reads (try channel)"
        raise ValueError(f"no {what} in {type(model).__name__}; sparse training needs at least one")
    return found


def weights_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Name, weight and owner of each weight in a module that masks may prune, each once."""
    embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    seen = {id(embedding.weight) for embedding in embeddings}
    for prefix, owner in module.named_modules():
        layer = isinstance(owner, _DENSE_LAYERS)
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if layer:
                fits = parameter.ndim >= 2 and name.removeprefix(f"{prefix}.") in _WEIGHTS
            else:
                fits = parameter.ndim >= 4 and parameter.shape[0] > 1 and parameter[0].numel() > 1
            if fits and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter, owner


def _selected(model: nn.Module, select: Select | None) -> Iterator[nn.Module]:
    if select is None:
        yield model
    elif isinstance(select, type | tuple):
        yield from (module for module in model.modules() if isinstance(module, select))
    elif callable(select):
        yield from (module for module in model.modules() if select(module))
    else:
        raise TypeError(f"select must be types of modules or a function of a module, got {type(select).__name__}")


def _paths(model: nn.Module, share: bool) -> list[tuple[list[tuple[str, nn.Parameter]], nn.Module]]:
    """The weights, those that are paths of each other together, and who owns them."""
    found: list[tuple[list[tuple[str, nn.Parameter]], nn.Module]] = []
    lists: dict[nn.Module, list[tuple[str, nn.Parameter]]] = {}
    for name, weight, owner in weights_of(model):
        parallel = share and isinstance(owner, nn.ParameterList) and len({p.shape for p in owner}) == 1
        if parallel and owner in lists:
            lists[owner].append((name, weight))
            continue
        paths = [(name, weight)]
        found.append((paths, owner))
        if parallel:
            lists[owner] = paths
    return found


def _group(paths: list[tuple[str, nn.Parameter]], owner: nn.Module, granularity: Granularity) -> SparseGroup:
    (name, first), *_ = paths
    fixed = row = None
    by_output = granularity.pattern is not None or granularity.kind in ("channel", "fan_in")
    axis = int(by_output and isinstance(owner, _ConvTransposeNd))  # where its outputs are
    if axis and owner.groups != 1:
        raise ValueError(
            f"{name} is of a transposed convolution in groups, whose outputs {granularity} cannot tell apart"
        )
    inputs_last = granularity.pattern is not None and first.ndim > 2 and first.shape[1 - axis] > 1
    chunk = granularity.chunk
    members = [Member(name, weight, axis, chunk, inputs_last) for name, weight in paths]
    if first.shape[axis] % chunk:
        raise ValueError(f"{name} has {first.shape[axis]} outputs, which are no multiple of {chunk}; {_CHOOSE}")
    seen = members[0].view(first)
    shape = seen.shape
    if granularity.kind == "kernel":
        shape = seen.shape[:2]
    elif granularity.kind == "channel":
        shape = seen.shape[:1]
        bias = getattr(owner, "bias", None) if isinstance(owner, _DENSE_LAYERS) else None
        if isinstance(bias, nn.Parameter) and len(paths) == 1:
            members.append(Member(f"{name.removesuffix('weight')}bias", bias, chunk=chunk))
    elif granularity.kind == "fan_in":
        row = first.numel() // first.shape[axis]
    if granularity.pattern is not None:
        fixed, row = granularity.pattern
        if shape[-1] % row and not (first.shape[1 - axis] == 1 and first[0].numel() % row == 0):
            raise ValueError(
                f"{name} {[*first.shape]} has no multiple of {row} inputs, as {granularity} needs; {_CHOOSE}"
            )
    return SparseGroup(name, members, torch.Size(shape), row, fixed, paths=len(paths) > 1)


def _hidden(chain: Chain) -> SparseGroup:
    made, read = (dict(layer.named_parameters(recurse=False)) for layer in (chain.producer, chain.consumer))
    members = [Member(f"{chain.producer_name}.weight", made["weight"], redraw=True)]
    if "bias" in made:
        members.append(Member(f"{chain.producer_name}.bias", made["bias"]))
    members.append(Member(f"{chain.consumer_name}.weight", read["weight"], axis=1))
    return SparseGroup(f"{chain.producer_name} units", members, made["weight"].shape[:1])
