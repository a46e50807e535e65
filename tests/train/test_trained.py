import torch

from shiftconv.train.record import read
from shiftconv.train.settings import Data
from shiftconv.train.trained import Probes, first_line, image_side, look

from .run_folders import make_run, save_weights


def test_cost_zeros_and_receptive_field_of_the_best_weights(tmp_path):
    folder = make_run(tmp_path / "a")
    model = save_weights(folder, keep=0.25)
    trained = look(read(folder), Probes(2))
    assert trained.failed == {}
    assert trained.count.parameters == sum(value.numel() for value in model.parameters())
    assert trained.count.size == (3, 16, 16)
    first, *others = trained.densities.values()
    assert first == 0.25
    assert set(others) == {1.0}
    weights = [value for value in model.parameters() if value.ndim > 1]
    assert list(trained.densities) == [name for name, value in model.named_parameters() if value.ndim > 1]
    assert trained.density == 1 - 0.75 * weights[0].numel() / sum(value.numel() for value in weights)
    assert trained.erf.matrix.shape == (16, 16)
    assert (trained.erf.images, trained.images) == (2, "2 validation images")


def test_the_receptive_field_may_be_left_out(tmp_path):
    folder = make_run(tmp_path / "a")
    save_weights(folder)
    trained = look(read(folder), None)
    assert trained.erf is None
    assert trained.failed == {}


def test_the_last_weights_stand_in_for_damaged_ones(tmp_path):
    folder = make_run(tmp_path / "a")
    save_weights(folder, "last.pt")
    assert look(read(folder), None).failed == {}
    (folder / "best.pt").write_bytes(b"junk")
    trained = look(read(folder), None)
    assert trained.count is not None
    assert trained.failed["best.pt"].endswith("text that begins 'junk'; last.pt stands in for it")


def test_a_run_without_weights_tells_so(tmp_path):
    folder = make_run(tmp_path / "a", rows=None)
    trained = look(read(folder), Probes(2))
    assert trained.failed == {"weights": "the run has no best.pt or last.pt"}
    assert trained.density == 1


def test_each_failure_stays_in_its_place(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a")
    save_weights(folder)

    def fail(*_):
        raise RuntimeError("\nout of luck\nand more")

    monkeypatch.setattr("shiftconv.train.trained.erf", fail)
    trained = look(read(folder), Probes(1))
    assert trained.failed == {"erf": "out of luck"}
    assert trained.count is not None
    monkeypatch.setattr("shiftconv.train.trained.count", fail)
    assert look(read(folder), None).failed == {"count": "out of luck"}


def test_noise_where_the_data_do_not_open_and_never_a_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = read(make_run(tmp_path / "a", data=Data(name="folder", folder="gone", image_size=24)))
    images, told, reason = Probes(3).of(gone.recipe)
    assert (tuple(images.shape), told) == ((3, 3, 24, 24), "3 images of noise")
    assert "gone" in reason
    state = torch.random.get_rng_state()
    assert torch.equal(images, Probes(3).of(gone.recipe)[0])
    assert torch.equal(state, torch.random.get_rng_state())

    def never(_):
        raise AssertionError("opened")

    monkeypatch.setattr("shiftconv.train.trained.open_data", never)
    far = read(make_run(tmp_path / "b", data=Data(name="hfds/pictures", image_size=8)))
    assert Probes(1).of(far.recipe)[2] == "the data set hfds/pictures may have to be downloaded"


def test_runs_of_the_same_data_are_looked_at_with_the_same_images(tmp_path):
    probes = Probes(2)
    one, two = (read(make_run(tmp_path / name, data=Data(image_size=8, workers=n))) for name, n in (("a", 0), ("b", 1)))
    assert probes.of(one.recipe)[0] is probes.of(two.recipe)[0]


def test_sides_of_images_as_the_settings_say(tmp_path):
    sides = [Data(), Data(name="cifar100"), Data(name="folder", folder="x"), Data(image_size=64)]
    records = [read(make_run(tmp_path / str(i), data=data)) for i, data in enumerate(sides)]
    assert [image_side(record.recipe) for record in records] == [32, 32, 224, 64]


def test_errors_on_one_line():
    assert first_line(ValueError("\n one\ntwo")) == " one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 500)) == "x" * 300 + " ..."
