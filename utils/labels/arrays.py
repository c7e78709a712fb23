"""Arrays as .npz archives of equal bytes, and views as arrays."""

import io
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError
from utils.data.views import Views


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """An uncompressed .npz archive: equal arrays, equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive of a label set; raises UserError when it is missing or damaged."""
    try:
        data = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing from the label set") from None
    try:
        with np.load(data, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever the reader stumbles over in a damaged archive
        raise UserError(f"{path} is damaged: {error}") from None


def _smallest_unsigned(values: torch.Tensor) -> np.ndarray:
    """The same non-negative integers in the narrowest little-endian unsigned type."""
    array = values.numpy()
    kind = np.min_scalar_type(int(array.max(initial=0)))
    return array.astype(kind.newbyteorder("<"))


def views_to_arrays(views: Views) -> dict[str, np.ndarray]:
    """Views that cannot be drawn again, in at most 10 bytes each at 224 pixels."""
    arrays = {
        "index": _smallest_unsigned(views.index),
        "box": _smallest_unsigned(views.box),
        "flip": np.packbits(views.flip.numpy()),
    }
    if views.mix_index is not None:
        arrays["mix_index"] = _smallest_unsigned(views.mix_index)
    if views.mix_box is not None:
        arrays["mix_box"] = _smallest_unsigned(views.mix_box)
    if views.mix_lam is not None:
        arrays["mix_lam"] = views.mix_lam.numpy().astype("<f4")
    return arrays


def views_from_arrays(stored: dict[str, np.ndarray], batch_size: int) -> Views:
    """The views that views_to_arrays stored."""

    def tensor(name: str, kind: type) -> torch.Tensor | None:
        return torch.from_numpy(stored[name].astype(kind)) if name in stored else None

    index = tensor("index", np.int64)
    flip = np.unpackbits(stored["flip"], count=len(index)).astype(bool)
    return Views(
        index=index,
        box=tensor("box", np.int32),
        flip=torch.from_numpy(flip),
        batch_size=batch_size,
        mix_index=tensor("mix_index", np.int64),
        mix_box=tensor("mix_box", np.int32),
        mix_lam=tensor("mix_lam", np.float32),
    )
