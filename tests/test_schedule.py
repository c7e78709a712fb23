"""Schedules, learning rate and pool against METHOD's tables, worked by hand."""

import math

import pytest

from utils.cli import UserError
from validate.schedule import (
    BatchPool,
    auto_soft_epochs,
    epoch_kinds,
    learning_rate,
    phases,
)

H, S = "hard", "soft"


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
        ("S3", 8, 4, 2, [(H, 4), (S, 8)]),
        ("S3", 8, 8, 2, [(H, 4), (S, 4), (H, 4), (S, 4)]),
        ("S4", 5, 3, 2, [(S, 2), (H, 2), (S, 2), (H, 1), (S, 1)]),
        ("S5", 4, 4, 1, [(S, 2), (H, 2), (S, 2), (H, 2)]),
        ("S7", 4, 5, 1, [(H, 2), (S, 4), (H, 3)]),
        ("S8", 4, 3, 1, [(S, 4), (H, 3)]),
        ("soft:75,hard:150,soft:75", 0, 0, 1, [(S, 75), (H, 150), (S, 75)]),
        ("soft:1, soft:2,hard:0", 0, 0, 1, [(S, 3)]),
    ],
)
def test_phases(name, soft, hard, passes, expected):
    assert phases(name, soft, hard, passes) == expected


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
        phases(name, 1, 1, 1)


def test_epoch_kinds():
    assert epoch_kinds([(S, 2), (H, 1)]) == [S, S, H]


def test_learning_rate():
    assert learning_rate(0, 300, 0.001, 2) == 0.001
    assert learning_rate(150, 300, 0.001, 1) == pytest.approx(0.0005)
    assert learning_rate(150, 300, 0.001, 2) == pytest.approx(0.001 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(299, 300, 0.001, 2) == pytest.approx(0.0005, rel=0.01)


def test_pool_draws_without_replacement_and_refills_when_it_runs_out():
    pool = BatchPool(5, seed=1)
    first, second = pool.take(3), pool.take(7)
    taken = first + second
    assert sorted(taken[:5]) == list(range(5))
    assert sorted(taken[5:]) == list(range(5))
    assert taken[:5] != taken[5:]


def test_refilling_starts_a_new_shuffle_and_state_resumes_it():
    pool = BatchPool(50, seed=1)
    first = pool.take(20)
    pool.refill()
    saved = pool.state
    second = pool.take(50)
    assert sorted(second) == list(range(50)) and second[:20] != first
    resumed = BatchPool(50, seed=1)
    resumed.state = saved
    assert resumed.take(50) == second
    assert BatchPool(50, seed=2).take(20) != first


@pytest.mark.parametrize(
    ("labels_per_image", "classes", "expected"),
    [
        *((1, 10, 150), (3, 10, 150), (4, 10, 225), (5, 10, 225)),
        *((1, 200, 150), (2, 200, 225), (3, 200, 225), (1, 1000, 150), (2, 1000, 225)),
    ],
)
def test_more_labels_and_more_classes_mean_more_soft_epochs(labels_per_image, classes, expected):
    assert auto_soft_epochs(300, labels_per_image, classes) == expected
