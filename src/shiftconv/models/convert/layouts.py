"""The authors' state-dict keys of the networks with large kernels, and ours: one table, read in both directions.

``{}`` stands for one part of a key between dots, ``{even}`` and ``{odd}`` for such numbers. A layout is found by the
keys that it explains.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, reduce
from typing import NamedTuple


class Rule(NamedTuple):
    """A pattern of the authors' keys, ours, and their shape where it differs from ours by axes of length 1."""

    theirs: str
    ours: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """The keys of one network of the authors'.

    Attributes:
        rules: the first one that matches a key counts.
        ghosts_last: whether blocks put the channels that pass unchanged last.
        merges: what the authors merge for inference, see :mod:`~shiftconv.models.convert.merged`.
    """

    rules: tuple[Rule, ...]
    ghosts_last: bool = False
    merges: tuple[str, ...] = ()

    def to_ours(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Our key for each of theirs; None where no rule matches."""
        return {key: _translated(key, [(rule.theirs, rule.ours) for rule in self.rules]) for key in keys}

    def to_theirs(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Their key for each of ours; None where they have none."""
        return {key: _translated(key, [(rule.ours, rule.theirs) for rule in self.rules]) for key in keys}

    def shape_of(self, key: str) -> tuple[int, ...] | None:
        """The shape that one of their keys has beyond ours, -1 in the place of the numbers."""
        return next((rule.shape for rule in self.rules if _pattern(rule.theirs).fullmatch(key)), None)


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    kinds = {r"\{\}": r"([^.]+)", r"\{even\}": r"(\d*[02468])", r"\{odd\}": r"(\d*[13579])"}
    return re.compile(reduce(lambda text, kind: text.replace(kind, kinds[kind]), kinds, re.escape(pattern)))


def _translated(key: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for source, target in pairs:
        if match := _pattern(source).fullmatch(key):
            return re.sub(r"\{\w+\}", "{}", target).format(*match.groups())
    return None


_NET = (
    Rule("downsample_layers.0.{}.{}", "stem.{}.{}"),
    Rule("downsample_layers.{}.{}.{}", "stages.{}.downsample.{}.{}"),
    Rule("norm.{}", "norm.{}"),
    Rule("head.{}", "linear.{}"),
    Rule("norm{}.{}", "feature_norms.{}.{}"),
)
_STAGE = "stages.{}.{}."
_BLOCK = "stages.{}.blocks.{}."


def _in_block(*rules: Rule) -> tuple[Rule, ...]:
    return tuple(Rule(_STAGE + theirs, _BLOCK + ours, shape) for theirs, ours, shape in rules)


def _branch(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """A depthwise kernel and its norm."""
    return Rule(f"{theirs}.conv.weight", f"{ours}.weight"), Rule(f"{theirs}.bn.{{}}", f"{ours}.norm.{{}}")


def _conv_norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """A convolution and its norm."""
    return Rule(f"{theirs}.conv.{{}}", f"{ours}.conv.{{}}"), Rule(f"{theirs}.bn.{{}}", f"{ours}.norm.{{}}")


_CONVNEXT = _NET + _in_block(
    Rule("gamma", "gamma"),
    Rule("norm.{}", "norm.{}"),
    Rule("pwconv1.{}", "fc1.{}"),
    Rule("pwconv2.{}", "fc2.{}"),
)
_UNIREP = _NET + _in_block(
    Rule("gamma", "gamma"),
    Rule("norm.{}", "norm.{}"),
    Rule("se.down.{}", "squeeze.fc1.{}"),
    Rule("se.up.{}", "squeeze.fc2.{}"),
    Rule("pwconv1.1.{}", "fc1.{}"),
    Rule("act.1.gamma", "response_norm.weight", (1, 1, 1, -1)),
    Rule("act.1.beta", "response_norm.bias", (1, 1, 1, -1)),
    Rule("pwconv2.0.{}", "fc2.{}"),
    Rule("pwconv2.2.{}", "norm2.{}"),
)
_SMALL = (
    Rule("large_kernel.small_conv.conv.weight", "mix.small_weight"),
    Rule("large_kernel.small_conv.bn.{}", "mix.small_norm.{}"),
)
_SHIFTWISE = _in_block(
    Rule("large_kernel.LoRAs.{}.weight", "mix.weights.{}"),
    Rule("large_kernel.bn_lora1.{}", "mix.wide_norm.{}"),
    Rule("large_kernel.bn_lora2.{}", "mix.tall_norm.{}"),
    Rule("large_kernel.bn_small.{}", "mix.small_norm.{}"),
)

LAYOUTS: dict[str, Layout] = {
    "convnext": Layout(
        (
            *_NET[:2],
            Rule("norm.{}", "head.norm.{}"),
            Rule("head.{}", "head.fc.{}"),
            *_in_block(
                Rule("gamma", "gamma"),
                Rule("dwconv.{}", "conv_dw.{}"),
                Rule("norm.{}", "norm.{}"),
                Rule("pwconv{}.{}", "mlp.fc{}.{}"),
            ),
        )
    ),
    "slak": Layout(
        _CONVNEXT
        + _in_block(
            *_branch("large_kernel.LoRA1", "mix.tall"),
            *_branch("large_kernel.LoRA2", "mix.wide"),
            *_branch("large_kernel.lkb_origin", "mix.large"),
            *_branch("large_kernel.small_conv", "mix.small"),
        ),
        merges=("lkb_reparam",),
    ),
    "slak_split": Layout(
        _CONVNEXT
        + _in_block(
            Rule("large_kernel.LoRA1.split_convs.weight", "mix.tall_weights.0"),
            Rule("large_kernel.LoRA2.split_convs.weight", "mix.weights.0"),
            Rule("large_kernel.LoRA1.bn.{}", "mix.tall_norm.{}"),
            Rule("large_kernel.LoRA2.bn.{}", "mix.wide_norm.{}"),
            *_SMALL,
        )
    ),
    "slak_weighted": Layout(
        _CONVNEXT
        + _in_block(
            Rule("large_kernel.LoRA.split_convs.weight", "mix.weights.0"),
            Rule("large_kernel.LoRA.lora1.weight", "mix.wide_coefficient", (1, -1, 1, 1)),
            Rule("large_kernel.LoRA.lora2.weight", "mix.tall_coefficient", (1, -1, 1, 1)),
            Rule("large_kernel.LoRA.bn_lora1.{}", "mix.wide_norm.{}"),
            Rule("large_kernel.LoRA.bn_lora2.{}", "mix.tall_norm.{}"),
            *_SMALL,
        )
    ),
    "slak_shuffled": Layout(
        _CONVNEXT
        + _in_block(
            Rule("large_kernel.LoRA.split_convs.{}.weight", "mix.weights.{}"),
            Rule("large_kernel.LoRA.bn_lora1.{}", "mix.wide_norm.{}"),
            Rule("large_kernel.LoRA.bn_lora2.{}", "mix.tall_norm.{}"),
            Rule("large_kernel.LoRA.bn_lora.{}", "mix.norm.{}"),
            Rule("large_kernel.LoRA.bn_small.{}", "mix.small_norm.{}"),
            Rule("se.0.down.{}", "squeeze.fc1.{}"),
            Rule("se.0.up.{}", "squeeze.fc2.{}"),
        ),
        ghosts_last=True,
    ),
    "shiftwise_v1": Layout(_CONVNEXT + _SHIFTWISE, ghosts_last=True, merges=("LoRA",)),
    "shiftwise": Layout(_UNIREP + _SHIFTWISE, ghosts_last=True, merges=("LoRA",)),
    "unireplknet": Layout(
        _UNIREP
        + _in_block(
            Rule("dwconv.weight", "mix.large.weight"),
            Rule("dwconv.lk_origin.weight", "mix.dense.weight"),
            Rule("dwconv.origin_bn.{}", "mix.dense.norm.{}"),
            Rule("dwconv.dil_conv_{}.weight", "mix.dilated.{}.weight"),
            Rule("dwconv.dil_bn_{}.{}", "mix.dilated.{}.norm.{}"),
        ),
        merges=("pwconv2", "dwconv", "lk_origin"),
    ),
    "replknet": Layout(
        (
            *_conv_norm("stem.{}", "stem.{}"),
            *(
                rule
                for i in range(3)
                for rule in _conv_norm(f"transitions.{i}.{{}}", f"stages.{i + 1}.downsample.{{}}")
            ),
            *_conv_norm("stages.{}.blocks.{}.pw{}", "stages.{}.blocks.{}.pw{}"),
            *_branch("stages.{}.blocks.{}.large_kernel.lkb_origin", "stages.{}.blocks.{}.mix.large"),
            *_branch("stages.{}.blocks.{}.large_kernel.small_conv", "stages.{}.blocks.{}.mix.small"),
            Rule("stages.{}.blocks.{even}.prelkb_bn.{}", "stages.{}.blocks.{even}.norm.{}"),
            Rule("stages.{}.blocks.{odd}.preffn_bn.{}", "stages.{}.blocks.{odd}.norm.{}"),
            Rule("stages.{}.norm.{}", "feature_norms.{}.{}"),
            Rule("norm.{}", "norm.{}"),
            Rule("head.{}", "linear.{}"),
        ),
        merges=("lkb_reparam",),
    ),
}
"""By our name of the family; that of ConvNeXt is timm's, and so are its keys."""


def layout_of(keys: Collection[str]) -> str | None:
    """The name of the layout that explains most of ``keys``, and a layer that mixes among them; None if none does."""
    best, most = None, 0
    for name, layout in LAYOUTS.items():
        ours = [key for key in layout.to_ours(keys).values() if key is not None]
        if len(ours) > most and any(".mix." in key or ".conv_dw." in key for key in ours):
            best, most = name, len(ours)
    return best
