import pytest

from shiftconv import recipes
from shiftconv.models import create_model
from shiftconv.recipes import shiftresnet


def test_the_whole_grid_has_names():
    names = {f"{family}{depth}" for family in shiftresnet.FAMILIES for depth in shiftresnet.DEPTHS}
    assert {f"{name}_{data}" for name in names for data in ("cifar10", "cifar100", "digits")} <= {*recipes.names()}


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
