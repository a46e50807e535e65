"""How the networks with large kernels are made, and what wrong arguments of theirs are answered with."""

import pytest
import timm
import torch

import shiftconv as sc
from shiftconv.models import shiftwise, slak, unireplknet

DEPTHS, DIMS, SIZES = (1, 1, 2, 1), (8, 16, 24, 32), (13, 11, 9, 7)


def test_both_ways_to_make_a_network():
    with torch.device("meta"):
        for name in ("slak_tiny", "shiftwise_v1_tiny", "shiftwise_tiny", "slak_split_base", "unireplknet_a"):
            first = timm.create_model(name, num_classes=3, drop_path_rate=0.1)
            second = sc.create_model(name, num_classes=3, drop_path_rate=0.1)
            assert [*first.state_dict()] == [*second.state_dict()]
            assert first.default_cfg["architecture"] == name and name in sc.list_models()
            assert first.get_submodule(first.default_cfg["first_conv"]).in_channels == 3
            assert first.get_submodule(first.default_cfg["classifier"]).out_features == 3


def test_none_is_a_choice():
    with torch.device("meta"):
        sizes = dict(kernel_sizes=(7, 7, 7, 7), decomposed=False, width=1.0)
        network = sc.create_model("slak_tiny", small_kernel_size=None, layer_scale=None, **sizes)
        same = timm.create_model("slak_tiny", small_kernel_size=0, layer_scale=0, **sizes)
    assert [*network.state_dict()] == [*same.state_dict()]
    assert network.stages[0].blocks[0].mix.small is None and network.stages[0].blocks[0].gamma is None
    with torch.device("meta"):
        scaled = sc.create_model("shiftwise_tiny", small_kernel_size=None, layer_scale=1e-5)
    assert scaled.stages[0].blocks[0].mix.small_kernel_size == 3
    assert slak.slak(DEPTHS, DIMS, SIZES, None, decomposed=False, layer_scale=None).stages[0].blocks[0].gamma is None


def test_construction_of_the_same_seed_is_the_same_and_moves_the_generator_alike():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append((shiftwise.shiftwise(DEPTHS, DIMS, 2, SIZES, num_classes=3).state_dict(), torch.rand(1)))
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(a, b) for a, b in zip(states[0][0].values(), states[1][0].values(), strict=True))
    torch.manual_seed(6)
    other = shiftwise.shiftwise(DEPTHS, DIMS, 2, SIZES, num_classes=3).state_dict()
    assert not torch.equal(other["linear.weight"], states[0][0]["linear.weight"])
    assert torch.equal(other["stages.0.blocks.0.mix.tall_slots"], states[0][0]["stages.0.blocks.0.mix.tall_slots"])


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("slak_tiny", dict(kernel_sizes=(51, 49, 47)), ValueError, r"kernel_sizes .* 4 stages, got \[51, 49, 47\]"),
        ("slak_tiny", dict(kernel_sizes=51), TypeError, "kernel_sizes must be a sequence of 4.*got 51"),
        ("slak_tiny", dict(kernel_sizes=(51, 49, 0, 13)), ValueError, "kernel_size"),
        ("slak_tiny", dict(width=0.01), ValueError, "width=0.01 leaves no channel in a stage of 96"),
        ("slak_tiny", dict(width=-1.0), ValueError, "width=-1.0 leaves no channel"),
        ("slak_tiny", dict(small_kernel_size=0), ValueError, "needs small_kernel_size"),
        (
            "slak_tiny",
            dict(ghost_ratio=0.2),
            TypeError,
            r"slak_tiny has no argument 'ghost_ratio' \(it belongs to slak_",
        ),
        ("slak_tiny", dict(decom=True), TypeError, "slak_tiny has no argument 'decom'; did you mean 'decomposed'"),
        ("slak_tiny", dict(dims=(1, 2, 3, 4)), TypeError, "slak_tiny has no argument 'dims'"),
        ("slak_tiny", dict(drop_path_rate=1.0), ValueError, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ("slak_tiny", dict(in_chans=-1), ValueError, "in_chans must be at least 1, got -1"),
        ("slak_tiny", dict(in_chans=0), ValueError, "in_chans must be at least 1, got 0"),
        ("slak_tiny", dict(num_classes=-1), ValueError, "num_classes must be at least 0, got -1"),
        ("slak_tiny", dict(global_pool="mean"), ValueError, "unknown global_pool 'mean'"),
        ("slak_tiny", dict(global_pool=""), ValueError, "global_pool '' gives maps"),
        ("slak_split_tiny", dict(border="half"), ValueError, "unknown border 'half'"),
        ("slak_shuffled_tiny", dict(ghost_ratio=1.0), ValueError, "ghost_ratio"),
        ("shiftwise_tiny", dict(ghost_ratio=-0.1), ValueError, "ghost_ratio"),
        ("shiftwise_tiny", dict(num_paths=0), ValueError, "num_paths"),
        ("shiftwise_tiny", dict(num_shifts=0), ValueError, "num_shifts"),
        ("shiftwise_tiny", dict(version=1), TypeError, "shiftwise_tiny has no argument 'version'"),
        ("shiftwise_tiny", dict(kernel_sizes=(51, 49, 47, 13, 3)), ValueError, "kernel_sizes must have one entry for"),
        ("unireplknet_a", dict(kernel_sizes=(3, 13, 13, 13)), (TypeError, ValueError), "kernel_sizes"),
        ("unireplknet_a", dict(kernel_sizes=((3,), (3, 3), (3,) * 6, (3, 3))), ValueError, r"\[2, 2, 6, 2\] entries"),
        (
            "unireplknet_a",
            dict(kernel_sizes=((3, 8), (3, 3), (3,) * 6, (3, 3))),
            ValueError,
            "kernel_size must be one of",
        ),
        ("unireplknet_a", dict(width=2.0), TypeError, "unireplknet_a has no argument 'width'"),
        ("shiftwise_tinny", {}, ValueError, "unknown model 'shiftwise_tinny'; did you mean 'shiftwise_tiny'"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        sc.create_model(name, **arguments)


def test_other_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="give kernel_sizes: none are published for depths"):
        unireplknet.unireplknet(DEPTHS, DIMS)
    with pytest.raises(ValueError, match="version"):
        shiftwise.shiftwise(DEPTHS, DIMS, 3)
    for depths, dims in (((1, 1, 2), DIMS), (DEPTHS, DIMS[:3])):
        with pytest.raises(ValueError, match=r"depths|dims|kernel_sizes"):
            slak.slak(depths, dims)
    network = slak.slak(DEPTHS, DIMS, SIZES, num_classes=10)
    with pytest.raises(ValueError, match="output_fmt must be NCHW, got 'NLC'"):
        network.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")
    with pytest.raises(ValueError, match="num_classes"):
        network.reset_classifier(-1)
    with pytest.raises(ValueError, match="unknown global_pool 'median'"):
        network.reset_classifier(3, "median")
