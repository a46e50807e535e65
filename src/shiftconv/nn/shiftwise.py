"""Shift-wise convolution: a large kernel made of many small ones, each of which is used in several places.

Source: Li et al., "ShiftwiseConv: Small Convolutional Kernel with Large Kernel Effect", CVPR 2025, arXiv:2401.12736;
most variants are from its first version, arXiv:2401.12736v1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftconv.names import unknown
from shiftconv.nn import arrangement
from shiftconv.nn.arguments import positive
from shiftconv.nn.arrangement import VARIANTS, ShiftwiseVariant, by_way, insert, select
from shiftconv.nn.cross_kernels import CrossConv2d, CrossKernels, is_fixed, scale_and_shift
from shiftconv.ops.compose import Padding, compose, composed_padding, exact_dtype, placements, slot_count
from shiftconv.ops.cross_conv import cross_conv
from shiftconv.ops.depthwise import depthwise_conv
from shiftconv.ops.shift_sum import shift_sum

_BRANCHES = ("tall", "wide", "small")


class ShiftwiseConv2d(nn.Module):
    """Depthwise convolution of ``[N, C, H, W]`` whose tall, wide and small kernel are composed of ``s x s`` kernels.

    Every convolved channel has ``S = ceil(kernel_size / s)`` small kernels. They stand side by side in the wide kernel,
    on top of each other in the tall one, and one of them is the small one; ``num_shifts`` random arrangements are
    added. Each branch is normalised, and their sum is added to the input. The kernels are composed from the weights
    (:func:`shiftconv.ops.compose`), so neither paths nor shifts cost anything.

    Where the small kernels stand is drawn with a seed of the variant's own and saved in the state dict, as is the
    choice of ghosts. The weights start as in the papers' networks, normally distributed with a deviation of 0.02.

    Args:
        dim: ``C``.
        kernel_size: of the large kernels.
        small_kernel_size: ``s``.
        num_paths: how many sets of weights are added to each other; they may be pruned apart.
        num_shifts: how many random arrangements are added.
        ghost_ratio: the share of channels that pass unchanged, in [0, 1).
        variant: ``plain`` (ShiftwiseConv), ``blur``, ``linear``, ``embedding``, ``shuffled``, ``weighted``, ``split``
            (all of the first version), or a :class:`ShiftwiseVariant`.
        branch_norm: whether each branch is normalised, by a batch norm.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1, an unknown variant, a share that leaves no channel, or several shifts in a variant
            that draws no order; in a call, an ``x`` of another shape.
    """

    active: Tensor
    ghosts: Tensor
    placement: Tensor
    tall_constant: Tensor | None
    wide_constant: Tensor | None
    small_constant: Tensor | None

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        small_kernel_size: int = 3,
        num_paths: int = 1,
        num_shifts: int = 1,
        ghost_ratio: float = 0.0,
        variant: str | ShiftwiseVariant = "plain",
        branch_norm: bool = True,
    ):
        super().__init__()
        self.dim, self.kernel_size = positive("dim", dim), positive("kernel_size", kernel_size)
        self.small_kernel_size = positive("small_kernel_size", small_kernel_size)
        self.num_paths, self.num_shifts = positive("num_paths", num_paths), positive("num_shifts", num_shifts)
        self.ghost_ratio, self.branch_norm = ghost_ratio, branch_norm
        self.variant = _variant(variant)
        self.slots = slot_count(kernel_size, small_kernel_size)
        if num_shifts > 1 and "shuffled" not in (self.variant.wide, self.variant.tall):
            raise ValueError(f"num_shifts must be 1 for kernels in their own order, got {num_shifts}")
        active, ghosts = arrangement.choose_ghosts(dim, ghost_ratio, self.variant.even, self.variant.seed)
        self.register_buffer("active", active.to(torch.get_default_device()))
        self.register_buffer("ghosts", ghosts.to(torch.get_default_device()))
        self.merged: CrossConv2d | None = None
        self._make_tables(len(active))
        self._make_weights(len(active))
        self._make_norms(len(active))
        self.register_load_state_dict_post_hook(_place)
        self.reset_parameters()

    def _make_tables(self, channels: int) -> None:
        variant = self.variant
        tables = arrangement.arrange(variant, channels, self.slots, self.num_shifts)
        orders = {"tall": variant.tall, "wide": variant.wide, "small": variant.small}
        self.drawn = [name for name in _BRANCHES if orders[name] not in ("ordered", "own")]
        for name in self.drawn:
            self.register_buffer(f"{name}_slots", getattr(tables, name).to(torch.get_default_device()))
        self.register_buffer("placement", torch.empty(0), persistent=False)
        each = (channels, self.slots, self.num_shifts)
        along = arrangement.sinusoids(self.num_shifts, channels * self.slots).view(each) if variant.constants else None
        self.register_buffer("tall_constant", along)
        self.register_buffer("wide_constant", None if along is None else along.clone())
        small = arrangement.sinusoids(self.num_shifts, channels)[:, None] if variant.constants else None
        self.register_buffer("small_constant", small)
        _place(self)

    def _make_weights(self, channels: int) -> None:
        def paths() -> nn.ParameterList:
            shape = (channels * self.slots, 1, self.small_kernel_size, self.small_kernel_size)
            return nn.ParameterList(torch.empty(shape) for _ in range(self.num_paths))

        variant = self.variant
        self.weights = paths()
        self.tall_weights = paths() if variant.separate else None
        own = variant.small == "own" and self.small_kernel_size < self.kernel_size
        size = (self.small_kernel_size,) * 2
        self.small_weight = nn.Parameter(torch.empty(channels, 1, *size)) if own else None
        self.has_small = own or variant.small != "own"
        linear, sigmoid = variant.coefficient == "linear", variant.coefficient == "sigmoid"
        each = (channels, self.slots, self.num_shifts)
        self.wide_coefficient = nn.Parameter(torch.empty(each)) if linear or sigmoid else None
        self.tall_coefficient = nn.Parameter(torch.empty(each)) if linear or sigmoid else None
        self.small_coefficient = nn.Parameter(torch.empty(channels, 1, self.num_shifts)) if linear else None

    def _make_norms(self, channels: int) -> None:
        def norm(present: bool) -> nn.BatchNorm2d | None:
            return nn.BatchNorm2d(channels) if present and self.branch_norm else None

        self.wide_norm, self.tall_norm, self.small_norm = norm(True), norm(True), norm(self.has_small)
        self.norm = norm(self.variant.total_norm)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, from ``generator`` or torch's default one; the tables stay."""
        if self.merged is not None:
            raise RuntimeError("a reparameterized ShiftwiseConv2d has no weights to draw; make a new one")
        for weight in (*self.weights, *(self.tall_weights or ()), self.small_weight):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        for coefficient in (self.wide_coefficient, self.tall_coefficient, self.small_coefficient):
            if coefficient is not None and self.variant.coefficient == "sigmoid":
                coefficient.uniform_(-1, 1, generator=generator)
            elif coefficient is not None:
                coefficient.fill_(1)
        for norm in self._norms().values():
            norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ShiftwiseConv2d takes a tensor [N, {self.dim}, H, W], got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"ShiftwiseConv2d takes x [N, {self.dim}, H, W], got {[*x.shape]}")
        fixed = self.variant.border == "full" and all(map(is_fixed, self._norms().values()))
        if self.merged is not None or fixed:
            # Kernels of the ghosts' own, one tap each, cost less than copies of the other channels there and back.
            y = self._folded().apply(x) if self.merged is None else self.merged(x)
            for name, constant in self._folded_constants().items():
                y = y + self._constant_map(name, constant, y)
            return select(y, self.order) if self.variant.ghosts_last else y
        if not len(self.ghosts):
            return self._normalised(x)
        y = self._normalised(select(x, self.active))
        if self.variant.ghosts_last:
            return torch.cat((y, select(x, self.ghosts).to(y.dtype)), 1)
        return insert(x.to(y.dtype), self.active, y)

    def _normalised(self, x: Tensor) -> Tensor:
        """The convolved channels ``[N, C', H, W]``, whose branches are normalised one by one."""
        norms = self._norms()
        maps = self._maps(x) if self.variant.border == "full" else self._maps_by_shifts(x)
        total = None
        for name, y in maps.items():
            y = norms[name](y) if name in norms else y
            total = y if total is None else total + y
        assert total is not None
        if self.norm is not None:
            total = self.norm(total)
        return total + x if self.variant.identity else total

    def _norms(self) -> dict[str, nn.BatchNorm2d]:
        """The normalisations that there are; by branch, and ``sum`` of their sum."""
        norms = {"tall": self.tall_norm, "wide": self.wide_norm, "small": self.small_norm, "sum": self.norm}
        return {name: norm for name, norm in norms.items() if norm is not None}

    def _weights_of(self, branch: str) -> Tensor:
        """The sum over the paths, ``[C' * S, 1, s, s]``."""
        paths = self.tall_weights if branch == "tall" and self.tall_weights is not None else self.weights
        total, *rest = paths  # a slice of the list would make new parameters
        for weight in rest:
            total = total + weight
        return total

    def _coefficient(self, branch: str) -> Tensor | None:
        """What each placed kernel is multiplied by, ``[C', S, R]``."""
        table = {"tall": self.tall_coefficient, "wide": self.wide_coefficient, "small": self.small_coefficient}[branch]
        if table is None:
            return None
        if self.variant.coefficient == "sigmoid":
            return table.sigmoid()
        return table.expand(-1, self.slots, -1)

    def _grid(self, branch: str) -> tuple[int, int]:
        square = 3 if self.variant.small == "square" else 1
        return {"tall": (self.slots, 1), "wide": (1, self.slots), "small": (square, square)}[branch]

    def _padding(self) -> tuple[Padding, ...]:
        padding = composed_padding(self.kernel_size, self.small_kernel_size, self._grid("small")[0])
        return padding if self.has_small else padding[:2]

    def _kernels(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The large kernels, ``[C', 1, kh, kw]``, in the order of the branches."""
        kernels: dict[str, Tensor] = {}
        if self.drawn:
            matrix = self.placement
            if self.variant.coefficient == "linear":
                matrix = torch.cat([self._placement_of(name, self._coefficient(name)) for name in self.drawn], 1)
            grids = [self._grid(name) for name in self.drawn]
            drawn = compose(self._weights_of("wide"), matrix, grids, dtype=dtype)
            kernels.update(zip(self.drawn, drawn, strict=True))
        for name in ("tall", "wide"):
            if name not in kernels:
                weight, coefficient = self._weights_of(name), self._coefficient(name)
                if coefficient is not None:
                    weight = weight.to(dtype) * coefficient.reshape(-1, 1, 1, 1)
                kernels[name] = compose(weight, None, self._grid(name), dtype=dtype)
        if self.small_weight is not None:
            kernels["small"] = self.small_weight.to(dtype)
        return {name: kernels[name] for name in _BRANCHES if name in kernels}

    def _placement_of(self, branch: str, coefficient: Tensor | None = None) -> Tensor:
        rows, columns = self._grid(branch)
        return placements(self.get_buffer(f"{branch}_slots"), rows * columns, coefficient)

    def _maps(self, x: Tensor) -> dict[str, Tensor]:
        """What each branch makes of ``x``, before its normalisation."""
        kernels = self._kernels(self.weights[0].dtype)
        results = cross_conv(
            x, kernels["tall"], kernels["wide"], kernels.get("small"), padding=self._padding(), summed=False
        )
        maps = dict(zip(kernels, results, strict=True))
        for name, constant in self._constants().items():
            maps[name] = maps[name] + self._constant_map(name, constant, x)
        return maps

    def _constants(self) -> dict[str, Tensor]:
        """The constants of each branch, added where several meet: ``[C', S]``, of the small one ``[C', 1]``."""
        tables = {"tall": self.tall_constant, "wide": self.wide_constant, "small": self.small_constant}
        each = {name: table.expand(-1, self.slots, -1) for name, table in tables.items() if table is not None}
        return {name: self._placement_of(name, table).sum(2) for name, table in each.items()}

    def _constant_map(self, branch: str, constant: Tensor, x: Tensor) -> Tensor:
        """What the constants of a branch add to its output for ``x``, broadcast along the other axes."""
        if branch == "small":
            return constant[:, :, None].to(x.dtype)
        axis = 2 if branch == "tall" else 3
        inside = arrangement.landing(self.slots, x.shape[axis], self.kernel_size, self.small_kernel_size, constant)
        return (constant @ inside).unsqueeze(5 - axis - 1).to(x.dtype)

    def _maps_by_shifts(self, x: Tensor) -> dict[str, Tensor]:
        """The same from the maps of the small kernels, of which only those centred on pixels of ``x`` count."""
        channels, size = x.shape[1], self.small_kernel_size
        crop = None if size % 2 else ((0, 1), (0, 1))  # an even kernel has one position more
        constants = {"tall": self.tall_constant, "wide": self.wide_constant, "small": self.small_constant}
        shared = self._small_maps(x, "wide")
        maps: dict[str, Tensor] = {}
        for name in _BRANCHES:
            if name == "small" and self.variant.small == "own":
                if self.small_weight is not None:
                    maps[name] = depthwise_conv(x, self.small_weight, padding=self._padding()[2])
                continue
            z = self._small_maps(x, name) if name == "tall" and self.variant.separate else shared
            tables = (self._coefficient(name), constants[name])
            coefficient, constant = (None if t is None else by_way(t.expand(-1, self.slots, -1)) for t in tables)
            maps[name] = shift_sum(z, self._offsets(name, channels), channels, coefficient, constant, crop)
        return maps

    def _small_maps(self, x: Tensor, branch: str) -> Tensor:
        """Every small kernel on its channel, ``[N, C' * S, H, W]``, one more each way if it is even."""
        weight = self._weights_of(branch)
        return F.conv2d(x, weight, padding=self.small_kernel_size // 2, groups=x.shape[1])

    def _offsets(self, branch: str, channels: int) -> Tensor:
        """How far :func:`shift_sum` moves the map of each small kernel, ``[R, C' * S, 2]``."""
        if branch in self.drawn:
            slots = self.get_buffer(f"{branch}_slots")
        else:
            slots = torch.arange(self.slots, device=self.active.device).view(1, -1, 1).expand(channels, -1, 1)
        return arrangement.slot_moves(branch, slots, self._grid(branch)[1], self.kernel_size, self.small_kernel_size)

    def _folded(self) -> CrossKernels:
        """Everything but the constants as kernels and a bias for all channels, by the running statistics."""
        kernels = self._kernels(exact_dtype(self.active))
        bias = None
        for name, norm in self._norms().items():
            scale, shift = scale_and_shift(norm)
            for branch in kernels if name == "sum" else [name]:
                kernels[branch] = kernels[branch] * scale.view(-1, 1, 1, 1)
            bias = shift if bias is None else (bias * scale if name == "sum" else bias) + shift
        padding = self._padding()
        if self.variant.identity:
            name = "small" if self.has_small else "tall"
            (top, bottom), (left, right) = padding[_BRANCHES.index(name)]
            one = kernels[name].new_ones(1, 1, 1, 1)
            kernels[name] = kernels[name] + F.pad(one, (left, right, top, bottom))
        folded = CrossKernels(kernels["tall"], kernels["wide"], kernels.get("small"), bias, padding).merged()
        return (folded.among(self.active, self.dim) if len(self.ghosts) else folded).to(self.weights[0].dtype)

    def _folded_constants(self) -> dict[str, Tensor]:
        """The constants as they are added to what the folded kernels compute, for all channels."""
        if self.merged is not None:
            tables = {"tall": self.tall_constant, "wide": self.wide_constant}
            return {name: table for name, table in tables.items() if table is not None}
        norms = self._norms()
        constants = self._constants()
        for name, constant in constants.items():
            for norm in (norms.get(name), norms.get("sum")):
                if norm is not None:
                    constant = constant * scale_and_shift(norm)[0][:, None]
            constants[name] = constant.new_zeros(self.dim, constant.shape[1]).index_copy(0, self.active, constant)
        return constants

    @property
    def order(self) -> Tensor:
        """The input channel of each output channel, ``[C]``."""
        if self.variant.ghosts_last:
            return torch.cat((self.active, self.ghosts))
        return torch.arange(self.dim, device=self.active.device)

    def equivalent_kernel(self) -> tuple[Tensor, Tensor]:
        """The module in evaluation mode as one dense depthwise convolution: kernel ``[C, 1, *K]`` and bias ``[C]``.

        Each extent of ``K`` is odd, ``2 * r + 1``, and entry ``r`` is the middle:
        ``conv2d(x[:, order], kernel, bias, padding=(r, r'), groups=C)``, where ``order`` is that of the input unless
        the variant puts ghosts last; their kernels are the identity. Differentiable.

        Raises:
            ValueError: a variant that is no convolution, as it adds constants or cuts its small maps at the border.
        """
        if self.variant.border != "full" or self.variant.constants:
            raise ValueError(f"no kernel is equivalent to {self.variant}: it is no convolution at the border")
        folded = self._folded() if self.merged is None else self.merged.kernels()
        dense = folded.dense()
        bias = dense.new_zeros(self.dim) if folded.bias is None else folded.bias
        return dense.index_select(0, self.order), bias.index_select(0, self.order)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold paths, normalisations and the input into a tall and a wide kernel with bias, in place, for inference.

        The small kernel goes into the tall one, unless it is a square of several. Where small maps are cut at the
        border, only the paths are merged. ``timm.models.reparameterize_model`` looks for this name.
        """
        if self.variant.border != "full":
            self.weights = nn.ParameterList([self._weights_of("wide").clone()])
            self.tall_weights = self.tall_weights and nn.ParameterList([self._weights_of("tall").clone()])
            self.num_paths = 1
        elif self.merged is None:
            kernels, constants = self._folded(), self._folded_constants()
            if constants:
                shift = constants["small"][:, 0]
                kernels = kernels._replace(bias=shift if kernels.bias is None else kernels.bias + shift)
                kernels = kernels.to(kernels.tall.dtype)
                self.tall_constant, self.wide_constant = constants["tall"], constants["wide"]
            for name in (*(f"{name}_slots" for name in self.drawn), "weights", *_TRAINED):
                delattr(self, name)
                setattr(self, name, None)
            self.drawn, self.placement = [], self.placement.new_empty(0)
            self.merged = CrossConv2d(kernels)

    def extra_repr(self) -> str:
        name = next((name for name, known in VARIANTS.items() if known == self.variant), self.variant)
        text = f"{self.dim}, {self.kernel_size}, small_kernel_size={self.small_kernel_size}"
        text += f", num_paths={self.num_paths}, num_shifts={self.num_shifts}, ghosts={len(self.ghosts)}"
        return f"{text}, variant={name!r}"


_TRAINED = (
    *("tall_weights", "small_weight", "small_constant"),
    *(f"{branch}_{part}" for branch in _BRANCHES for part in ("coefficient", "norm")),
    "norm",
)


def _variant(variant: str | ShiftwiseVariant) -> ShiftwiseVariant:
    if isinstance(variant, ShiftwiseVariant):
        return variant
    if not isinstance(variant, str):
        raise TypeError(f"variant must be a name or a ShiftwiseVariant, got {type(variant).__name__}")
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    return VARIANTS[variant]


def _place(module: nn.Module, incompatible: object = None) -> None:
    """Turn the tables of slots, new or just loaded, into the matrix that composes the kernels."""
    assert isinstance(module, ShiftwiseConv2d)
    if module.drawn:
        matrix = torch.cat([module._placement_of(name) for name in module.drawn], 1)
        module.placement = matrix.to(torch.int8 if module.num_shifts < 128 else torch.int32)
