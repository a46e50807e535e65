"""The loop trains what is no classification too: segmentation and detection, by their tasks alone."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from shiftconv.train.data import DataSets, open_data
from shiftconv.train.data.images import MemoryImages
from shiftconv.train.data.loader import MicroBatch
from shiftconv.train.loop import train
from shiftconv.train.recipe import Recipe
from shiftconv.train.settings import Data, Optim
from shiftconv.train.task import Classification, Detection, Segmentation

RECIPE = Recipe(
    model="shiftresnet20",
    model_args={"expansion": 1},
    epochs=2,
    batch_size=16,
    optim=Optim("adamw", lr=3e-3, decay_norms=False),
    ema_decay=0.8,
    tensorboard=False,
)


class Pixels(nn.Module):
    """Logits of each pixel, from the network's first layers."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.head = backbone, nn.Conv2d(16, classes, 1)

    def forward(self, x):
        return self.head(self.backbone.layer1(self.backbone.bn1(self.backbone.conv1(x)).relu()))


def ink_data(count=64):
    """Digits whose pixels are ink or paper; some pixels do not count."""
    whole = open_data(Data("digits", augment=False))
    images = whole.train.images[:count]
    labels = (images[:, 0] > 100).long()
    labels[:, 0, :] = 255
    parts = [MemoryImages(images[a:b], labels[a:b], whole.normalisation) for a, b in ((0, 48), (48, count))]
    return DataSets("ink", parts[0], parts[1], None, ("paper", "ink"), whole.normalisation, 32)


def test_segmentation_learns_in_the_loop(tmp_path):
    def task(recipe, network):
        return Segmentation(Pixels(network, 2), 2)

    result = train(replace(RECIPE, epochs=4), tmp_path / "run", device="cpu", data=ink_data(), make_task=task)
    first, last = result.history[0], result.history[-1]
    assert last["val_miou"] > max(0.7, first["val_miou"])
    assert result.val.scores["miou"] == pytest.approx(max(r["val_miou"] for r in result.history), abs=0.2)
    assert {"ema_miou", "val_accuracy", "train_miou"} <= last.keys()
    assert result.best_epoch == 1 + max(
        range(4), key=lambda i: max(result.history[i]["val_miou"], result.history[i]["ema_miou"])
    )
    resumed = train(
        replace(RECIPE, epochs=4), tmp_path / "run", resume="auto", device="cpu", data=ink_data(), make_task=task
    )
    assert resumed.history == result.history


def test_miou_equals_the_definition():
    task = Segmentation(nn.Identity(), 3)
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = 255
    found = task.read(task.counts(logits, labels).tolist(), 2)
    guess, ious, right, seen = logits.argmax(1), [], 0, 0
    for k in range(3):
        both = either = 0
        for g, y in zip(guess.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if y != 255:
                both += g == k == y
                either += k in (g, y)
        ious.append(both / either)
        right += both
    seen = int((labels != 255).sum())
    assert found == pytest.approx({"miou": sum(ious) / 3, "accuracy": right / seen})


class Boxes:
    """Noise with one bright square in each image, served as lists."""

    def __init__(self, count):
        self.bad, self.restarts, self.tell = {}, 0, None
        draw = torch.Generator().manual_seed(count)
        self.images = [torch.rand(3, 32, 32, generator=draw) * 0.3 for _ in range(count)]
        self.targets = []
        for image in self.images:
            y, x = torch.randint(0, 16, (2,), generator=draw).tolist()
            image[:, y : y + 16, x : x + 16] += 0.6
            box = torch.tensor([[x, y, x + 16.0, y + 16.0]])
            self.targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.long)})

    def __len__(self):
        return math.ceil(len(self.images) / 4)

    def start_epoch(self, epoch):
        pass

    def __iter__(self):
        for i in range(0, len(self.images), 4):
            yield self.images[i : i + 4], self.targets[i : i + 4]

    def steps(self, first=0):
        for images, targets in [*self][first:]:
            yield MicroBatch(images, targets, 1.0, True)


def test_detection_learns_in_the_loop(tmp_path):
    class Backbone(nn.Module):
        out_channels = 64

        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return {"0": self.network.forward_features(x)}

    def task(recipe, network):
        anchors = AnchorGenerator(((12, 16, 24),), ((1.0,),))
        sizes = dict(min_size=32, max_size=32, box_detections_per_img=5, rpn_post_nms_top_n_train=50)
        return Detection(FasterRCNN(Backbone(network), 2, rpn_anchor_generator=anchors, **sizes))

    parts = {"train": Boxes(16), "val": Boxes(8)}
    data = SimpleNamespace(
        name="boxes",
        num_classes=2,
        class_names=("paper", "square"),
        normalisation=((0.0,) * 3, (1.0,) * 3),
        image_size=32,
        train=parts["train"].images,
        val=parts["val"].images,
        test=None,
        loader=lambda split, *_, **__: parts[split],
    )
    recipe = replace(RECIPE, epochs=3, batch_size=4, ema_decay=None)
    result = train(recipe, tmp_path / "run", device="cpu", data=data, make_task=task)
    losses = [row["val_loss"] for row in result.history]
    assert losses[-1] < losses[0]
    assert result.val.scores["negative_loss"] == pytest.approx(-result.val.loss)


def test_losses_of_classification():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    hard = nn.functional.one_hot(labels, 4).double()
    smooth = hard * 0.9 + 0.1 / 4
    log = logits.log_softmax(1)
    binary = -(smooth * nn.functional.logsigmoid(logits) + (1 - smooth) * nn.functional.logsigmoid(-logits))
    assert Classification(nn.Identity(), "ce", 0.1).loss(logits, labels) == pytest.approx(-(smooth * log).sum(1).mean())
    assert Classification(nn.Identity(), "ce", 0.1).loss(logits, smooth) == pytest.approx(-(smooth * log).sum(1).mean())
    for targets in (labels, smooth):
        assert Classification(nn.Identity(), "bce", 0.1).loss(logits, targets) == pytest.approx(binary.sum(1).mean())
