"""Whole numbers as pcodec streams: equal numbers, equal bytes."""

import numpy as np

from utils.cli import UserError

DAMAGED = "the packed numbers of a label set are damaged"


def _pcodec():
    """The package pcodec, which codec klt alone needs, and its module standalone."""
    try:
        import pcodec
        from pcodec import standalone  # which pcodec 1.0 does not have as an attribute
    except ImportError:
        raise UserError("codec klt needs the package pcodec: pip install 'pcodec<2'") from None
    return pcodec, standalone


def pack_integers(values: np.ndarray) -> bytes:
    """A pcodec stream (standalone format) of int16 numbers, in the order of rows."""
    pcodec, standalone = _pcodec()
    # Neighbours have nothing in common that a difference or a common factor would show, but rows
    # differ in spread: each page has frequencies of its own, which it begins with.
    page = min(max(values.size // 12, 1 << 12), 1 << 16)
    packing = pcodec.ChunkConfig(
        compression_level=12,
        mode_spec=pcodec.ModeSpec.classic(),
        delta_spec=pcodec.DeltaSpec.no_op(),
        paging_spec=pcodec.PagingSpec.equal_pages_up_to(page),
    )
    return bytes(standalone.simple_compress(values.astype(np.int16).reshape(-1), packing))


def unpack_integers(stream: bytes, most: int) -> np.ndarray:
    """int16 [M], M at most `most`: the inverse of pack_integers; raises UserError on damage."""
    _, standalone = _pcodec()
    try:
        values = np.empty(most, dtype=np.int16)  # touched only as far as it is filled
        progress = standalone.simple_decompress_into(stream, values)
    except (RuntimeError, MemoryError, ValueError):
        raise UserError(DAMAGED) from None
    if not progress.finished:
        raise UserError(DAMAGED)
    return values[: progress.n_processed]
