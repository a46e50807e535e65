import numpy as np
import pytest

from shiftconv.train.data.splits import stratified


def test_stratified_disjoint_and_whole():
    labels = [0] * 40 + [1] * 10
    keys = [str(i).encode() for i in range(50)]
    parts = stratified(keys, labels, (0.2, 0.1))
    assert sorted(index for part in parts for index in part) == list(range(50))
    assert [np.bincount(np.array(labels)[part]).tolist() for part in parts] == [[28, 7], [8, 2], [4, 1]]


def test_independent_of_the_order():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60).tolist()
    keys = [str(i).encode() for i in range(60)]
    order = rng.permutation(60).tolist()
    plain = stratified(keys, labels, (0.3,))
    mixed = stratified([keys[i] for i in order], [labels[i] for i in order], (0.3,))
    assert [sorted(order[i] for i in part) for part in mixed] == plain


def test_first_part_is_independent_of_the_second():
    keys, labels = [str(i).encode() for i in range(100)], [0] * 100
    assert stratified(keys, labels, (0.2, 0.1))[1] == stratified(keys, labels, (0.2, 0.4))[1]


def test_too_few():
    with pytest.raises(ValueError, match="class number 3 has 2 images, too few"):
        stratified([b"a", b"b"], [3, 3], (0.1, 0.1))
