"""Networks on the Hub: the same outputs after a way through files, cards that tell the truth, and no half network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import shiftconv as sc
from shiftconv.models.convert.translate import to_theirs
from shiftconv.models.hub import _Run, push_to_hub, save_for_hub
from shiftconv.train import Data, Optim, Recipe, open_data, train
from shiftconv.train.data.folders import CROP_SHARE

HUB = "timm.models._hub"
FILES = {"README.md", "config.json", "model.safetensors"}
NETWORKS = {
    "shiftresnet20": dict(expansion=3, num_classes=7, project_shortcuts=True, drop_rate=0.1),
    "asresnet20": dict(expansion=0.5, width=4),
    "slak_tiny": dict(width=0.1, kernel_sizes=(11, 9, 7, 5), small_kernel_size=3, layer_scale=None, drop_path_rate=0.1),
    "slak_small": dict(width=0.1, kernel_sizes=(7, 7, 7, 7), small_kernel_size=None, decomposed=False),
    "slak_shuffled_tiny": dict(width=0.1, kernel_sizes=(11, 9, 7, 5), ghost_ratio=0),
    "shiftwise_tiny": dict(width=0.1, kernel_sizes=(13, 11, 9, 7), num_shifts=2, global_pool="avgmax"),
    "unireplknet_a": dict(kernel_sizes=((3, 3), (13, 13), (7, 3) * 3, (13, 13)), in_chans=1),
    "resnet10t": dict(num_classes=3),  # timm's own
}


def _images(channels=3, size=32):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def _network(name, **arguments):
    """With weights and running statistics that no network starts with."""
    torch.manual_seed(1)
    network = sc.create_model(name, **NETWORKS.get(name, {}) | arguments)
    for value in (*network.parameters(), *network.buffers()):
        if value.is_floating_point():
            value.data += 0.05 * torch.rand_like(value)
    return network.eval()


@torch.no_grad()
def _outputs(network):
    images = _images(next(iter(network.parameters())).shape[1])
    return network.eval()(images)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each network and its folder, saved on first use."""
    made = {}

    def save(name):
        if name not in made:
            network = _network(name)
            made[name] = network, save_for_hub(network, tmp_path_factory.mktemp("hub") / name)
        return made[name]

    return save


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on real images."""
    optim = Optim(lr=0.05, schedule="constant", weight_decay=1e-4)
    model_args = dict(expansion=0.25)
    data = Data(name="digits")
    recipe = Recipe("shiftresnet20", model_args, data, epochs=1, batch_size=256, optim=optim, tensorboard=False)
    return train(recipe, tmp_path_factory.mktemp("runs") / "mine", device="cpu").folder


class _Hub:
    """What ``HfApi`` does, in a folder; and what ``hf_hub_download`` gives from there."""

    folder: Path
    asked: dict

    def __init__(self, token=None, **_):
        type(self).asked = dict(token=token)

    def create_repo(self, repo_id, private, exist_ok):
        self.asked.update(private=private, exist_ok=exist_ok)
        return type("RepoUrl", (str,), dict(repo_id=repo_id))(repo_id)

    def file_exists(self, repo_id, filename, revision):
        return (self.folder / repo_id / filename).exists()

    def upload_folder(self, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"commit of {repo_id}"

    @classmethod
    def download(cls, repo_id, filename, **_):
        return str(cls.folder / repo_id / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Hub(_Hub):
        folder = tmp_path / "hub"

    monkeypatch.setattr(f"{HUB}.HfApi", Hub)
    monkeypatch.setattr(f"{HUB}.hf_hub_download", Hub.download)
    return Hub


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back(saved, name):
    network, folder = saved(name)
    assert {file.name for file in folder.iterdir()} == FILES  # no pickle among them
    for create in (timm.create_model, sc.create_model):
        again = create(f"local-dir:{folder}", pretrained=True)
        assert torch.equal(_outputs(again), _outputs(network))
        assert again.num_classes == network.num_classes
    other = timm.create_model(f"local-dir:{folder}")
    assert not torch.equal(_outputs(other), _outputs(network))
    assert other.pretrained_cfg["architecture"] == name


def test_a_network_of_which_timm_saw_no_arguments_comes_back(tmp_path):
    """Made by its own function, where a None is not dropped."""
    arguments = NETWORKS["slak_small"] | dict(num_classes=0)
    network = timm.models.model_entrypoint("slak_small")(**arguments).eval()
    again = timm.create_model(f"local-dir:{save_for_hub(network, tmp_path)}", pretrained=True)
    assert again.model_args["small_kernel_size"] is None and again.num_classes == 0
    assert torch.equal(_outputs(again), _outputs(network))


def test_a_network_without_pooling_comes_back(tmp_path):
    network = _network("shiftresnet20", num_classes=0, global_pool="")
    again = timm.create_model(f"local-dir:{save_for_hub(network, tmp_path)}", pretrained=True)
    assert _outputs(again).ndim == 4 and torch.equal(_outputs(again), _outputs(network))


def test_a_new_head_is_what_is_saved(tmp_path):
    network = _network("slak_tiny")
    network.reset_classifier(5, "max")
    again = timm.create_model(f"local-dir:{save_for_hub(network, tmp_path)}", pretrained=True)
    assert again.num_classes == 5 and torch.equal(_outputs(again), _outputs(network))


@pytest.mark.parametrize("name", ["shiftresnet20", "shiftwise_tiny"])
def test_another_head_and_features_from_a_saved_network(saved, name):
    network, folder = saved(name)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert _outputs(other).shape == (2, 3)
    assert torch.equal(other.forward_features(_images()), network.forward_features(_images()))
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    assert torch.equal(_outputs(features)[-1], network.forward_features(_images()))


def test_gray_images_for_a_network_of_colours(saved):
    network, folder = saved("slak_tiny")
    gray = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1)
    assert torch.allclose(gray.stem[0].weight, network.stem[0].weight.sum(1, keepdim=True))


def test_memory_formats_and_ties_are_no_matter(tmp_path):
    network = _network("resnet20").to(memory_format=torch.channels_last)
    network.layer1[0].conv1.weight = network.layer1[1].conv1.weight
    save_for_hub(torch.compile(network), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    assert not network._state_dict_hooks and network.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_state_of_the_process_is_untouched(tmp_path):
    network = _network("slak_shuffled_tiny").train()
    before = torch.get_rng_state()
    save_for_hub(network, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training and all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())


@pytest.mark.parametrize("name", ["shiftresnet20", "slak_tiny", "shiftwise_tiny", "resnet10t"])
def test_a_card_without_a_run(saved, name):
    network, folder = saved(name)
    card = (folder / "README.md").read_text()
    cost = sc.count(network)
    assert f"Parameters: {cost.parameters:,}\n" in card
    assert f"Multiply-accumulates: {cost.macs:,}, for one image\n" in card
    front = yaml.safe_load(card.split("---")[1])
    assert set(front["tags"]) == {"timm", "image-classification", "shiftconv"}
    assert (front["library_name"], front["license"]) == ("timm", "apache-2.0")
    assert f'timm.create_model("hf-hub:OWNER/{name}", pretrained=True)' in card
    assert ("import shiftconv" in card) == (name in sc.list_models())
    assert "accuracy:" not in card and ("https://arxiv.org/abs/" in card) == ("import shiftconv" in card)


def test_the_card_names_the_arguments(saved):
    card = (saved("slak_tiny")[1] / "README.md").read_text()
    arguments = "width=0.1, kernel_sizes=[11, 9, 7, 5], small_kernel_size=3, layer_scale=0"
    assert f"`slak_tiny({arguments}, in_chans=3" in card
    assert "https://arxiv.org/abs/2207.03620\n" in card


def test_the_card_of_a_run(run, tmp_path):
    network = sc.load_checkpoint(None, run / "best.pt")
    folder = save_for_hub(network, tmp_path / "net", run, license="mit")
    card, result = (folder / "README.md").read_text(), json.loads((run / "result.json").read_text())
    assert "trained on digits by `shiftconv`" in card
    for part in ("test", "val"):
        assert f"top-1 accuracy: {result[part]['top1']:.2%}\n  - top-5 accuracy: {result[part]['top5']:.2%}\n" in card
        assert f"loss: {result[part]['loss']:.4g}\n" in card and f"images: {result[part]['images']}\n" in card
    assert f"**Best epoch:** {result['best_epoch']}, by validation accuracy\n" in card
    for line in ("epochs: 1", "batch_size: 256", "optim.lr: 0.05", "optim.schedule: constant", "data.name: digits"):
        assert f"  - {line}\n" in card
    assert "tensorboard" not in card and "amp" not in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert sc.count(network, 32).macs == int(card.split("accumulates: ")[1].split(", ")[0].replace(",", ""))
    by_file = save_for_hub(network, tmp_path / "other" / "net", run / "result.json", license="mit")
    assert (by_file / "README.md").read_text() == card


def test_timm_prepares_images_as_the_run_did(run, tmp_path):
    save_for_hub(sc.load_checkpoint(None, run / "best.pt"), tmp_path, run)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(again))
    images = open_data("digits").test
    for index in range(3):
        pixels = (images.images[index].permute(1, 2, 0)).numpy().astype(np.uint8)
        assert torch.allclose(transform(Image.fromarray(pixels)), images[[index]][0][0], atol=1e-6)
    assert again.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    folder = _Run(best=dict(data=dict(name="folder", image_size=160, mean=[0.5] * 3, std=[0.2] * 3)))
    assert folder.data_config()["crop_pct"] == CROP_SHARE


def test_the_result_alone_is_enough(run, tmp_path):
    shutil.copy(run / "result.json", tmp_path)
    save_for_hub(_network("shiftresnet20"), tmp_path / "net", tmp_path)
    card = (tmp_path / "net" / "README.md").read_text()
    assert "top-1 accuracy" in card and "Recipe" not in card
    cfg = json.loads((tmp_path / "net" / "config.json").read_text())
    assert cfg["pretrained_cfg"]["mean"] == [0.4914, 0.4822, 0.4465]  # the network's own
    (tmp_path / "config.yaml").write_text("model: shiftresnet20\ndata: {name: cifar10}\n")
    save_for_hub(_network("shiftresnet20"), tmp_path / "net", tmp_path)
    assert yaml.safe_load((tmp_path / "net" / "README.md").read_text().split("---")[1])["datasets"] == ["cifar10"]


def test_labels(tmp_path):
    labels = ("a", "b", "c")
    save_for_hub(_network("resnet10t"), tmp_path, labels=labels)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == [*labels]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.pretrained_cfg["label_names"] == [*labels]
    again = timm.create_model(f"local-dir:{save_for_hub(again, tmp_path / 'again')}")
    assert again.pretrained_cfg["label_names"] == [*labels]


def test_push_and_back(hub, run):
    network = sc.load_checkpoint(None, run / "best.pt").eval()
    assert push_to_hub(network, "me/net", run, private=True, token="secret") == "commit of me/net"
    assert hub.asked == dict(token="secret", private=True, exist_ok=True)
    files = hub.folder / "me" / "net"
    assert {file.name for file in files.iterdir()} == FILES
    card = (files / "README.md").read_text()
    assert 'timm.create_model("hf-hub:me/net", pretrained=True)' in card and "# Model card for net\n" in card
    assert "top-1 accuracy" in card and "secret" not in card
    again = timm.create_model("hf-hub:me/net", pretrained=True)
    assert torch.equal(_outputs(again), _outputs(network))
    (files / "README.md").write_text("mine")
    push_to_hub(network, "me/net", run)
    assert (files / "README.md").read_text() == "mine"


def test_nothing_is_asked_of_the_hub_for_a_network_that_cannot_be_made_again(hub):
    network = _network("shiftresnet20")
    network.reparameterize()
    with pytest.raises(ValueError, match="reparameterize"):
        push_to_hub(network, "me/net")
    assert not hub.folder.exists() and not hasattr(hub, "asked")


@pytest.mark.parametrize("name", ["shiftresnet20", "slak_tiny", "unireplknet_a", "shiftwise_tiny"])
def test_a_reparameterized_network_is_refused(tmp_path, name):
    network = _network(name)
    network.reparameterize()
    with pytest.raises(ValueError, match=rf"^the network is not what timm makes by {name}\(.*; save it before repar"):
        save_for_hub(network, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_what_is_no_network_of_timm_is_refused(tmp_path):
    with pytest.raises(TypeError, match="network must be a module, got str"):
        save_for_hub("shiftresnet20", tmp_path)
    with pytest.raises(ValueError, match="Linear is no network that timm made: it has no pretrained_cfg"):
        save_for_hub(nn.Linear(3, 3), tmp_path)
    for name in ("shiftresnet20", "slak_tiny", "resnet10t"):
        with pytest.raises(ValueError, match="is a backbone of features_only"):
            save_for_hub(_network(name, features_only=True), tmp_path)
    network = _network("shiftresnet20")
    network.pretrained_cfg = network.pretrained_cfg | dict(architecture="mine")
    with pytest.raises(ValueError, match=r"timm cannot make mine\(.* again: Unknown model"):
        save_for_hub(network, tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_folder_must_not_be_a_file(tmp_path):
    (tmp_path / "net").write_text("")
    with pytest.raises(ValueError, match=r"the target .*net is a file; give a folder"):
        save_for_hub(_network("shiftresnet20"), tmp_path / "net")


def test_labels_must_fit(tmp_path):
    for labels, got in ((["a"], "got 1"), ("abc", "got 'abc'")):
        with pytest.raises(ValueError, match=f"labels must be a list of 3, one for each class, {got}"):
            save_for_hub(_network("resnet10t"), tmp_path, labels=labels)


def test_a_run_without_result(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*result\.json; a run writes it when it has ended"):
        save_for_hub(_network("resnet20"), tmp_path / "net", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        save_for_hub(_network("resnet20"), tmp_path / "net", tmp_path / "nowhere")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("name", ["result.json", "config.yaml", "best.pt"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_run(run, tmp_path, name, content):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^(cannot read )?\S+/{name}"):
        save_for_hub(sc.load_checkpoint(None, run / "best.pt"), tmp_path / "net", copy)


def test_figures_of_another_network_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="trained shiftresnet20, not resnet20"):
        save_for_hub(_network("resnet20"), tmp_path / "net", run)
    untrained = sc.create_model("shiftresnet20", expansion=0.25)
    with pytest.raises(ValueError, match=r"has not the weights of .*best\.pt, whose figures the card would tell"):
        save_for_hub(untrained, tmp_path / "net", run)
    half = sc.load_checkpoint(None, run / "best.pt").half()
    save_for_hub(half, tmp_path / "net", run)
    weights = load_file(tmp_path / "net" / "model.safetensors")
    assert weights["conv1.weight"].dtype == torch.float16


def _authors(network, path, wrapper):
    weights = to_theirs(network.state_dict(), network)
    weights = {f"module.{key}": value for key, value in weights.items()}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, path)
    return str(path)


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_timm_loads_the_files_of_the_authors(tmp_path, wrapper):
    network = _network("unireplknet_a", kernel_sizes=None, in_chans=3)
    overlay = dict(file=_authors(network, tmp_path / "released.pth", wrapper))

    def load(**arguments):
        return timm.create_model("unireplknet_a", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)

    assert torch.equal(_outputs(load()), _outputs(network))
    other = load(num_classes=3, in_chans=1)
    assert _outputs(other).shape == (2, 3)
    assert torch.allclose(other.stem[0].weight, network.stem[0].weight.sum(1, keepdim=True))
    assert torch.equal(other.stages[3].blocks[1].fc1.weight, network.stages[3].blocks[1].fc1.weight)


@pytest.mark.parametrize("name", ["slak_tiny", "shiftwise_tiny", "slak_shuffled_tiny"])
def test_timm_loads_other_files_of_the_authors(tmp_path, name):
    """Also where channels have another order, and tables of kernels are not in the file."""
    arguments = NETWORKS[name] | dict(layer_scale=1e-6)
    network = sc.create_model(name, **arguments)
    network.load_state_dict({key: _moved(value) for key, value in network.state_dict().items()})
    overlay = dict(file=_authors(network, tmp_path / "released.pth", "model"))
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    assert torch.equal(_outputs(again), _outputs(network))
    features = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, **arguments | dict(global_pool="avg")
    )
    assert torch.equal(_outputs(features)[-1], network.forward_features(_images()))


def _moved(value):
    return value + 0.05 * torch.rand_like(value) if value.is_floating_point() else value


def test_timm_loads_what_the_authors_have_on_the_hub(hub):
    network = _network("unireplknet_a", kernel_sizes=None, in_chans=3)
    folder = hub.folder / network.pretrained_cfg["hf_hub_id"]
    folder.mkdir(parents=True)
    _authors(network, folder / network.pretrained_cfg["hf_hub_filename"], "model")
    assert torch.equal(_outputs(timm.create_model("unireplknet_a", pretrained=True)), _outputs(network))


def test_a_file_that_does_not_fit_is_an_error(tmp_path):
    network = _network("unireplknet_a", kernel_sizes=None, in_chans=3)
    overlay = dict(file=_authors(network, tmp_path / "released.pth", "model"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("unireplknet_f", pretrained=True, pretrained_cfg_overlay=overlay)
