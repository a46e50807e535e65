"""The command line as a person meets it: help, results, and what a mistake is answered with."""

import json
import subprocess
import sys
import time

import pytest
import torch

from shiftconv.cli import VERBS, main
from shiftconv.models import create_model


@pytest.fixture
def run(capsys):
    """Run the command; gives (exit status, stdout, stderr)."""

    def call(*argv: str):
        try:
            main(argv)
            status = 0
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


def test_help_names_every_verb(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(run, verb):
    status, out, _ = run(verb, "--help")
    assert status == 0
    assert f"usage: shiftconv {verb}" in out


def test_help_is_quick():
    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        return time.perf_counter() - start

    code = "import sys; sys.argv = ['shiftconv', '--help']; from shiftconv.cli import main; main()"
    assert min(seconds(code) / seconds("pass") for _ in range(3)) < 20  # torch alone would make it 100


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        (
            "shiftresnet20 --expansion 3 --convention readme",
            "Parameters: (new) 95642 (original) 272474 (reduction) 2.85\n"
            "FLOPs: (new) 16581248 (original) 40960640 (reduction) 2.47\n",
        ),
        (
            "resnet20 --reduction 2.8 --reduction-mode block --convention readme",
            "==> resnet20 with reduction 2.80\n"
            "Parameters: (new) 96206 (original) 272474 (reduction) 2.83\n"
            "FLOPs: (new) 14197376 (original) 40960640 (reduction) 2.89\n",
        ),
        (
            "shiftresnet20 --expansion=3 --convention head",
            "Parameters: (new) 95642 (original) 272474 (reduction) 2.85\n"
            "FLOPs: (new) 17760896 (original) 42140288 (reduction) 2.37\n",
        ),
    ],
)
def test_count_prints_the_authors_lines(run, line, lines):
    assert run("count", *line.split()) == (0, lines, "")


def test_count_is_exact_unless_told_otherwise(run):
    status, out, _ = run("count", "shiftresnet20", "--expansion", "3")
    assert status == 0
    assert "95,642 parameters" in out
    assert "16,433,792 MACs" in out  # 16581248, less the 147456 too many of the first convolution
    _, layers, _ = run("count", "shiftresnet20", "--expansion", "3", "--by", "layer")
    assert "layer3.2.conv2" in layers


RESNET20 = (272_474, 1_578)  # numbers in all of its parameters, and in those of one dimension


def test_count_at_a_density(run):
    whole, vectors = RESNET20
    status, out, err = run("count", "resnet20", "--density", "0.5")
    assert status == 0, err
    assert f"resnet20: {whole:,} parameters (272 k), {vectors + (whole - vectors) // 2:,} not 0 (137 k)" in out
    assert out.endswith(" for one 3x32x32 image, at density 0.5, uniform\n")
    *_, total, note = run("count", "resnet20", "--density", "0.5", "--by", "layer")[1].splitlines()
    assert (total.split()[1:3], note) == ([f"{whole:,}", "137,026"], "at density 0.5, uniform")
    assert run("count", "resnet20", "--density", "1")[1].startswith("resnet20: 272,474 parameters (272 k), 40,813,184 ")


def test_count_of_a_checkpoint(run, tmp_path):
    network = create_model("resnet20")
    network.get_submodule("layer3.2.conv2").weight.data[:10] = 0
    torch.save(network.state_dict(), file := tmp_path / "net.pth")
    for name in ((), ("resnet20",)):
        status, out, err = run("count", *name, "--checkpoint", str(file))
        assert status == 0, err
        assert f"{RESNET20[0]:,} parameters (272 k), {RESNET20[0] - 10 * 64 * 9:,} not 0" in out
        assert f"40,813,184 MACs (40.8 M), {40_813_184 - 64 * 10 * 64 * 9:,} effective" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian x", "unknown verb 'trian'; did you mean 'train'?"),
        ("train", "train needs the name of a recipe or a YAML file first"),
        ("train shiftresnet20_cifar", "unknown recipe 'shiftresnet20_cifar'; did you mean 'shiftresnet20_cifar10'?"),
        ("train nowhere.yaml", "there is no file nowhere.yaml"),
        ("train shiftresnet20_digits --optim.rl 1", "unknown option optim.rl; did you mean optim.lr?"),
        ("train shiftresnet20_digits --expansion 1", "an argument of the network goes as --model_args.NAME"),
        ("train shiftresnet20_digits --densty 0.5", "unknown option densty; did you mean sparse.density?"),
        ("train shiftresnet20_digits --data.name digit", "unknown data set 'digit'; did you mean 'digits'?"),
        ("train shiftresnet20_digits --epochs x", "epochs must be int, got x"),
        ("train shiftresnet20_digits --clip_grad x", "clip_grad must be float or null, got x"),
        ("train shiftresnet20_digits --epochs 0", "epochs must be at least 1, got 0"),
        ("train shiftresnet20_digits --model shiftresnet21 --out {tmp}/r", "did you mean 'shiftresnet20'?"),
        ("count shiftresnet2O", "did you mean 'shiftresnet20'?"),
        ("count shiftresnet20 --convetion readme", "unknown option --convetion; did you mean --convention?"),
        ("count shiftresnet20 --expnsion 3", "no argument 'expnsion'; did you mean 'expansion'?"),
        ("count shiftresnet20 --size 32 --convention readme", "leave --size, --by, --checkpoint and --density out"),
        ("count shiftresnet20 --density 0.6 --convention head", "leave --size, --by, --checkpoint and --density out"),
        ("count --checkpoint {tmp}/none.t7 --convention head", "leave --size, --by, --checkpoint and --density out"),
        ("count --density 0.6", "count needs the name of a network, or --checkpoint alone"),
        ("count --checkpoint {tmp}/none.t7 --expansion 3", "count needs the name of a network, or --checkpoint alone"),
        ("count --checkpoint {tmp}/none.t7", "no checkpoint"),
        ("count resnet20 --checkpoint {tmp}/none.t7 --density 0.6", "leave --density or --checkpoint out"),
        ("count resnet20 --density 0", "density must be in (0, 1], got 0"),
        ("count resnet20 --reduction 1000", "reduction=1000"),
        ("eval", "required: checkpoint"),
        ("eval --checkpoint {tmp}/none.t7", "no checkpoint"),
        ("eval {tmp}", "it is a folder"),
        ("convert {tmp}/none.t7 {tmp}/a.txt", "must end in .safetensors or .pth"),
        ("doctor --op shfit", "unknown operator 'shfit'; did you mean 'shift'?"),
        ("list modles", "did you mean models?"),
    ],
)
def test_a_mistake_is_answered_in_one_line(run, tmp_path, line, message):
    status, out, err = run(*line.format(tmp=tmp_path).split())
    assert status == 2
    assert out == ""
    assert err.startswith("shiftconv: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: shiftresnet20\nepochz: 3\n", "unknown option epochz; did you mean epochs?"),
        ("model: shiftresnet20\noptim:\n  lrr: 3\n", "unknown option lrr; did you mean lr?"),
        ("", "expected names and values of settings"),
        ("epochs: [", "Problems parsing config"),
        ("epochs: 3\n", "required: model"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(run, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    status, _, err = run("train", "mine.yaml")
    assert status == 2
    assert err.startswith("shiftconv: error: mine.yaml: ")
    assert message in err
    assert err.count("\n") == 1


def test_traceback_is_shown_when_asked_for(monkeypatch):
    monkeypatch.setenv("SHIFTCONV_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown verb"):
        main(["trian"])


def test_a_run_from_recipe_to_verdict(run, tmp_path, monkeypatch):
    """Train by name, train by the printed YAML, eval and convert of what came out."""
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--batch_size", "256", "--optim.warmup_epochs", "0", "--model_args.expansion", "1"]
    status, text, _ = run("train", "shiftresnet20_digits", *options, "--print_config")
    assert status == 0
    (tmp_path / "mine.yaml").write_text(text)
    status, out, err = run("train", "mine.yaml")
    assert status == 0, err
    best = tmp_path / "runs" / "mine" / "best.pt"
    said = json.loads((best.parent / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{said['val_accuracy']:.2%}" in out
    accuracy = out.splitlines()[-1].split("top-1 ")[1].split(",")[0]
    status, out, err = run("eval", "--checkpoint", str(best))
    assert status == 0, err
    assert f"top-1 {accuracy}" in out
    status, out, _ = run("convert", str(best), "net.safetensors")
    assert status == 0
    assert "shiftresnet20" in out
    _, out, _ = run("eval", "--checkpoint", "net.safetensors", "--data", "digits")
    assert f"top-1 {accuracy}" in out
    status, _, err = run("eval", "--checkpoint", "net.safetensors")
    assert status == 2
    assert "does not say what it was trained on" in err
    status, _, err = run("train", "mine.yaml")
    assert status == 2
    assert "resume" in err


def test_list_and_doctor(run):
    assert "shiftresnet110_cifar100" in run("list", "recipes", "--pattern", "*110_cifar100")[1]
    assert "mobileresnet" not in run("list", "--pattern", "shift*")[1]
    _, out, _ = run("doctor")
    assert "cache folder" in out
    assert "shift" in out
    _, out, _ = run("doctor", "--op", "depthwise_conv")
    assert "51x51 at 56 px, NCHW" in out
    assert "fft" in out


def test_output_may_be_cut_short():
    """`shiftconv list | head -1` ends quietly."""
    code = "from shiftconv.cli import main; main(['list'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
