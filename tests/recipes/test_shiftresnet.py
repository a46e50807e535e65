import subprocess
import sys

import pytest

from shiftconv import recipes
from shiftconv.models import create_model
from shiftconv.recipes import shiftresnet


def test_needs_no_torch():
    code = "import sys; sys.argv[0] = 'shiftconv'; import shiftconv.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names():
    known = recipes.names()
    assert known == sorted(known)
    assert {"shiftresnet20_cifar10", "shiftresnet110_cifar100", "depthwiseresnet56_cifar10", "resnet20_digits"} <= set(
        known
    )
    with pytest.raises(ValueError, match="unknown recipe 'shiftresnet20_digit'; did you mean 'shiftresnet20_digits'"):
        recipes.get("shiftresnet20_digit")


@pytest.mark.parametrize("name", recipes.names())
def test_each_is_a_network_of_ours(name):
    recipe = recipes.get(name)
    assert recipe == recipes.get(name)
    if "20" in recipe.model:
        create_model(recipe.model, num_classes=10, **recipe.model_args)


def test_the_paper_s_settings():
    recipe = recipes.get("shiftresnet110_cifar100")
    assert (recipe.epochs, recipe.batch_size, recipe.data.name) == (164, 128, "cifar100")
    optim = recipe.optim
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay, optim.nesterov) == ("sgd", 0.1, 0.9, 5e-4, False)
    assert optim.decay_norms and optim.milestones == (82, 123) and optim.gamma == 0.1


def parameters(recipe):
    model = create_model(recipe.model, num_classes=10, **recipe.model_args)
    return sum(p.numel() for p in model.parameters())


def test_reduced_resnet_has_as_many_parameters():
    assert parameters(recipes.get("shiftresnet20_digits")) == 95642
    assert parameters(shiftresnet.resnet20_reduced_digits()) == 96206


@pytest.mark.parametrize(("depth", "count"), [(20, 93956), (56, 294283), (110, 591580)])
def test_depthwise_networks_have_the_published_size(depth, count):
    assert parameters(recipes.get(f"depthwiseresnet{depth}_cifar10")) == count
