"""Where hidden units are: chains of a layer that makes them, what acts on each apart, and a layer that reads them.

    fc1 -> GELU -> Dropout -> fc2          conv -> BatchNorm -> ReLU -> depthwise conv -> 1x1 conv

A hidden unit is an output of the first layer, so an input of the last one, and nothing else reads it. One whose weights
are zero may be left out of both. Chains are found in the graphs that ``torch.fx`` traces, not by names. When in doubt
there is no chain: a layer that is used twice or shares parameters, one with hooks, parametrizations or a forward of its
own, a graph that is another one in training than in evaluation, or a module that cannot be traced. Only this is taken
for granted: a module that cannot be traced calls its children, not what these hold.
"""

# torch does not type everything it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import itertools
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from shiftconv.sparse.channelwise import (
    KeepChannels,
    Layout,
    Mixing,
    Step,
    acts_as_its_class,
    is_mixing,
    module_step,
    node_step,
)


@dataclass(frozen=True)
class Chain:
    """Hidden units: what makes them, what happens to them, and what reads them.

    Args:
        producer: its outputs are the units, the first axis of its weight.
        middle: what acts on each of them apart, in order: elementwise modules and functions, dropout, batch norms,
            pooling, depthwise convolutions, and those that are :class:`~shiftconv.sparse.channelwise.KeepChannels`.
            What only moves axes is left out.
        consumer: its inputs are the units, the second axis of its weight.
        producer_name: its qualified name in the model.
        consumer_name: likewise.
    """

    producer: Mixing
    middle: tuple[Step, ...]
    consumer: Mixing
    producer_name: str
    consumer_name: str

    @property
    def units(self) -> int:
        """How many there are."""
        return self.producer.weight.shape[0]


def chains(model: nn.Module) -> list[Chain]:
    """Find the hidden units of any model; it stays as it is.

    Args:
        model: any module; its ``forward`` is traced, and that of every module inside that has children.

    Returns:
        The chains, in the order of the modules that hold them. The consumer of one may be the producer of another.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"chains takes a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    result: list[Chain] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")  # those of modules that are tried with what they do not expect
        traces, uses = _trace_all(model)
        doubtful = _doubtful(model, uses)
        for trace in traces:
            for line in trace.lines:
                modules = [module for node in line if (module := trace.module(node)) is not None]
                if doubtful.isdisjoint(modules) and (middle := _middle(trace, line)) is not None:
                    producer, consumer = modules[0], modules[-1]
                    assert is_mixing(producer) and is_mixing(consumer)
                    result.append(Chain(producer, middle, consumer, names[producer], names[consumer]))
    return result


Line = list[fx.Node]


class _Tracer(fx.Tracer):
    """Takes every module as it is, but runs through plain sequences."""

    proxy_buffer_attributes = True  # else a norm that counts batches would count this one

    def __init__(self) -> None:
        super().__init__()
        self.sequences: set[nn.Module] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if type(m).forward is nn.Sequential.forward and not has_own_ways(m):
            self.sequences.add(m)
            assert callable(forward)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)  # pyright: ignore[reportArgumentType]


class _Trace:
    """The graph of a module whose children are taken as they are, in evaluation or in training."""

    def __init__(self, module: nn.Module, training: bool):
        shell = copy.copy(module)  # a forward that keeps something for later keeps it there
        for name, value in vars(shell).items():
            if isinstance(value, dict | list | set):
                vars(shell)[name] = copy.copy(value)
        shell.training = training
        tracer = _Tracer()
        self.nodes = [*tracer.trace(shell).nodes]
        self.sequences = tracer.sequences
        self._root = shell
        self.lines = [line for node in self.nodes if (line := self._line(node))]

    def module(self, node: fx.Node) -> nn.Module | None:
        """What the node calls, if that is a module."""
        return self._root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def uses(self) -> Counter[nn.Module]:
        """How often each module is called, or a tensor of it is read."""
        count = Counter(module for node in self.nodes if (module := self.module(node)) is not None)
        for node in self.nodes:
            if node.op == "get_attr":
                count[self._root.get_submodule(str(node.target).rpartition(".")[0])] += 1
        return count

    def _line(self, node: fx.Node) -> Line:
        """From a layer that mixes channels to the next one, where each node is read by the next one only."""
        if not is_mixing(self.module(node)):
            return []
        line = [node]
        while len(line[-1].users) == 1:
            line.append(next(iter(line[-1].users)))
            if is_mixing(self.module(line[-1])):
                return line
        return []


def _trace_all(model: nn.Module) -> tuple[list[_Trace], Counter[nn.Module]]:
    """In evaluation, with the lines that are there in training, too; and how often each module is used in all."""
    traces: list[_Trace] = []
    uses: Counter[nn.Module] = Counter()
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or next(module.children(), None) is None or "forward" in vars(module):
            continue
        try:
            trace, other = _Trace(module, False), _Trace(module, True)
        except Exception:  # whatever a forward does with what is no tensor
            continue
        inside |= trace.sequences & other.sequences
        uses += trace.uses() | other.uses()
        known = {_signature(line) for line in other.lines}
        trace.lines = [line for line in trace.lines if _signature(line) in known]
        traces.append(trace)
    return traces, uses


def _signature(line: Line) -> tuple[object, ...]:
    return tuple((node.op, node.target) for node in line)


def _doubtful(model: nn.Module, uses: Counter[nn.Module]) -> set[nn.Module]:
    """The modules that may be more, or used in more ways, than a graph shows."""
    owners = Counter(value for module in model.modules() for value in module.parameters(recurse=False))
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))

    def is_doubtful(module: nn.Module) -> bool:
        own = [*module.parameters()]
        counts = bool(own) or next(module.buffers(), None) is not None or isinstance(module, KeepChannels)
        if counts and (places[module] > 1 or uses[module] > 1 or any(owners[value] > 1 for value in own)):
            return True  # while a ReLU may serve in several places
        return any(map(has_own_ways, module.modules()))

    return {module for module in model.modules() if is_doubtful(module)}


def has_own_ways(module: nn.Module) -> bool:
    """Whether calling it does more than its class says: hooks, parametrizations, or a forward of its own."""
    hooks = (
        module._forward_hooks,  # pyright: ignore[reportPrivateUsage]
        module._forward_pre_hooks,  # pyright: ignore[reportPrivateUsage]
        module._backward_hooks,  # pyright: ignore[reportPrivateUsage]
        module._backward_pre_hooks,  # pyright: ignore[reportPrivateUsage]
    )
    return any(hooks) or is_parametrized(module) or "forward" in vars(module)


def _middle(trace: _Trace, line: Line) -> tuple[Step, ...] | None:
    """What acts on each unit apart between both ends of a line; None if anything there does not, or does not fit."""
    producer, consumer = trace.module(line[0]), trace.module(line[-1])
    assert is_mixing(producer) and is_mixing(consumer)
    if not acts_as_its_class(producer) or not acts_as_its_class(consumer):
        return None
    layout = Layout.of_output(producer, line[0])
    steps: list[Step] = []
    for before, node in itertools.pairwise(line):
        module = trace.module(node)
        if module is not None and (node.args != (before,) or node.kwargs):
            return None
        if node is line[-1]:
            break
        each = node_step(node, layout) if module is None else module_step(module, layout)
        if each is None:
            return None
        step, layout = each
        if step is not None:
            steps.append(step)
    return (*steps,) if layout.fits(consumer) else None
