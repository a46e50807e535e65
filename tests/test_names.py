import pytest

from shiftconv.names import closest, unknown


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("shiftresnet21", ["shiftresnet20", "shiftresnet32", "resnet20"], "shiftresnet20"),  # 32 is as close by letters
        ("Zeros", ["zeros", "reflect"], "zeros"),
        ("shift", ["xyz"], None),
        ("x", [], None),
    ],
)
def test_closest(name, known, meant):
    assert closest(name, known) == meant


def test_unknown_says_what_came_what_was_meant_and_what_there_is():
    message = str(unknown("padding_mode", "zero", ["zeros", "reflect"]))
    assert message == "unknown padding_mode 'zero'; did you mean 'zeros'? Known: reflect, zeros"
    assert str(unknown("model", "x", [f"net{i}" for i in range(15)])).endswith("net6 and 3 more")
