"""Whole numbers as bytes: all ranges back and forth, damage; trellis paths against all paths."""

import itertools

import numpy as np
import pcodec
import pytest
import torch
from pcodec import standalone

from utils.cli import UserError
from utils.labels.codecs.packing import pack_integers, unpack_integers
from utils.labels.codecs.trellis import pack_numbers, quantise, unpack_numbers


@pytest.mark.parametrize("largest", [0, 1, 2, 127, 128, 32767])
@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_packed_integers_come_back(largest, count):
    random = np.random.default_rng(count)
    values = random.integers(-largest, largest + 1, count)
    packed = pack_integers(values)
    for most in (count, count + 3):
        assert np.array_equal(unpack_integers(packed, most), values)
    assert packed == pack_integers(values.astype(np.float32))


def test_a_stream_is_what_pcodec_alone_reads_row_after_row():
    values = np.arange(-300, 300).reshape(2, 300)
    read = standalone.simple_decompress(pack_integers(values))
    assert read.dtype == np.int16 and read.tolist() == list(range(-300, 300))


def test_pcodec_1_0_has_its_functions_in_a_module_that_is_no_attribute(monkeypatch):
    monkeypatch.delattr(pcodec, "standalone")
    values = np.arange(12).reshape(3, 4)
    assert unpack_integers(pack_integers(values), 12).tolist() == [*range(12)]


def test_ternary_numbers_take_their_entropy():
    values = np.random.default_rng(0).integers(-1, 2, (4, 100_000))
    assert len(pack_integers(values)) < 1.01 * values.size * np.log2(3) / 8


def test_rows_of_different_spread_take_little_more_than_the_entropy_of_each():
    spread = np.geomspace(100, 0.3, 60)[:, None]
    values = np.rint(spread * np.random.default_rng(0).normal(size=(60, 2000)))
    bits = 0.0
    for row in values:
        counts = np.unique(row, return_counts=True)[1]
        bits += (counts * np.log2(2000 / counts)).sum()
    assert len(pack_integers(values)) < 1.04 * bits / 8


def paths(length: int) -> list[list[int]]:
    """All paths of numbers up to 7 through the trellis, as its docstring has them."""
    found = []
    for index in itertools.product(range(-4, 5), repeat=length):
        second, path = [], []
        for k, i in enumerate(index):
            q = second[k - 1] if k > 0 else 0
            q ^= second[k - 3] if k > 2 else 0
            q ^= index[k - 2] & 1 if k > 1 else 0
            second.append(q)
            path.append(2 * i - int(np.sign(i)) * q)
        found.append(path)
    return found


def test_quantisation_finds_the_cheapest_of_all_paths():
    numbers = np.array(paths(5))
    values = np.random.default_rng(1).normal(0, 2, (60, 5)).clip(-5, 5).astype(np.float32)
    second = np.zeros(numbers.shape, dtype=int)
    odd = (np.abs(numbers) + 1) // 2 & 1
    second[:, 2] = odd[:, 0]
    second[:, 3] = second[:, 2] ^ odd[:, 1]
    second[:, 4] = second[:, 3] ^ odd[:, 2]
    rare = 0.7 * ((second == 1) & (numbers == 0)).sum(1)
    chosen = quantise(torch.from_numpy(values).T.contiguous()).T.numpy()
    for value, path in zip(values, chosen, strict=True):
        costs = np.square(value - numbers).sum(1) + rare
        own = np.flatnonzero((numbers == path).all(1))
        assert costs[own] == pytest.approx(costs.min(), abs=1e-4)


def test_paths_come_nearer_than_rounding_at_the_same_bits():
    values = 50 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    error = (values - quantise(values)).square().mean()
    assert error < 0.87 * 4 / 12  # that of rounding to even numbers


@pytest.mark.parametrize("components", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("labels", [0, 1, 300])
def test_packed_paths_come_back(components, labels):
    random = torch.Generator().manual_seed(labels)
    spread = torch.linspace(9000, 0.1, components)[:, None]
    values = spread * torch.randn(components, labels, generator=random)
    values[::3] = 0  # which a path may leave for 1
    numbers = quantise(values.clamp(-32_000, 32_000)).numpy()
    packed = pack_numbers(numbers)
    assert np.array_equal(unpack_numbers(packed, components, labels), numbers)


@pytest.mark.parametrize("labels", [0, 1, 3, 1 << 24, 1 << 42])
def test_streams_of_another_length_are_refused_without_filling_the_memory(labels):
    packed = pack_numbers(quantise(torch.arange(-20.0, 20).view(20, 2)).numpy())
    with pytest.raises(UserError, match="damaged"):
        unpack_numbers(packed, 20, labels)


def test_damaged_numbers_are_refused_and_no_flipped_bit_ends_in_an_error_of_the_library():
    values = 3 * torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    packed = pack_numbers(quantise(values).numpy())
    for bad in (packed[:-3], packed[:3], packed[:5] + b"\x55" + packed[6:], b""):
        with pytest.raises(UserError, match="damaged"):
            unpack_numbers(bad, 20, 40)
    for position in range(8 * len(packed)):
        content = bytearray(packed)
        content[position // 8] ^= 1 << position % 8
        try:
            read = unpack_numbers(bytes(content), 20, 40)
        except UserError:
            continue
        assert read.shape == (20, 40)
