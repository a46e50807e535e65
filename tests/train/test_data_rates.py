import time

import pytest

from shiftconv.train.data import loader
from shiftconv.train.data_rates import DataRates, data_rates
from shiftconv.train.settings import Data


def rates(loading, training=None, cores=4):
    return DataRates("pets", 224, 64, cores, loading, "resnet20" if training else None, training, "cuda")


def test_the_fewest_workers_that_keep_up():
    assert rates({0: 200.0, 1: 95.0, 2: 190.0}, 150.0).workers_needed == 2  # for 0 would not read beside training
    found = rates({0: 100.0, 1: 95.0, 2: 190.0, 4: 370.0}, 150.0)
    assert found.workers_needed == 2
    assert found.verdict == "reading keeps up: resnet20 learns from 150 images/s on cuda; data.workers 2 is enough"


def test_reading_as_the_bottleneck():
    found = rates({0: 100.0, 1: 95.0, 2: 190.0}, 300.0)
    assert found.workers_needed == 4
    assert found.verdict == (
        "reading is the bottleneck: resnet20 learns from 300 images/s on cuda, but at best 190 are read, with "
        "2 workers; try data.workers 4"
    )
    assert "about 22 workers would be needed, and there are 4 processors" in rates({1: 50.0}, 1000.0).verdict


def test_a_table_without_a_network():
    found = rates({2: 190.4, 0: 100.0})
    assert found.workers_needed is None
    assert str(found).splitlines() == [
        "pets, 224 px, batches of 64",
        "workers  images/s",
        "      0       100",
        "      2       190",
        "fastest: 190 images/s with 2 workers",
    ]


def test_measures_a_folder_and_a_network(pictures):
    found = data_rates(
        Data(name="folder", folder=str(pictures), image_size=32),
        "shiftresnet20",
        batch_size=8,
        seconds=0.1,
        workers=0,
        device="cpu",
    )
    assert set(found.loading) == {0} and found.loading[0] > 0 and found.training and found.training > 0
    assert found.name == str(pictures) and found.image_size == 32 and found.device == "cpu"


def test_all_numbers_of_workers(pictures, monkeypatch):
    monkeypatch.setattr("shiftconv.train.data_rates._cores", lambda: 2)
    found = data_rates(Data(name="folder", folder=str(pictures), image_size=8), seconds=0.05)
    assert list(found.loading) == [0, 1, 2] and found.model is found.training is None


def test_a_path_is_a_folder_of_images(pictures):
    assert data_rates(pictures, seconds=0.05, workers=0).name == str(pictures)
    assert data_rates(str(pictures), seconds=0.05, workers=0, batch_size=4).image_size == 224


def test_the_rate_is_that_of_the_loader(pictures, monkeypatch):
    read = loader.collate
    monkeypatch.setattr(loader, "collate", lambda samples: time.sleep(0.1) or read(samples))
    found = data_rates(Data(name="folder", folder=str(pictures), image_size=8), batch_size=5, seconds=0.3, workers=0)
    assert 10 < found.loading[0] < 50


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(data="digitz"), ValueError, "did you mean 'digits'"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(seconds=0), ValueError, "seconds must be above 0"),
        (dict(workers=-1), ValueError, "workers must be at least 0"),
        (dict(model="shiftresnet2O", seconds=0.01, workers=0), ValueError, "unknown model"),
    ],
)
def test_what_cannot_be_measured(wrong, error, message):
    with pytest.raises(error, match=message):
        data_rates(**{"data": "digits"} | wrong)
