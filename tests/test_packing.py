"""Integers as bytes: hand-worked streams, all ranges back and forth, damage."""

import numpy as np
import pytest

from utils.cli import UserError
from utils.labels import packing


def test_packed_bits_are_one_stream():
    values = np.array([5, 0, 7, 2])
    assert packing.pack_bits(values, 3) == bytes([0b10100011, 0b10100000])
    assert packing.unpack_bits(packing.pack_bits(values, 3), 3, 4).tolist() == values.tolist()


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 7, 8, 127, 128, 32767])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_packed_integers_come_back(largest, rows):
    random = np.random.default_rng(rows)
    values = random.integers(-largest, largest + 1, (rows, 5)).astype(np.int16)
    values[0] = [largest, -largest, 0, 0, 1 if largest else 0]
    packed = packing.pack_integers(values)
    assert np.array_equal(packing.unpack_integers(packed, 5), values)
    assert packed == packing.pack_integers(values.copy())


def test_ternary_numbers_share_bytes():
    values = np.random.default_rng(0).integers(-1, 2, (10_000, 4)).astype(np.int16)
    assert len(packing.pack_integers(values)) < 1.03 * values.size * np.log2(3) / 8


def test_damaged_integers_are_refused():
    packed = packing.pack_integers(np.arange(-20, 20, dtype=np.int16).reshape(-1, 2))
    for bad in (packed[:-3], b"\x55" + packed[1:], b""):
        with pytest.raises(UserError, match="damaged"):
            packing.unpack_integers(bad, 2)
    with pytest.raises(UserError, match="damaged"):
        packing.unpack_integers(packed, 1)
