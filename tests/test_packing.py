"""Integers as bytes: all ranges back and forth, damage."""

import numpy as np
import pytest
import torch
from pcodec import standalone

from utils.cli import UserError
from utils.labels.codecs.klt import pack_integers, unpack_integers


@pytest.mark.parametrize("largest", [0, 1, 2, 127, 128, 32767])
@pytest.mark.parametrize("columns", [0, 1, 7, 100])
def test_packed_integers_come_back(largest, columns):
    random = np.random.default_rng(columns)
    values = torch.from_numpy(random.integers(-largest, largest + 1, (5, columns)))
    packed = pack_integers(values)
    assert torch.equal(unpack_integers(packed, 5, columns), values.short())
    assert packed == pack_integers(values.float())


def test_a_stream_is_what_pcodec_alone_reads_row_after_row():
    values = torch.arange(-300, 300).view(2, 300)
    read = standalone.simple_decompress(pack_integers(values))
    assert read.dtype == np.int16 and read.tolist() == list(range(-300, 300))


def test_ternary_numbers_take_their_entropy():
    values = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (4, 10_000)))
    assert len(pack_integers(values)) < 1.02 * values.numel() * np.log2(3) / 8


@pytest.mark.parametrize("rows", [0, 1, 3, 1 << 24, 1 << 42])
def test_streams_of_another_length_are_refused_without_filling_the_memory(rows):
    packed = pack_integers(torch.arange(-20, 20).view(2, 20))
    with pytest.raises(UserError, match="damaged"):
        unpack_integers(packed, rows, 20)


def test_damaged_integers_are_refused():
    packed = pack_integers(torch.arange(-20, 20).view(2, 20))
    for bad in (packed[:-3], b"\x55" + packed[1:], b""):
        with pytest.raises(UserError, match="damaged"):
            unpack_integers(bad, 2, 20)


def test_no_flipped_bit_ends_in_an_error_of_the_library():
    values = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (4, 200)).round())
    packed = pack_integers(values)
    for position in range(8 * len(packed)):
        content = bytearray(packed)
        content[position // 8] ^= 1 << position % 8
        try:
            read = unpack_integers(bytes(content), 4, 200)
        except UserError:
            continue
        assert read.shape == (4, 200)
