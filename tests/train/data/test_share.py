from itertools import product

import pytest

from shiftconv.train.data.share import Share, deal


def updates(images, batch_size, share, first=0):
    """The micro-batches of each update."""
    found = [[]]
    for piece in deal(range(images), batch_size, share, first):
        found[-1].append(piece)
        found += [[]] * piece.ends
    assert found.pop() == []
    return found


def ranks(images, batch_size, world, micro=None, mirrored=False):
    """Updates of all ranks: micro-batches in lists by update, then rank."""
    shares = [Share(rank, world, micro, mirrored) for rank in range(world)]
    return list(zip(*(updates(images, batch_size, share) for share in shares), strict=True))


CASES = list(product((1, 2, 3, 4), (None, 1, 2, 3, 5), ((23, 8), (17, 16), (9, 3), (5, 7), (1, 4))))


@pytest.mark.parametrize("world, micro, sizes", CASES)
def test_every_image_is_dealt_once_and_shares_sum_to_one(world, micro, sizes):
    images, batch = sizes
    found = ranks(images, batch, world, micro)
    assert len(found) == -(-images // batch)
    for number, update in enumerate(found):
        assert len({len(pieces) for pieces in update}) == 1  # ranks can wait for each other
        pieces = [piece for of_rank in update for piece in of_rank]
        real = sorted(index for piece in pieces if piece.share for index in piece.indices)
        assert real == list(range(number * batch, min(images, number * batch + batch)))
        assert sum(piece.share for piece in pieces) == pytest.approx(1)
        for piece in pieces:
            assert piece.indices and (not piece.share or piece.share == pytest.approx(len(piece.indices) / len(real)))
            assert micro is None or len(piece.indices) <= micro
            assert piece.share or len(piece.indices) == 1
        lengths = [len(piece.indices) for piece in pieces if piece.share]
        assert max(lengths) - min(lengths) <= 1


def test_alone_the_pieces_are_the_batches():
    pieces = list(deal([3, 1, 4, 0, 5, 2, 6], 3, Share()))
    assert pieces == [([3, 1, 4], 1.0, True), ([0, 5, 2], 1.0, True), ([6], 1.0, True)]


def test_so_many_micro_batches_as_are_needed():
    assert [len(update) for update in updates(32, 32, Share(micro_batch_size=7))] == [5]
    assert [len(update) for update in updates(32, 32, Share(0, 4, 7))] == [2]
    assert [len(piece.indices) for piece in updates(10, 10, Share(micro_batch_size=4))[0]] == [4, 3, 3]


@pytest.mark.parametrize("mirrored", [False, True])
def test_from_an_update_on(mirrored):
    share = Share(1, 2, 2, mirrored)
    assert updates(23, 8, share, 2) == updates(23, 8, share)[2:]
    assert updates(23, 8, share, 3) == []


@pytest.mark.parametrize("images, batch", [(24, 24), (26, 12), (31, 16), (9, 4)])
def test_mixed_pairs_depend_neither_on_ranks_nor_on_accumulation(images, batch):
    def pairs(world, micro):
        found = []
        for update in ranks(images, batch, world, micro, mirrored=True):
            pieces = [piece for of_rank in update for piece in of_rank]
            assert sum(piece.share for piece in pieces) == pytest.approx(1)
            assert len({len(of_rank) for of_rank in update}) == 1
            both = [pair for p in pieces if p.share for pair in zip(p.indices, p.indices[::-1], strict=True)]
            assert len(both) == len(set(both)) or len(update[0]) == 1
            found.append(set(both))
        return found

    whole = pairs(1, None)
    for number, found in enumerate(whole):  # as the whole update is flipped
        even = list(range(number * batch, min(images, number * batch + batch)))
        even = even[: len(even) // 2 * 2] or even * 2
        assert found == set(zip(even, even[::-1], strict=True))
    for world, accumulation in product((1, 2, 4), (1, 2, 3)):
        assert pairs(world, -(-batch // world // accumulation)) == whole


@pytest.mark.parametrize("micro", [1, 2, 3, 5])
def test_mirrored_micro_batches_are_no_larger_either(micro):
    pieces = [piece for update in updates(23, 12, Share(0, 1, micro, True)) for piece in update]
    assert max(len(piece.indices) for piece in pieces) <= max(2, micro)


def test_mirrored_but_alone_the_order_stays():
    (piece,) = deal(range(8), 8, Share(mirrored=True))
    assert piece.indices == list(range(8))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(world=0), ValueError, "world must be at least 1, got 0"),
        (dict(rank=2, world=2), ValueError, "rank must be below the number of processes, 2, got 2"),
        (dict(rank=-1), ValueError, "rank must be at least 0"),
        (dict(micro_batch_size=0), ValueError, "micro_batch_size must be at least 1"),
        (dict(micro_batch_size=1.5), TypeError, "micro_batch_size must be a whole number"),
    ],
)
def test_a_share_must_be_possible(wrong, error, message):
    with pytest.raises(error, match=message):
        Share(**wrong)
