"""The public face: what `import shiftconv as sc` offers, how soon it is there, and that nothing heavy comes with it."""

import subprocess
import sys

import pytest

import shiftconv as sc

PUBLIC = {
    "analysis", "distill", "models", "nn", "ops", "recipes", "sparse", "train",
    "convert", "count", "create_model", "erf", "export", "list_models", "load_checkpoint", "push_to_hub",
    "save_for_hub", "throughput",
    "__version__",
}  # fmt: skip
OPS = {
    "active_shift",
    "compose",
    "composed_padding",
    "cross_conv",
    "depthwise_conv",
    "placements",
    "shift",
    "shift_",
    "shift_linear",
    "shift_sum",
    "sparse_shift",
    "PaddingMode",
}
NN = {
    *(f"{kind}Shift{n}d" for kind in ("", "Group", "Sparse", "Active", "Partial") for n in (1, 2, 3)),
    "AxialShift2d", "FourConnectedShift2d", "SpatialShift2d", "TemporalShift", "OnlineTemporalShift", "ShiftLinear",
    "DilatedReparamConv2d", "LargeKernelConv2d", "ShiftwiseConv2d", "ShiftwiseVariant",
    "emulate_depthwise", "fold_shift", "fold_shifts",
    "FreezeOffsets", "freeze_offsets", "lattice_penalty", "normalize_offset_gradients", "offset_groups",
    "offset_parameters", "offset_penalty",
}  # fmt: skip
SPARSE = {
    "RULES", "Calibration", "Compacted", "Evidence", "Granularity", "LayerSparsity", "Rule", "Schedule",
    "SparseTraining", "SparsityReport", "compact", "groups",
}  # fmt: skip
DISTILL = {"MGD", "FeatureLoss", "dist", "kd", "nkd", "standardize_logits"}
HEAVY = ["matplotlib", "sklearn", "tensorboard", "triton", "rich", "jsonargparse", "torch._dynamo", "torch._inductor"]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_surface_is_what_is_documented():
    """A change of the public names is a decision: change this list with it, and the docs."""
    assert set(sc.__all__) == PUBLIC == set(dir(sc))
    assert set(sc.ops.__all__) == OPS
    assert set(sc.nn.__all__) == NN
    assert set(sc.sparse.__all__) == SPARSE
    assert set(sc.distill.__all__) == DISTILL
    for name in PUBLIC:
        assert getattr(sc, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'creat_model'"):
        sc.creat_model  # noqa: B018


def test_import_registers_the_models_with_timm():
    assert python("import shiftconv, timm; print(timm.is_model('shiftresnet20'))") == "True"


def test_import_brings_nothing_heavy_beyond_torch_and_timm():
    code = (
        "import sys, torch, torchvision, timm; a = set(sys.modules); import shiftconv; print(*(set(sys.modules) - a))"
    )
    new = python(code).split()
    assert [name for name in HEAVY if name in new] == []


@pytest.mark.parametrize("verb", ["", "train", "eval", "report", "bench", "count", "convert", "list", "demo", "doctor"])
def test_the_command_answers_help_without_torch(verb):
    argv = [word for word in ("shiftconv", verb, "--help") if word]
    code = f"import sys; sys.argv = sys.orig_argv = {argv}\nfrom shiftconv.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'timm' in sys.modules)"
    assert python(code).splitlines()[-1] == "False False"


def test_module_and_command_are_the_same():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "shiftconv", "--help"], capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: shiftconv VERB")
    assert " torch" not in done.stderr
