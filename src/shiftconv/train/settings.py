"""The parts of a recipe: images, optimiser, mixing, sparsity, distillation. Frozen and checked; imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from shiftconv.names import unknown
from shiftconv.train.checks import flags, integer, number, one_of, optional, rising, text

OWN_DATA = ("digits", "cifar10", "cifar100", "folder")
TIMM_DATA = ("hfds/", "hfids/", "wds/", "tfds/", "torch/")  # prefixes of timm's readers
ScheduleName = Literal["step", "cosine", "constant"]
Interpolation = Literal["bicubic", "bilinear", "random"]
EraseMode = Literal["const", "rand", "pixel"]
Mean = Literal["imagenet", "inception"]
BadImages = Literal["skip", "stop"]
MixMode = Literal["batch", "pair", "elem"]
SparseRule = Literal["static", "set", "set_signed", "rigl", "snfs", "mixed"]
Allocation = Literal["uniform", "erk", "snip", "snip_layers", "grasp"]
Layers = Literal["all", "large_kernels", "pointwise"]
Decay = Literal["cosine", "linear", "constant"]
LogitLoss = Literal["none", "kd", "nkd", "dist"]
FeatureLoss = Literal["none", "smooth_l1", "mse", "mgd"]


@dataclass(frozen=True)
class Data:
    """Which images a run learns from.

    Attributes:
        name: digits (comes with scikit-learn, works offline), cifar10, cifar100, folder (any folder of images), or a
            data set by timm's prefix: hfds/NAME (Hugging Face), wds/NAME (WebDataset shards), tfds/NAME, torch/NAME.
        folder: Where the images are. CIFAR: the folder that holds, or shall hold, the download; default ./data. Folder:
            one with train/ and val/ (or validation/), perhaps test/, or one with a sub-folder per class, which is split
            80/10/10. wds/: the folder of the shards. hfds/, tfds/, torch/: where downloads are kept.
        train_split: Timm's prefixes: name of the training part.
        val_split: Timm's prefixes: name of the validation part.
        image_size: Side of the square images in pixels; none: 32 for digits and CIFAR, 224 for the others.
        workers: Processes that read images; none: 0 for digits and CIFAR, which stay in memory, 2 for the others. The
            numbers of a run do not depend on it, but of streams (hfids/, wds/, tfds/).
        val_share: Share of the training images put aside for validation, where the data set has no validation split.
        augment: Change the training images at random: crops, mirroring where flip allows it, and all that follows.
        flip: Mirror half of the training images; none: yes, but for digits.
        crop_padding: Digits and CIFAR: black pixels around the image before its random crop.
        crop_share: Share of the side of a validation image that is looked at; not for digits and CIFAR.
        interpolation: How training images are resized; not for digits and CIFAR.
        mean: Which mean and deviation images are normalised with, imagenet's or inception's; not for digits and CIFAR.
        color_jitter: How far brightness, contrast and saturation move; not with auto_augment, and not for digits
            and CIFAR.
        auto_augment: RandAugment and its like as timm writes them, such as rand-m9-mstd0.5-inc1; none: none.
        erase_prob: Share of the training images of which a rectangle is erased.
        erase_mode: What comes in its place: const (black), rand (one random colour), pixel (noise).
        erase_count: Rectangles at most.
        label_noise: Share of the training images, chosen once, that get the label of another class; to study noise.
        bad_images: A training image that cannot be read: skip (another one takes its place, and they are counted) or
            stop. One to validate or test on always stops the run.
    """

    name: str = "digits"
    folder: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    image_size: int | None = None
    workers: int | None = None
    val_share: float = 0.1
    augment: bool = True
    flip: bool | None = None
    crop_padding: int = 4
    crop_share: float = 0.875
    interpolation: Interpolation = "random"
    mean: Mean = "imagenet"
    color_jitter: float = 0.4
    auto_augment: str | None = None
    erase_prob: float = 0.0
    erase_mode: EraseMode = "pixel"
    erase_count: int = 1
    label_noise: float = 0.0
    bad_images: BadImages = "skip"

    def __post_init__(self) -> None:
        text("data.name", self.name)
        prefixed = self.name.startswith(TIMM_DATA) and not self.name.endswith("/")
        if self.name not in OWN_DATA and not prefixed:
            raise unknown("data set", self.name, (*OWN_DATA, *(f"{prefix}NAME" for prefix in TIMM_DATA)))
        if self.folder is not None and not isinstance(self.folder, str):
            raise TypeError(f"data.folder must be a path as text, got {self.folder!r}")
        if not self.folder and (self.name == "folder" or self.name.startswith("wds/")):
            raise ValueError(f"data.name {self.name!r} needs data.folder, the folder that holds the images")
        text("data.train_split", self.train_split)
        text("data.val_split", self.val_split)
        optional(integer, "data.image_size", self.image_size, 1)
        optional(integer, "data.workers", self.workers, 0)
        number("data.val_share", self.val_share, above=0, below=0.5)
        integer("data.crop_padding", self.crop_padding, 0)
        number("data.crop_share", self.crop_share, above=0, high=1)
        one_of("interpolation", self.interpolation, Interpolation)
        one_of("mean", self.mean, Mean)
        number("data.color_jitter", self.color_jitter, low=0)
        optional(text, "data.auto_augment", self.auto_augment)
        number("data.erase_prob", self.erase_prob, low=0, high=1)
        one_of("erase mode", self.erase_mode, EraseMode)
        integer("data.erase_count", self.erase_count, 1)
        number("data.label_noise", self.label_noise, low=0, high=1)
        one_of("way with bad images", self.bad_images, BadImages)
        flags("data", augment=self.augment)
        if self.flip is not None:
            flags("data", flip=self.flip)


@dataclass(frozen=True)
class Optim:
    """How the weights change.

    Attributes:
        name: The optimiser: sgd, adam, adamw, lamb, lion, or any other name of timm's, also with lookahead_ before it.
        lr: Learning rate at its highest.
        momentum: Momentum of sgd and rmsprop; the others have their own defaults.
        nesterov: Nesterov's momentum; sgd only.
        betas: Of adam and its kind; none: the optimiser's own.
        eps: Of adam and its kind; none: the optimiser's own.
        weight_decay: Weight decay.
        weight_decay_end: Weight decay at the end of the run, reached along a cosine; none: it is constant.
        decay_norms: Decay norms and biases too, as the ShiftResNet authors did; no: only weights with two or more axes.
        offset_lr_scale: What the rate of the offsets of learned shifts is multiplied by.
        offset_decay: Weight decay of these offsets.
        normalize_offsets: Scale the gradient of each channel's offset to unit length, as for active shifts.
        freeze_offsets_after: Share of the run after which the offsets stay, as for sparse shifts; none: never.
        layer_decay: Each level of the network has this times the rate of the next one; 1: the same.
        layer_decay_by: What a level is: blocks (some of them), or stages.
        layer_decay_levels: How many levels there are below the head; none: those of the network.
        schedule: step (times gamma after each milestone), cosine (down to min_lr) or constant.
        milestones: Schedule step: after how many finished epochs the rate drops.
        gamma: Schedule step: what each milestone multiplies the rate by.
        min_lr: Schedule cosine: the rate at the end.
        warmup_epochs: Epochs, fractions allowed, in which the rate rises in a line from warmup_lr to lr.
        warmup_lr: The rate of the first update of a warm-up.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float = 5e-4
    weight_decay_end: float | None = None
    decay_norms: bool = True
    offset_lr_scale: float = 1.0
    offset_decay: float = 0.0
    normalize_offsets: bool = False
    freeze_offsets_after: float | None = None
    layer_decay: float = 1.0
    layer_decay_by: Literal["blocks", "stages"] = "blocks"
    layer_decay_levels: int | None = None
    schedule: ScheduleName = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0

    def __post_init__(self) -> None:
        text("optim.name", self.name)
        one_of("schedule", self.schedule, ScheduleName)
        number("optim.lr", self.lr, above=0)
        number("optim.momentum", self.momentum, low=0, below=1)
        flags("optim", nesterov=self.nesterov, decay_norms=self.decay_norms, normalize_offsets=self.normalize_offsets)
        for name in ("weight_decay", "offset_lr_scale", "offset_decay", "min_lr", "warmup_epochs", "warmup_lr"):
            number(f"optim.{name}", getattr(self, name), low=0)
        optional(number, "optim.weight_decay_end", self.weight_decay_end, low=0)
        optional(number, "optim.eps", self.eps, above=0)
        optional(number, "optim.freeze_offsets_after", self.freeze_offsets_after, low=0, high=1)
        number("optim.gamma", self.gamma, above=0, high=1)
        number("optim.layer_decay", self.layer_decay, above=0, high=1)
        one_of("kind of level", self.layer_decay_by, Literal["blocks", "stages"])
        optional(integer, "optim.layer_decay_levels", self.layer_decay_levels, 1)
        object.__setattr__(self, "betas", _betas(self.betas))
        if not isinstance(self.milestones, tuple | list):
            raise TypeError(f"optim.milestones must be a list of whole numbers, got {self.milestones!r}")
        object.__setattr__(self, "milestones", tuple(self.milestones))  # YAML has lists only
        for milestone in self.milestones:
            integer("optim.milestones", milestone, 1)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones must rise, got {self.milestones}")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("optim.schedule 'step' needs optim.milestones; use 'constant' for a rate that never drops")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(f"optim.nesterov needs sgd with momentum, got {self.name} with {self.momentum}")


def _betas(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"optim.betas must be two numbers, got {value!r}")
    for beta in value:
        number("optim.betas", beta, low=0, below=1)
    return value[0], value[1]


@dataclass(frozen=True)
class Mix:
    """Two training images in one, by timm. Mixup (Zhang et al. 2018) blends them, CutMix (Yun et al. 2019) pastes.

    Attributes:
        mixup: Alpha of the Beta distribution that weighs both images; 0: no mixup.
        cutmix: The same for the share of the pasted rectangle; 0: no CutMix.
        cutmix_minmax: Limits of the rectangle's side as a share of the image's; none: by cutmix.
        prob: Share of the updates that mix.
        switch_prob: Where both are on: share of those that paste.
        mode: batch (one weight for all), pair or elem (one for each pair, or each image).
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, float] | None = None
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: MixMode = "batch"

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            number(f"mix.{name}", getattr(self, name), low=0)
        for name in ("prob", "switch_prob"):
            number(f"mix.{name}", getattr(self, name), low=0, high=1)
        object.__setattr__(self, "cutmix_minmax", rising("mix.cutmix_minmax", self.cutmix_minmax))
        one_of("way to mix", self.mode, MixMode)

    @property
    def on(self) -> bool:
        """Whether anything is mixed."""
        return (self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None) and self.prob > 0


@dataclass(frozen=True)
class Sparsity:
    """Which weights are zero; see ``shiftconv.sparse``.

    Attributes:
        density: Share of the weights that are active; 1: all, and the rest of these settings does nothing.
        rule: What moves the active ones: rigl, set, set_signed, snfs, mixed, or static for nothing.
        allocate: How layers share the density: erk, uniform, or by the first images snip, snip_layers, grasp.
        granularity: What is active or not: weight, kernel, kernel:4, channel, hidden (units), 2:4, fan_in.
        layers: Which layers: all, large_kernels, or pointwise (linear ones and 1x1 convolutions).
        prune_fraction: Share of the active weights that an update exchanges, at first.
        final_fraction: The same at the end.
        decay: How it falls: cosine, linear or constant.
        every_steps: Updates of the weights between two updates of the masks.
        warmup_epochs: Epochs, fractions allowed, before the masks first move.
        stop_fraction: Share of the run after which they stay.
        share_every: Parallel paths have one mask at each so many-th update, and go their own ways between; 1: always.
        start_density: The density falls from this one, cubically; none: it is constant.
        density_epochs: First and last epoch, fractions allowed, of that fall.
    """

    density: float = 1.0
    rule: SparseRule = "rigl"
    allocate: Allocation = "erk"
    granularity: str = "weight"
    layers: Layers = "all"
    prune_fraction: float = 0.3
    final_fraction: float = 0.0
    decay: Decay = "cosine"
    every_steps: int = 100
    warmup_epochs: float = 0.0
    stop_fraction: float = 0.75
    share_every: int = 1
    start_density: float | None = None
    density_epochs: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        number("sparse.density", self.density, above=0, high=1)
        one_of("sparse rule", self.rule, SparseRule)
        one_of("allocation", self.allocate, Allocation)
        one_of("layers", self.layers, Layers)
        one_of("decay", self.decay, Decay)
        text("sparse.granularity", self.granularity)
        for name in ("prune_fraction", "final_fraction", "stop_fraction"):
            number(f"sparse.{name}", getattr(self, name), low=0, high=1)
        integer("sparse.every_steps", self.every_steps, 1)
        integer("sparse.share_every", self.share_every, 1)
        number("sparse.warmup_epochs", self.warmup_epochs, low=0)
        optional(number, "sparse.start_density", self.start_density, above=0, high=1)
        object.__setattr__(self, "density_epochs", rising("sparse.density_epochs", self.density_epochs))
        number("sparse.density_epochs", self.density_epochs[0], low=0)


@dataclass(frozen=True)
class Distillation:
    """A trained network, the teacher, whose outputs the network learns from; see ``shiftconv.distill``.

    Attributes:
        teacher: Name of the network, ours or any of timm's; none: no distillation, and the rest does nothing.
        teacher_args: Its arguments.
        teacher_checkpoint: File of its weights, or of a whole run; none: timm's pretrained weights.
        teacher_amp: Mixed precision of the teacher: none, bf16, fp16, or same as the network.
        logits: Loss on the outputs: kd (Hinton et al. 2015), nkd (Yang et al. 2023), dist (Huang et al. 2022), none.
        temperature: What the outputs of both are divided by.
        alpha: Share of kd in the loss, the rest is the usual one; weight of the non-target part of nkd.
        beta, gamma: Weights of dist's relations between and within classes.
        hard: kd: learn the teacher's most probable class instead of its probabilities.
        standardize: Give the outputs of both mean 0 and deviation 1 first (Sun et al. 2024).
        keep_task_loss: nkd, dist: add the usual loss, too; kd has its share of it by alpha.
        features: Loss on the last feature maps: smooth_l1, mse, mgd (Yang et al. 2022), none.
        feature_weight: Its weight. The SLaK authors call it the learning rate of feature distillation.
        mask_share: mgd: share of the feature maps' channels that are hidden.
    """

    teacher: str | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    teacher_checkpoint: str | None = None
    teacher_amp: Literal["same", "none", "bf16", "fp16"] = "same"
    logits: LogitLoss = "kd"
    temperature: float = 1.0
    alpha: float = 0.5
    beta: float = 1.0
    gamma: float = 1.0
    hard: bool = False
    standardize: bool = False
    keep_task_loss: bool = True
    features: FeatureLoss = "none"
    feature_weight: float = 1.0
    mask_share: float = 0.5

    def __post_init__(self) -> None:
        optional(text, "distill.teacher", self.teacher)
        if not isinstance(self.teacher_args, dict):
            raise TypeError(f"distill.teacher_args must be a dict of named arguments, got {self.teacher_args!r}")
        optional(text, "distill.teacher_checkpoint", self.teacher_checkpoint)
        one_of("precision", self.teacher_amp, Literal["same", "none", "bf16", "fp16"])
        one_of("loss on logits", self.logits, LogitLoss)
        one_of("loss on features", self.features, FeatureLoss)
        number("distill.temperature", self.temperature, above=0)
        for name in ("beta", "gamma", "feature_weight"):
            number(f"distill.{name}", getattr(self, name), low=0)
        number("distill.alpha", self.alpha, low=0, **({"high": 1} if self.logits == "kd" else {}))
        number("distill.mask_share", self.mask_share, low=0, below=1)
        flags("distill", hard=self.hard, standardize=self.standardize, keep_task_loss=self.keep_task_loss)
        if self.teacher is not None and self.logits == "none" and self.features == "none":
            raise ValueError("distill.teacher needs distill.logits or distill.features; both are none")
        if self.teacher is None and self.teacher_checkpoint is not None:
            raise ValueError("distill.teacher_checkpoint needs distill.teacher, the name of the network in it")
