import pytest

from shiftconv.train.record import gather, read

from .run_folders import ROWS, make_run


def test_a_finished_run(tmp_path):
    test = {"top1": 0.7, "images": 20, "note": "no number"}
    record = read(make_run(tmp_path / "a", result={"best_epoch": 3, "test": test}))
    assert (record.name, record.finished, record.state, record.best_epoch) == ("a", 3, "finished", 3)
    assert record.recipe.model == "shiftresnet20"
    assert record.test == {"top1": 0.7, "images": 20}
    assert record.series("train_loss") == ([1, 2, 3], [2.0, 1.0, 2 / 3])
    assert record.best("val_accuracy") == (2, 0.75), "the first epoch of the best"
    assert record.best("unknown") is None
    assert record.scores == ["val_accuracy"]
    assert record.notes == record.starts == ()


def test_states_of_a_run_that_has_not_ended(tmp_path):
    assert read(make_run(tmp_path / "a", rows=None)).state == "running or stopped, no epoch done"
    assert read(make_run(tmp_path / "b", rows=ROWS[:2])).state == "running or stopped at epoch 2, step 6"
    done = read(make_run(tmp_path / "c"))
    assert done.state == "all epochs done, not evaluated"
    assert done.best_epoch == 2
    assert read(make_run(tmp_path / "d", rows=[])).best_epoch is None


def test_a_damaged_line_is_left_out_and_told(tmp_path):
    folder = make_run(tmp_path / "a", rows=ROWS[:2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[]\n\n{"epoch": 0}\n{"step": 3}\n{"epoch": 1.5}\n{"epoch": 3, "val_lo')
    record = read(folder)
    assert record.finished == 2
    told = [note.split(" of ")[0] for note in record.notes]
    assert told == ["line 3", "line 5", "line 6", "line 7", "line 8"]
    assert record.notes[0].endswith("metrics.jsonl is damaged and left out")


def test_an_epoch_that_was_run_again_stands_once(tmp_path):
    again = [ROWS[0], ROWS[1], replaced := ROWS[1] | {"val_accuracy": 0.9}, ROWS[2], ROWS[0]]
    record = read(make_run(tmp_path / "a", rows=again))
    assert [row["epoch"] for row in record.rows] == [1, 2, 3]
    assert record.rows[1]["val_accuracy"] == replaced["val_accuracy"]


def test_what_is_no_number_is_left_out_of_the_rows_and_of_the_best(tmp_path):
    odd = [{"epoch": 1, "val_accuracy": float("nan"), "a": "text", "b": True, "c": None, "d": 10**400}, ROWS[1]]
    record = read(make_run(tmp_path / "a", rows=odd))
    assert set(record.rows[0]) == {"epoch", "val_accuracy", "d"}
    assert record.rows[0]["d"] == float("inf")
    assert record.best("val_accuracy") == (2, 0.75)


def test_other_scores_than_accuracy_are_found(tmp_path):
    rows = [{"epoch": 1, "val_miou": 0.3, "val_loss": 1, "ema_loss": 1, "ema_miou": 0.2}]
    record = read(make_run(tmp_path / "a", rows=rows))
    assert record.scores == ["val_miou", "ema_miou"]
    assert record.best_epoch == 1


def test_the_environment_of_each_start(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "environment.json").write_text('[{"torch": "1"}, 3, {"torch": "2"}]')
    assert [start["torch"] for start in read(folder).starts] == ["1", "2"]
    (folder / "environment.json").write_text('{"torch": "1"}')
    assert len(read(folder).starts) == 1


@pytest.mark.parametrize("name", ["environment.json", "result.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_left_out_and_told(tmp_path, name, content):
    folder = make_run(tmp_path / "a")
    (folder / name).write_bytes(content)
    record = read(folder)
    assert (record.result, record.starts) == (None, ())
    assert record.notes == (f"{folder / name} is damaged and left out",)


@pytest.mark.parametrize("content", ["[]", '{"test": [1], "best_epoch": "x"}', "3"])
def test_a_result_of_another_form_is_no_result(tmp_path, content):
    folder = make_run(tmp_path / "a")
    (folder / "result.json").write_text(content)
    assert read(folder).test == {}
    assert read(folder).best_epoch == 2


def test_a_folder_that_is_no_run_is_named(tmp_path):
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (
        ("nowhere", "there is no such folder"),
        ("file", "it is a file"),
        ("empty", "it has none"),
        ("runs", "it holds runs, a; give these"),
    ):
        with pytest.raises(
            ValueError, match=rf"{name} is no run: expected a folder with a run's config.yaml, but {reason}"
        ):
            read(tmp_path / name)
    (tmp_path / "runs" / "a" / "config.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"config.yaml holds no recipe"):
        read(tmp_path / "runs" / "a")


def test_the_number_of_runs(tmp_path):
    with pytest.raises(ValueError, match="compares 1 to 8 runs, got 0"):
        gather([])
    with pytest.raises(ValueError, match="compares 1 to 8 runs, got 9"):
        gather([tmp_path / str(i) for i in range(9)])
    with pytest.raises(TypeError, match="runs must be a list of folders, got 'runs/a'"):
        gather("runs/a")


def test_a_folder_given_twice_is_read_once_and_told(tmp_path, monkeypatch):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    first, second = gather([tmp_path / "a", "b", "a"])
    assert (first.name, second.name) == ("a", "b")
    assert first.notes == ("it was given 2 times and counts once",)
    assert second.notes == ()


def test_names_that_clash_get_those_of_their_parents(tmp_path):
    for name in ("x/run", "y/run", "p/x/run", "other"):
        make_run(tmp_path / name)
    names = [record.name for record in gather([tmp_path / name for name in ("x/run", "y/run", "p/x/run", "other")])]
    assert names == [f"{tmp_path.name}/x/run", "y/run", "p/x/run", "other"]


def test_a_name_stands_on_one_line_and_is_unicode(tmp_path):
    folder = make_run(tmp_path / "a")
    odd = folder.rename(tmp_path / "b\n\udcff")
    (record,) = gather([odd])
    assert record.name == "b ?"
