"""Every flag of the authors' training commands, and every default that a command leaves alone, stands in a recipe.

``commands.yaml`` has the commands, word for word, and the defaults. Here is what each flag means.
"""

import inspect
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from shiftconv import recipes
from shiftconv.models import shiftwise, slak
from shiftconv.models.large_kernel_net import LargeKernelNet, network
from shiftconv.train.recipe import Recipe

Flags = dict[str, Any]

FACTS = yaml.safe_load((Path(__file__).parent / "commands.yaml").read_text())
COMMANDS: list[dict[str, Any]] = FACTS["commands"]
DEFAULTS: dict[str, Flags] = FACTS["defaults"]

_PLACES = "where images, weights and results lie"
_MACHINES = "how many machines there are and how they find each other"
_REPORTS = "what is evaluated, saved or logged, and how often"
_NOTHING = "does nothing in the original"
NEUTRAL: dict[str, str] = {
    **dict.fromkeys(["data_path", "eval_data_path", "output_dir", "log_dir", "train", "val", "data_dir"], _PLACES),
    **dict.fromkeys(["resume", "results_dir", "datadir", "model_key", "model_prefix"], _PLACES),
    **dict.fromkeys(["master_port", "world_size", "local_rank", "dist_on_itp", "dist_url", "device"], _MACHINES),
    **dict.fromkeys(["num_workers", "pin_mem", "model_ema_force_cpu"], _MACHINES),
    **dict.fromkeys(["nproc_per_node", "update_freq"], "a factor of the batch size, see batch_size"),
    **dict.fromkeys(["auto_resume", "save_ckpt", "save_ckpt_freq", "save_ckpt_num", "start_epoch"], _REPORTS),
    **dict.fromkeys(
        ["eval", "dist_eval", "disable_eval", "enable_wandb", "project", "wandb_ckpt", "verbose"], _REPORTS
    ),
    **dict.fromkeys(["test_batch_size", "mode", "Params"], _REPORTS),
    **dict.fromkeys(["redistribution", "resplit"], _NOTHING),
    **dict.fromkeys(["feature_n", "target_Lnorm", "flag", "alpha_mgd", "lambda_mgd"], "of other students or losses"),
    "momentum": "of SGD, while these programs run AdamW",
    "distill_resume": "loads the teacher, which --distill.teacher_checkpoint does",
    "nb_classes": "the data set has it",
    "use_embed_mask": "off; another way to share masks among paths",
}

_SLAKS = {f"SLaK_{size}": f"slak_{size}" for size in ("tiny", "small", "base")}
_NETWORKS = {
    **_SLAKS,
    "ShiftWise_v2_tiny": "shiftwise_tiny",
    "SLaK_pw_tiny": "slak_shuffled_tiny",
    "SLaK_pww_tiny": "slak_weighted_tiny",
    "resnet50": "resnet50",
}


def whose(flags: Flags) -> str:
    """The network that the flags of kernels describe: of distillation it is the teacher."""
    return "teacher" if "model_s" in flags else "net"


def if_slak(flags: Flags, **expected: Any) -> Flags:
    """What an argument of the networks of large kernels must be in the network that learns, if it is one of them."""
    return {} if flags.get("model_s") == "resnet50" else {f"net.{name}": value for name, value in expected.items()}


def if_sparse(flags: Flags, **expected: Any) -> Flags:
    """What a setting of sparsity must be, if the network is sparse."""
    return {f"sparse.{name}": value for name, value in expected.items()} if flags["sparse"] else {"sparse.density": 1}


def batch(size: int, flags: Flags) -> Flags:
    if "update_freq" not in flags:  # one process for all GPUs
        return {"batch_size": size}
    total = size * flags["update_freq"] * flags["nproc_per_node"]
    return {"batch_size": total, "micro_batch_size": size}


def kernels(sizes: list[int], flags: Flags) -> Flags:
    return {f"{whose(flags)}.kernel_sizes": sizes[:4], f"{whose(flags)}.small_kernel_size": sizes[4]}


def student(name: str, flags: Flags) -> Flags:
    """Whatever the flags say, main_KD.py gives a SLaK that learns the shape of ConvNeXt."""
    shape = dict(kernel_sizes=[7] * 4, small_kernel_size=0, decomposed=False, width=1.0, branch_norm=flags["bn"])
    return {"model": _NETWORKS[name], **if_slak(flags, **shape)}


def distillation(kind: str, flags: Flags) -> Flags:
    if kind == "NKD":  # the engine makes NKDLoss() of temperature 1 and alpha 1, and adds no other loss
        return {"distill.logits": "nkd", "distill.alpha": 1.0, "distill.keep_task_loss": False}
    return {"distill.logits": "kd", "distill.alpha": flags["alpha"], "distill.hard": flags["hard"]}


def average(_: Any, flags: Flags) -> Flags:
    looked_at = flags["model_ema"] and flags["model_ema_eval"]  # it changes nothing else
    return {"ema_decay": flags["model_ema_decay"] if looked_at else None}


def no_features(_: Any, flags: Flags) -> Flags:
    assert "FD" not in flags["distill_type"]
    return {"distill.features": "none"}


def reduction(value: float, flags: Flags) -> Flags:
    if "arch" in flags:
        return {"net.reduction": None} if value == 1 else {"net.reduction": value}
    return {"model": {1.0: "fenet_100", 1.375: "fenet_137"}[value], "net.expand": "output"}


def at(path: str) -> Callable[[Any, Flags], Flags]:
    return lambda value, _: {path: value}


TRANSLATION: dict[str, Callable[[Any, Flags], Flags]] = {
    "batch_size": batch,
    "epochs": at("epochs"),
    "epoch": at("epochs"),
    "model": lambda v, f: {"distill.teacher" if "model_s" in f else "model": _NETWORKS[v]},
    "model_s": student,
    "arch": at("model"),
    "expansion": at("net.expansion"),
    "reduction": reduction,
    "reduction_mode": lambda v, f: {} if f["reduction"] == 1 else {"net.reduction_mode": v},
    "dataset": at("data.name"),
    "drop_path": lambda v, f: if_slak(f, drop_path_rate=v),
    "layer_scale_init_value": lambda v, f: if_slak(f, layer_scale=v),
    "head_init_scale": at("head_scale"),
    "input_size": at("data.image_size"),
    "model_ema": average,
    "model_ema_eval": average,
    "model_ema_decay": average,
    "opt": at("optim.name"),
    "opt_eps": at("optim.eps"),
    "opt_betas": at("optim.betas"),
    "clip_grad": at("clip_grad"),
    "nesterov": at("optim.nesterov"),
    "weight_decay": at("optim.weight_decay"),
    "shift_weight_decay": at("optim.offset_decay"),
    "weight_decay_end": at("optim.weight_decay_end"),
    "lr": at("optim.lr"),
    "layer_decay": at("optim.layer_decay"),
    "min_lr": at("optim.min_lr"),
    "warmup_epochs": at("optim.warmup_epochs"),
    "warmup_steps": lambda v, f: {"optim.warmup_epochs": f["warmup_epochs"] if v < 0 else None},
    "color_jitter": at("data.color_jitter"),
    "aa": at("data.auto_augment"),
    "auto_augment": lambda v, f: {"data.auto_augment": "original" if v else None},
    "smoothing": at("label_smoothing"),
    "train_interpolation": at("data.interpolation"),
    "crop_pct": lambda v, f: {"data.crop_share": 224 / 256 if v is None else v},
    "reprob": at("data.erase_prob"),
    "remode": at("data.erase_mode"),
    "recount": at("data.erase_count"),
    "mixup": at("mix.mixup"),
    "cutmix": at("mix.cutmix"),
    "cutmix_minmax": at("mix.cutmix_minmax"),
    "mixup_prob": at("mix.prob"),
    "mixup_switch_prob": at("mix.switch_prob"),
    "mixup_mode": at("mix.mode"),
    "finetune": lambda v, f: {"weights": v or None},
    "imagenet_default_mean_and_std": lambda v, f: {"data.mean": "imagenet" if v else "inception"},
    "data_set": lambda v, f: {"data.name": {"IMNET": "folder", "CIFAR": "cifar100"}[v]},
    "seed": at("seed"),
    "use_amp": lambda v, f: {"amp": "fp16" if v else "none"},
    "Decom": lambda v, f: {f"{whose(f)}.decomposed": v} if f["model"] in _SLAKS else {},
    "width_factor": lambda v, f: {f"{whose(f)}.width": v},
    "kernel_size": kernels,
    "bn": lambda v, f: {f"{whose(f)}.branch_norm": v},
    "sparse": lambda v, f: if_sparse(f),
    "sparsity": lambda v, f: if_sparse(f, density=pytest.approx(1 - v)),
    "growth": lambda v, f: if_sparse(f, rule={"random": "set", "gradient": "rigl", "momentum": "snfs"}[v]),
    "prune": lambda v, f: if_sparse(f, rule={"magnitude": "set"}[v]),
    "fix": lambda v, f: if_sparse(f, rule="static" if v else "set"),
    "prune_rate": lambda v, f: if_sparse(f, prune_fraction=v),
    "sparse_init": lambda v, f: if_sparse(f, allocate={"snip": "snip_layers", "uniform": "uniform", "ERK": "erk"}[v]),
    "u": lambda v, f: if_sparse(f, every_steps=v),
    "only_L": lambda v, f: if_sparse(f, layers="large_kernels" if v else "all"),
    "sparse_type": lambda v, f: if_sparse(f, granularity={"origin": "weight", "rep_coarse": "kernel"}[v]),
    "sparse_gap": lambda v, f: if_sparse(f, share_every=v),
    "ghost_ratio": at("net.ghost_ratio"),
    "N_path": at("net.num_paths"),
    "N_rep": at("net.num_shifts"),
    "distill_type": distillation,
    "alpha": lambda v, f: distillation(f["distill_type"], f),
    "hard": lambda v, f: distillation(f["distill_type"], f),
    "T": lambda v, f: {"distill.temperature": v if f["distill_type"] == "KD" else 1.0},
    "lr_fd": no_features,
    "FDLoss_type": no_features,
}


def typed(words: list[str]) -> Any:
    """The value of a flag: text, number, truth, or a list of them; a flag without words is true."""
    values = [{"true": True, "false": False}.get(word.lower(), word) for word in words] or [True]
    values = [float(v) if isinstance(v, str) and re.fullmatch(r"[\d.]+(e-?\d+)?", v) else v for v in values]
    return values if len(values) > 1 else values[0]


def flags_of(line: str) -> Flags:
    """The flags of a command line; the last of two with the same name counts."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    words = [part for word in shlex.split(line) for part in (word.split("=") if word.startswith("--") else [word])]
    for word in words[words.index("python") + 1 :]:
        if word.startswith("-") and word != "-m":
            values = found[word.lstrip("-").replace("-", "_")] = []
        elif not word.endswith(".py"):
            values.append(word)
    return {name: typed(values) for name, values in found.items()}


def arguments(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a network, with its own values where a recipe gives none."""
    family = model.rpartition("_")[0]
    function = {**slak.FAMILIES, "shiftwise": shiftwise.shiftwise}.get(family)
    functions = [network, LargeKernelNet.__init__, function] if function else []
    own = {name: p.default for f in functions for name, p in inspect.signature(f).parameters.items()}
    if family == "shiftwise":
        own["small_kernel_size"] = 3
    return own | given


def value_at(recipe: Recipe, path: str) -> Any:
    owner, _, name = path.partition(".")
    if owner == "net":
        value = arguments(recipe.model, recipe.model_args).get(name)
    elif owner == "teacher":
        assert recipe.distill.teacher is not None
        value = arguments(recipe.distill.teacher, recipe.distill.teacher_args).get(name)
    else:
        value = attrgetter(path)(recipe)
    return list(value) if isinstance(value, tuple) else value


def expectations(command: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(flag, path in the recipe, expected value) of each flag, given or by default."""
    flags = DEFAULTS[command["program"]] | flags_of(command["line"])
    unknown = {*flags} - {*TRANSLATION, *NEUTRAL}
    assert not unknown, f"nobody says what {sorted(unknown)} mean"
    found = {flag: TRANSLATION[flag](value, flags) for flag, value in flags.items() if flag in TRANSLATION}
    return [(flag, path, value) for flag, paths in found.items() for path, value in paths.items()]


def mistakes(command: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not in the recipe as the flags say it: (value there, expected value)."""
    recipe = recipes.get(command["recipe"])
    recipe = replace(recipe, model_args=recipe.model_args | command.get("model_args", {}))
    pairs = {f"{flag} at {path}": (value_at(recipe, path), value) for flag, path, value in expectations(command)}
    return {where: pair for where, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command["recipe"])
def test_every_flag_stands_in_the_recipe(command):
    assert mistakes(command) == {}


def test_the_commands_are_read_whole():
    flags = flags_of(COMMANDS[0]["line"])
    assert len(flags) == 21
    assert flags["kernel_size"] == [51, 49, 47, 13, 5]
    assert flags["sparse"] is True and flags["u"] == 2000 and flags["lr"] == 4e-3


def test_an_unknown_flag_is_told():
    with pytest.raises(AssertionError, match=r"nobody says what \['warmup_lr'\] mean"):
        mistakes({**COMMANDS[0], "line": "python main.py --warmup_lr 0.1"})


@pytest.mark.parametrize(
    ("flag", "where"),
    [
        ("--batch_size 64", "batch_size at batch_size"),
        ("--update_freq 4", "batch_size at batch_size"),
        ("--kernel_size 51 49 47 13 3", "kernel_size at net.small_kernel_size"),
        ("-u 100", "u at sparse.every_steps"),
        ("--mixup 0.2", "mixup at mix.mixup"),
        ("--use_amp true", "use_amp at amp"),
        ("--model_ema_eval false", "model_ema at ema_decay"),
        ("--layer_decay 0.9", "layer_decay at optim.layer_decay"),
    ],
)
def test_another_value_is_seen(flag, where):
    assert where in mistakes({**COMMANDS[0], "line": f"{COMMANDS[0]['line']} {flag}"})


def test_no_flag_has_two_meanings():
    assert not {*TRANSLATION} & {*NEUTRAL}
    assert all(NEUTRAL.values())
    known = {flag for defaults in DEFAULTS.values() for flag in defaults} | {"nproc_per_node", "master_port"}
    assert {*TRANSLATION, *NEUTRAL} == known


@pytest.mark.parametrize(
    "name", ["slak_tiny_300ep", "slak_base_300ep", "shiftwise_tiny_300ep", "slak_weighted_tiny_300ep"]
)
def test_what_the_code_of_slak_fixes(name):
    recipe = recipes.get(name)
    sparse, optim = recipe.sparse, recipe.optim
    assert (sparse.final_fraction, sparse.decay, sparse.stop_fraction, sparse.warmup_epochs) == (0.005, "cosine", 1, 0)
    assert (optim.schedule, optim.warmup_lr, optim.decay_norms) == ("cosine", 0, False)
    assert recipe.sync_batch_norm
    assert recipe.loss == "ce"
