"""Stripes cut into small kernels, and put together again: weights move, outputs do not."""

import pytest
import torch

from shiftconv.models import create_model
from shiftconv.models.convert import load_checkpoint
from shiftconv.models.convert.relocate import relocate
from shiftconv.models.convert.translate import recognise, to_ours, to_theirs
from shiftconv.models.slak import slak, slak_split

SIZES = [(51, 49, 45, 13), (45, 15, 9, 7), (13, 9, 7, 51), (9, 10, 11, 12)]
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


pytestmark = pytest.mark.usefixtures("one_thread")


def filled(network, seed=0):
    """In float64 and evaluation, with weights and statistics that are all different."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.double().state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64).mul_(0.3))
            if key.endswith("running_var"):
                value.abs_().add_(0.5)
    return network.eval()


def made(family, sizes, **arguments):
    arguments = dict(small_kernel_size=5, width=1.0, num_classes=10) | arguments
    return filled(family((1, 1, 2, 1), (4, 6, 8, 10), sizes, **arguments))


def image(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same(state_dict, other):
    assert state_dict.keys() == other.keys()
    for key, value in state_dict.items():
        assert torch.equal(value, other[key]), key


@every_size
def test_outputs_are_equal_and_weights_come_back(sizes):
    whole, split = made(slak, sizes), made(slak_split, sizes)
    state = whole.state_dict()
    weights = relocate(state, split)
    split.load_state_dict(weights)
    back = relocate(split.state_dict(), whole)
    same(back, state)
    assert all(value.is_contiguous() for value in (*weights.values(), *back.values()))
    x = image()
    with torch.no_grad():
        y = whole(x)
        torch.testing.assert_close(split(x), y, rtol=1e-11, atol=1e-11)
        for network in (whole.train(), split.train()):
            network.requires_grad_(False)
        torch.testing.assert_close(split(x), whole(x), rtol=1e-10, atol=1e-10)


@every_size
def test_each_kernel_is_where_the_authors_have_it(sizes):
    whole, split = made(slak, sizes), made(slak_split, sizes)
    weights = relocate(whole.state_dict(), split)
    for i, size in enumerate(sizes):
        mix = whole.stages[i].blocks[0].mix
        count = -(-size // 5)
        prefix = f"stages.{i}.blocks.0.mix."
        tall, wide = weights[f"{prefix}tall_weights.0"], weights[f"{prefix}weights.0"]
        assert tall.shape == wide.shape == (len(mix.tall.weight) * count, 1, 5, 5)
        for channel in range(len(mix.tall.weight)):
            for piece in range(count):
                taps = mix.tall.weight[channel, 0, 5 * piece : 5 * piece + 5]
                got = tall[channel * count + piece, 0]
                assert torch.equal(got[: len(taps)], taps) and not got[len(taps) :].any()
                taps = mix.wide.weight[channel, 0, :, 5 * piece : 5 * piece + 5]
                got = wide[channel * count + piece, 0]
                assert torch.equal(got[:, : taps.shape[1]], taps) and not got[:, taps.shape[1] :].any()


def test_a_network_trains_on_after_it():
    """The taps beyond the stripe are 0, and get gradients: the split network is the larger one."""
    whole, split = made(slak, SIZES[0]), made(slak_split, SIZES[0])
    split.load_state_dict(relocate(whole.state_dict(), split))
    split(image()).square().sum().backward()
    last = split.stages[0].blocks[0].mix.tall_weights[0].grad.view(4, 11, 5, 5)[:, -1, 1:]
    assert last.shape == (4, 4, 5)
    assert all(p.grad.isfinite().all() for p in split.parameters())


@pytest.mark.parametrize("stripe", ["tall_weights.0", "weights.0"])
def test_weights_beyond_the_stripe_are_refused(stripe):
    whole, split = made(slak, SIZES[0]), made(slak_split, SIZES[0])
    weights = relocate(whole.state_dict(), split)
    key = f"stages.1.blocks.0.mix.{stripe}"
    piece = weights[key].view(6, 10, 5, 5)[0, -1]  # 49 of 50 taps belong to the stripe
    beyond = (4, 2) if stripe.startswith("tall") else (2, 4)
    assert piece[beyond] == 0
    piece[beyond] = 1e-30
    with pytest.raises(ValueError, match=rf"{key} has weights beyond the 49 taps of a stripe"):
        relocate(weights, whole)
    piece[beyond] = 0
    same(relocate(weights, whole), whole.state_dict())


def test_other_networks_are_left_alone():
    whole, split = made(slak, SIZES[0]), made(slak_split, SIZES[0])
    square = made(slak, SIZES[0], decomposed=False)
    for network in (whole, square, torch.nn.Linear(2, 2)):
        same(relocate(whole.state_dict(), network), whole.state_dict())
    same(relocate(split.state_dict(), split), split.state_dict())
    same(relocate(split.state_dict(), square), split.state_dict())


@pytest.mark.parametrize(
    ("source", "target"), [("slak_tiny", "slak_split_tiny"), ("slak_split_tiny", "slak_tiny")], ids=str
)
def test_files_of_either_load_into_the_other(source, target, tmp_path):
    """Under our keys and under the authors'; 45 is 9 kernels of 5, where the authors' reloc_w makes 10."""
    arguments = dict(kernel_sizes=(51, 49, 45, 13), width=0.1, num_classes=10)
    first = filled(create_model(source, **arguments))
    if source == "slak_split_tiny":  # as it is before the last taps are trained
        whole = filled(create_model("slak_tiny", **arguments))
        first.load_state_dict(relocate(whole.state_dict(), first))
    with torch.no_grad():
        expected = first(image(48))
    for name, weights in (("ours", first.state_dict()), ("theirs", to_theirs(first.state_dict(), first))):
        torch.save(weights, tmp_path / f"{name}.pth")
        second = load_checkpoint(create_model(target, **arguments).double(), tmp_path / f"{name}.pth").eval()
        with torch.no_grad():
            torch.testing.assert_close(second(image(48)), expected, rtol=1e-11, atol=1e-11)


def test_a_file_that_lacks_a_stripe_is_refused_with_its_name(tmp_path):
    arguments = dict(width=0.1, num_classes=10)
    whole, split = create_model("slak_tiny", **arguments), create_model("slak_split_tiny", **arguments)
    weights = whole.state_dict()
    del weights["stages.2.blocks.3.mix.wide.weight"]
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"stages\.2\.blocks\.3\.mix\."):
        load_checkpoint(split, tmp_path / "x.pth")
    for key, shape in {"wide": (3, 1, 7, 51), "tall": (0, 1, 51, 5)}.items():
        weights = whole.state_dict()
        weights[f"stages.0.blocks.0.mix.{key}.weight"] = torch.zeros(shape)
        torch.save(weights, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.mix\."):
            load_checkpoint(split, tmp_path / "x.pth")


def test_paths_of_a_slak_split_found_in_a_slak(tmp_path):
    """What the authors saved of either is recognised for what it is."""
    whole, split = made(slak, SIZES[0]), made(slak_split, SIZES[0])
    theirs = to_theirs(whole.state_dict(), whole)
    found = recognise(theirs)
    assert found.layout == "slak"
    weights = to_ours(found, split)
    split.load_state_dict(weights)
    again = recognise(to_theirs(split.state_dict(), split))
    assert again.layout == "slak_split"
    same(to_ours(again, whole), whole.state_dict())
