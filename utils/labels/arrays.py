"""Arrays as .npz archives of equal bytes, and views as arrays."""

import io
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError
from utils.data.views import Views

_KINDS = {
    **{"index": np.int64, "box": np.int32, "flip": bool},
    **{"mix_index": np.int64, "mix_box": np.int32, "mix_lam": np.float32},
}


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """An uncompressed .npz archive: equal arrays, equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive of a label set; raises UserError when it is damaged."""
    data = io.BytesIO(path.read_bytes())
    try:
        with np.load(data, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever the reader stumbles over in a damaged archive
        raise UserError(f"{path} is damaged: {error}") from None


def views_to_arrays(views: Views) -> dict[str, np.ndarray]:
    """Views that cannot be drawn again, in at most 10 bytes each at 224 pixels."""
    arrays = {}
    for name in _KINDS:
        if (value := getattr(views, name)) is None:
            continue
        array = value.numpy()
        if array.dtype == bool:
            arrays[name] = np.packbits(array)
        elif array.dtype.kind == "i":  # not negative: the narrowest unsigned type
            kind = np.min_scalar_type(int(array.max(initial=0)))
            arrays[name] = array.astype(kind.newbyteorder("<"))
        else:
            arrays[name] = array.astype("<f4")
    return arrays


def views_from_arrays(stored: dict[str, np.ndarray], batch_size: int) -> Views:
    """The views that views_to_arrays stored."""
    flip = np.unpackbits(stored["flip"], count=len(stored["index"]))
    arrays = {name: array for name, array in {**stored, "flip": flip}.items() if name in _KINDS}
    tensors = {name: torch.from_numpy(array.astype(_KINDS[name])) for name, array in arrays.items()}
    return Views(batch_size=batch_size, **tensors)
