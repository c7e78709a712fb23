"""Integers as bytes: bit streams, and columns of small integers under LZMA.

All of it is deterministic: equal values become equal bytes.
"""

import lzma
import math

import numpy as np

from utils.cli import UserError

LARGEST = (1 << 15) - 1  # of the absolute values in pack_integers
_HEADER = np.dtype("<u4")
_DICTIONARY = 1 << 24  # bytes of the LZMA dictionary that a reader provides


def pack_bits(values: np.ndarray, bits: int) -> bytes:
    """Non-negative integers [M] of `bits` bits each as one bit stream, padded to a byte."""
    shifts = np.arange(bits - 1, -1, -1)
    parts = []
    for start in range(0, len(values), 1 << 16):
        chunk = values[start : start + (1 << 16), None].astype(np.int64)
        parts.append(np.packbits((chunk >> shifts & 1).astype(np.uint8)).tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes, bits: int, count: int) -> np.ndarray:
    """int64 [count]: the inverse of pack_bits."""
    stream = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    values = np.zeros(count, dtype=np.int64)
    for column in stream.T:
        values = values << 1 | column
    return values


def _filters(size: int) -> list[dict[str, int]]:
    """LZMA2 for so many bytes: single values matter, not alignment, so no lp and pb.

    The dictionary is no larger than the data, which makes small passes fast.
    """
    dictionary = max(1 << 12, min(_DICTIONARY, 1 << (size - 1).bit_length()))
    shape = {"lc": 3, "lp": 0, "pb": 0, "nice_len": 273, "dict_size": dictionary}
    return [{"id": lzma.FILTER_LZMA2, "preset": 6, **shape}]


def _digits(largest: int) -> tuple[int, int]:
    """Base of the digits for integers in [-largest, largest], and how many share a byte."""
    base = max(2 * largest + 1, 2)
    return base, max(1, min(8, int(math.log(256.5, base))))


def _next_order(energy: np.ndarray) -> np.ndarray:
    return np.argsort(energy, kind="stable")


def _add_energy(energy: np.ndarray, column: np.ndarray) -> None:
    """Moves the running energy of the rows on by one column: a decay of 1/64, in integers."""
    energy += (np.abs(column).astype(np.int64) << 8) - (energy >> 6)


def pack_integers(values: np.ndarray) -> bytes:
    """Packs integers [N, K], |v| <= 32767, whose spread differs by column and by row, with LZMA.

    Column by column. The rows of a column are sorted by the energy of what came before (a running,
    decaying sum of absolute values, which the reader knows by then), so that small values lie
    together. Where the column's largest absolute value m allows, several values v + m share a
    byte as digits of base 2m + 1, most significant first, the last byte filled with v = 0; above
    127 a column is two planes, the upper and the lower bytes of v + m. All of it, after a header
    (uint32 N, then uint16 m for every column), is one raw LZMA2 stream.
    """
    largest = np.abs(values.astype(np.int32)).max(axis=0, initial=0)
    parts = [np.array([len(values)], _HEADER).tobytes(), largest.astype("<u2").tobytes()]
    energy = np.zeros(len(values), dtype=np.int64)
    for column, top in zip(values.T, largest.tolist(), strict=True):
        shifted = column[_next_order(energy)].astype(np.int32) + top
        if top > 127:
            parts += [(shifted >> 8).astype(np.uint8), (shifted & 255).astype(np.uint8)]
        elif top > 0:
            base, per_byte = _digits(top)
            filled = np.full(-(-len(shifted) // per_byte) * per_byte, top)
            filled[: len(shifted)] = shifted
            worth = base ** np.arange(per_byte - 1, -1, -1)
            parts.append((filled.reshape(-1, per_byte) @ worth).astype(np.uint8))
        _add_energy(energy, column)
    data = b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_filters(len(data)))


def unpack_integers(data: bytes, columns: int) -> np.ndarray:
    """int16 [N, columns]: the inverse of pack_integers; raises UserError on damage."""
    try:
        stream = lzma.decompress(data, lzma.FORMAT_RAW, filters=_filters(_DICTIONARY))
        stream = np.frombuffer(stream, np.uint8)
        rows = int(stream[:4].view(_HEADER)[0])
        offset = 4 + 2 * columns
        largest = stream[4:offset].view("<u2").tolist()
        values = np.empty((columns, rows), dtype=np.int16)
        energy = np.zeros(rows, dtype=np.int64)
        for column, top in zip(values, largest, strict=True):
            base, per_byte = _digits(top)
            length = 2 * rows if top > 127 else -(-rows // per_byte) if top else 0
            part = stream[offset : offset + length].astype(np.int32)
            offset += length
            if top > 127:
                shifted = part[:rows] << 8 | part[rows:]
            elif top:
                worth = base ** np.arange(per_byte - 1, -1, -1)
                shifted = (part[:, None] // worth % base).reshape(-1)[:rows]
            else:
                shifted = np.zeros(rows, dtype=np.int32)
            column[_next_order(energy)] = shifted - top
            _add_energy(energy, column)
        if offset != len(stream):
            raise ValueError
    except (lzma.LZMAError, ValueError, IndexError):
        raise UserError("the packed numbers of a label set are damaged") from None
    return values.T
