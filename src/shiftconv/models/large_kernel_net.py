"""The network that all families with large kernels are: a stem, four stages of :class:`Block`, a norm, a classifier.

    patch    stem of one 4x4 convolution, then a 2x2 one with stride 2 between stages      ConvNeXt, SLaK
    convs    stem of two 3x3 convolutions with stride 2, then another one between stages   UniRepLKNet, ShiftwiseConv

Sources: Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545; Ding et al., "UniRepLKNet", arXiv:2311.15599.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Unpack

import torch
from timm.layers.norm import LayerNorm2d
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from shiftconv.models.large_kernel_block import CONVNEXT, Block, BlockStyle, Mixer, fold_affine
from shiftconv.models.trunk import GlobalPool, HeadArgs, Trunk, TrunkArgs, drop_path_rates
from shiftconv.nn.large_kernel import DepthwiseBranch

Depths = tuple[int, int, int, int]


class NetArgs(TrunkArgs, total=False):
    """The arguments that all of these networks share, beside those of any network.

    ``drop_path_rate``: stochastic depth of the last block, growing linearly from 0 at the first one. ``layer_scale``:
    what the scale of each block starts from, None or 0 for none. ``head_init_scale``: multiplies the first weights of
    the classifier. ``feature_norm``: each stage has a layer norm for what ``features_only`` gives, as backbones for
    dense tasks have.
    """

    drop_path_rate: float
    layer_scale: float | None
    head_init_scale: float
    feature_norm: bool


class Entry(NamedTuple):
    """How images come in, and how maps become smaller between stages; both of ``(in_chs, chs)``."""

    stem: Callable[[int, int], nn.Module]
    narrow: Callable[[int, int], nn.Module]


class Stage(nn.Module):
    """What makes the map smaller, and the blocks that follow. ``[N, C, H, W]`` to ``[N, C', H / s, W / s]``.

    Args:
        downsample: makes the map smaller; of the first stage the stem does.
        blocks: what follows.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]):
        super().__init__()
        self.downsample, self.blocks = downsample, nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class LargeKernelNet(Trunk):
    """A network for images ``[N, in_chans, H, W]`` of 32 pixels and more, which gives ``[N, num_classes]``.

    Answers to timm's feature, head and checkpointing protocols. Its maps are channels_last inside, whatever the images
    are: the linear layers and norms take most of the time, and want them so.

    Args:
        block: makes block ``j`` of stage ``i``, of ``dim`` channels, with a drop path rate.
        depths: blocks of each stage.
        dims: channels of each stage.
        entry: how maps become smaller.
        drop_path_rate: see :class:`NetArgs`, as for the next two.
        head_init_scale: see there.
        feature_norm: see there.
        in_chans: channels of the images.
        head: see :class:`~shiftconv.models.trunk.HeadArgs`.
    """

    def __init__(
        self,
        block: Callable[[int, int, int, float], nn.Module],
        depths: Sequence[int],
        dims: Sequence[int],
        entry: Entry,
        *,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        feature_norm: bool = False,
        in_chans: int = 3,
        **head: Unpack[HeadArgs],
    ):
        super().__init__(in_chans)
        self.stem, self.stages = entry.stem(in_chans, dims[0]), nn.Sequential()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            downsample = entry.narrow(dims[i - 1], dims[i]) if i else nn.Identity()
            self.stages.append(Stage(downsample, [block(i, j, dims[i], rate) for j, rate in enumerate(rates)]))
            self.feature_info.append(dict(num_chs=dims[i], reduction=4 * 2**i, module=f"stages.{i}"))
        self.feature_norms = nn.ModuleList(LayerNorm2d(dim) for dim in dims) if feature_norm else None
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head_init_scale = head_init_scale
        for module in self.modules():
            self._initialise(module)
        self._add_head(dims[-1], **head)

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._initialise(self.linear)
        with torch.no_grad():
            for value in self.linear.parameters():
                value.mul_(self.head_init_scale)

    def _initialise(self, module: nn.Module) -> None:
        """Weights normally distributed with a deviation of 0.02, biases 0, as in ConvNeXt; depthwise kernels too."""
        if isinstance(module, nn.Conv2d | nn.Linear | DepthwiseBranch):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Make the network fast for inference, in place: every branch, norm and scale that can be folded is folded.

        In evaluation mode the outputs stay the same up to rounding. The state dict is another one, and training goes
        without the normalisations.
        """
        for stage in self.stages:
            assert isinstance(stage, Stage)
            match [*stage.downsample.children()]:
                case [nn.LayerNorm() as norm, nn.Conv2d() as conv]:
                    fold_affine(norm, conv)
            for block in stage.blocks:
                if isinstance(block, Block):
                    block.reparameterize()
        match self.norm, self.linear:
            case nn.LayerNorm() as norm, nn.Linear(in_features=self.num_features) as linear:
                fold_affine(norm, linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map, ``[N, C, H, W]``, before its norm."""
        self._check_images(x)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = self._stage(stage, x)
        return x

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if isinstance(stage, Stage) and self.grad_checkpointing:
            return self._through(stage.blocks, stage.downsample(x))
        return stage(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if x.ndim == 2:
            x = self.norm(x.unflatten(1, (-1, self.num_features))).flatten(1)  # two parts if means and maxima are given
        else:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.head_drop(x)
        return x if pre_logits else self.linear(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What the stages give, ``[N, C, H, W]`` each: the protocol of timm's ``features_only``.

        Args:
            x: images.
            indices: of the stages; an integer for the last so many, None for all.
            norm: nothing; the maps are normalised where the network was made with ``feature_norm``.
            stop_early: leave out the stages after the last one that is asked for.
            output_fmt: NCHW; there is no other.
            intermediates_only: leave out the last map.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be NCHW, got {output_fmt!r}")
        self._check_images(x)
        wanted, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = self._stage(stage, x)
            if i in wanted:
                maps.append(x if self.feature_norms is None else self.feature_norms[i](x))
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages at ``indices`` do not need, the head with ``prune_head``; gives them counted from 0."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_head or cut:
            self.num_features = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        if prune_norm or cut:
            self.norm = nn.Identity()  # it is for the pooled last map only
            self.feature_norms = self.feature_norms and self.feature_norms[: last + 1]
        return wanted

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """How timm groups parameters for layer-wise learning rates: as ConvNeXt's fine-tuning, or ``coarse`` by stages.

        Three blocks of the third stage, the long one, are one group; its downsampling goes with the first three. The
        coarse groups are the stages, and stem with all downsampling the first.
        """
        return _stage_group if coarse else _block_group

    def no_weight_decay(self) -> set[str]:
        """The parameters without weight decay whatever a recipe says: the coefficients of placed kernels."""
        return {name for name, _ in self.named_parameters() if name.endswith("_coefficient")}


_LAST_STAGE = 1e6  # after every block of the third stage, before the head


def _stage_group(name: str) -> float:
    match name.split("."):
        case ["stages", stage, "blocks", *_]:
            return int(stage) + 1
        case ["stem", *_] | ["stages", *_]:
            return 0
        case _:
            return math.inf


def _block_group(name: str) -> float:
    match name.split("."):
        case ["stem", *_]:
            return 0
        case ["stages", "2", "blocks", block, *_]:
            return 3 + int(block) // 3
        case ["stages", "3", *_]:
            return _LAST_STAGE
        case ["stages", stage, *_]:
            return int(stage) + 1
        case _:
            return math.inf


def _patch(in_chs: int, chs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chs, chs, 4, 4), LayerNorm2d(chs))


def _narrow_patch(in_chs: int, chs: int) -> nn.Sequential:
    return nn.Sequential(LayerNorm2d(in_chs), nn.Conv2d(in_chs, chs, 2, 2))


def _convs(in_chs: int, chs: int) -> nn.Sequential:
    return nn.Sequential(*_narrow_conv(in_chs, chs // 2), nn.GELU(), *_narrow_conv(chs // 2, chs))


def _narrow_conv(in_chs: int, chs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chs, chs, 3, 2, 1), LayerNorm2d(chs))


PATCH, CONVS = Entry(_patch, _narrow_patch), Entry(_convs, _narrow_conv)
"""The two of above."""


def network(
    depths: Sequence[int],
    dims: Sequence[int],
    mix: Callable[[int, int, int], Mixer],
    width: float = 1.0,
    style: BlockStyle = CONVNEXT,
    entry: Entry = PATCH,
    layer_scale: float | None = 1e-6,
    **net: Any,
) -> LargeKernelNet:
    """The network of ``dims`` times ``width`` channels whose blocks mix over space by ``mix(stage, index, channels)``.

    Raises:
        ValueError: a width that leaves no channel.
    """
    if len(depths) != len(dims):
        raise ValueError(f"depths and dims must have one entry for each stage, got {list(depths)} and {list(dims)}")
    scaled = [int(dim * width) for dim in dims]  # rounded down, as the authors round
    if min(scaled) < 1:
        raise ValueError(f"width={width} leaves no channel in a stage of {min(dims)}")

    def block(stage: int, index: int, dim: int, drop_path: float) -> Block:
        return Block(dim, mix(stage, index, dim), style, layer_scale, drop_path)

    return LargeKernelNet(block, depths, scaled, entry, **net)


def per_stage(name: str, sizes: Sequence[Any], stages: int) -> tuple[Any, ...]:
    """``sizes``, if there is one for each stage."""
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name} must be a sequence of {stages}, one for each stage, got {sizes!r}")
    if len(sizes) != stages:
        raise ValueError(f"{name} must have one entry for each of the {stages} stages, got {list(sizes)}")
    return tuple(sizes)


def imagenet_cfg(paper: str, origin: str, **more: Any) -> dict[str, Any]:
    """Timm's configuration of a network for ImageNet whose input layer is ``stem.0``."""
    return dict(
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_classes=1000,
        first_conv="stem.0",
        classifier="linear",
        paper_ids=paper,
        origin_url=origin,
        **more,
    )
