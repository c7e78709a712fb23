"""Schedules, learning rate and pool against the paper's tables, worked by hand."""

import math

import pytest

from utils.cli import UserError
from validate.schedule import (
    auto_soft_epochs,
    drawn_from_pool,
    label_batches,
    learning_rate,
    phases,
)

H, S = "hard", "soft"
KINDS = ["soft", "hard", "joint", "static"]


@pytest.mark.parametrize(
    ("name", "soft", "hard", "passes", "expected"),
    [
        ("hald", 150, 150, 15, [(S, 75), (H, 150), (S, 75)]),
        ("hald", 5, 3, 1, [(S, 2), (H, 3), (S, 3)]),
        ("hald", 1, 2, 1, [(H, 2), (S, 1)]),
        ("S6", 5, 3, 1, [(S, 2), (H, 3), (S, 3)]),
        ("soft", 150, 150, 1, [(S, 300)]),
        ("hard", 150, 150, 1, [(H, 300)]),
        ("S1", 4, 3, 1, [(H, 3), (S, 4)]),
        ("S2", 4, 4, 2, [(H, 2), (S, 2), (H, 2), (S, 2)]),
        ("S3", 8, 4, 2, [(H, 4), (S, 4), (H, 4)]),
        ("S3", 8, 8, 2, [(H, 4), (S, 4), (H, 4), (S, 4)]),
        ("S4", 5, 3, 2, [(S, 2), (H, 2), (S, 2), (H, 2)]),
        ("S4", 1, 8, 2, [(S, 2), (H, 2), (S, 2), (H, 2), (S, 1)]),
        ("S2", 9, 0, 5, [(H, 5), (S, 4)]),
        ("S2", 10, 13, 3, [*[(H, 3), (S, 3)] * 3, (H, 3), (S, 2)]),
        ("S3", 10, 13, 3, [(H, 6), (S, 6), (H, 6), (S, 5)]),
        ("S5", 10, 13, 3, [(S, 6), (H, 6), (S, 6), (H, 5)]),
        ("S2", 150, 150, 7, [*[(H, 7), (S, 7)] * 21, (H, 6)]),
        ("S3", 150, 150, 7, [*[(H, 14), (S, 14)] * 10, (H, 14), (S, 6)]),
        ("S4", 150, 150, 7, [*[(S, 7), (H, 7)] * 21, (S, 6)]),
        ("S2", 150, 150, 10, [(H, 10), (S, 10)] * 15),
        ("S3", 150, 150, 10, [*[(H, 20), (S, 20)] * 7, (H, 20)]),
        ("S5", 150, 150, 10, [*[(S, 20), (H, 20)] * 7, (S, 20)]),
        ("S2", 150, 150, 20, [*[(H, 20), (S, 20)] * 7, (H, 20)]),
        ("S3", 150, 150, 20, [*[(H, 40), (S, 40)] * 3, (H, 40), (S, 20)]),
        ("S5", 4, 4, 1, [(S, 2), (H, 2), (S, 2), (H, 2)]),
        ("S7", 4, 5, 1, [(H, 2), (S, 4), (H, 3)]),
        ("S8", 4, 3, 1, [(S, 4), (H, 3)]),
        ("soft:75,hard:150,soft:75", 0, 0, 1, [(S, 75), (H, 150), (S, 75)]),
        ("soft:1, soft:2,hard:0", 0, 0, 1, [(S, 3)]),
    ],
)
def test_phases(name, soft, hard, passes, expected):
    assert phases(name, soft, hard, passes, KINDS) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hlad", r"did you mean .*hald\?"),
        ("soft:10,firm:3", "'firm:3' is not of the form"),
        ("soft:-1", "'soft:-1' is not of the form"),
        ("soft:0", "has no epochs"),
    ],
)
def test_schedules_that_do_not_parse(name, message):
    with pytest.raises(UserError, match=message):
        phases(name, 1, 1, 1, KINDS)


def test_learning_rate():
    assert learning_rate(0, 300, 0.001, 2) == 0.001
    assert learning_rate(150, 300, 0.001, 1) == pytest.approx(0.0005)
    assert learning_rate(150, 300, 0.001, 2) == pytest.approx(0.001 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(299, 300, 0.001, 2) == pytest.approx(0.0005, rel=0.01)


def drawn(plan, epoch, per_epoch, pool, seed=1):
    return drawn_from_pool(
        phases=plan,
        epoch=epoch,
        per_epoch=per_epoch,
        pool=pool,
        drawing={"soft", "joint"},
        seed=seed,
    )


def test_the_pool_is_drawn_without_replacement_shuffle_after_shuffle():
    pool = [3, 5, 7, 11, 13]
    batches = [batch for epoch in range(5) for batch in drawn([(S, 5)], epoch, 2, pool)]
    assert sorted(batches[:5]) == sorted(batches[5:]) == pool
    assert batches[:5] != batches[5:]
    assert drawn([(S, 5)], 0, 12, pool)[:10] == batches


def test_every_phase_begins_with_a_shuffle_of_its_own():
    pool, plan = list(range(50)), [(S, 2), (H, 3), (S, 3), ("joint", 1)]
    first, second, third = (
        drawn(plan, 0, 20, pool),
        drawn(plan, 5, 20, pool),
        drawn(plan, 8, 20, pool),
    )
    assert len({*map(tuple, (first, second, third))}) == 3
    rest = second + drawn(plan, 6, 20, pool) + drawn(plan, 7, 20, pool)
    assert sorted(rest[:50]) == pool and len({*rest[50:]}) == 10
    assert drawn(plan, 0, 20, pool, seed=2) != first


def test_a_phase_that_does_not_draw_changes_nothing():
    """Hard epochs before and between leave the numbers of the shuffles alone."""
    pool = list(range(9))
    plain, mixed = [(S, 4), ("joint", 2)], [(H, 1), (S, 4), ("static", 2), ("joint", 2)]
    assert drawn(plain, 3, 5, pool) == drawn(mixed, 4, 5, pool)
    assert drawn(plain, 5, 5, pool) == drawn(mixed, 8, 5, pool)


def test_pruning_keeps_so_many_different_batches():
    kept = label_batches(40, 10, "random", seed=1)
    assert len(set(kept)) == 10 and kept == sorted(kept) and set(kept) <= set(range(40))
    assert kept != label_batches(40, 10, "random", seed=2)
    assert label_batches(40, 3, "first", seed=1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels_per_image", "classes", "expected"),
    [
        *((1, 10, 150), (3, 10, 150), (4, 10, 225), (5, 10, 225)),
        *((1, 200, 150), (2, 200, 225), (3, 200, 225), (1, 1000, 150), (2, 1000, 225)),
    ],
)
def test_more_labels_and_more_classes_mean_more_soft_epochs(labels_per_image, classes, expected):
    assert auto_soft_epochs(300, labels_per_image, classes) == expected
