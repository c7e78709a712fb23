"""Files that are written whole or not at all, and read without executing anything in them."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.cli import UserError


def atomic_write(path: Path, write: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes `path` through a temporary name in its folder, fsync and rename.

    Args:
        path: the file to make or replace.
        write: its content, or a function that writes the content to an open binary file.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when everything in it has been written.

    Yields `<path>.partial`, emptied of what an interrupted attempt left, and renames it on success.

    Raises:
        UserError: `path` exists already, or the partial folder is not one of ours.
    """
    if path.exists():
        raise UserError(f"{path} exists already and is left as it is; choose another folder")
    partial = path.with_name(path.name + ".partial")
    marker = partial / ".made-by-hald"
    if partial.exists():
        if not marker.exists():
            raise UserError(f"{partial} is in the way and was not made here; move it away")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    marker.touch()
    yield partial
    marker.unlink()
    partial.rename(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_json(value: Any) -> bytes:
    """Returns `value` as indented UTF-8 JSON with a final newline: equal values, equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Returns the parsed JSON file; raises UserError when it does not parse."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from None


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_state(state: dict[str, torch.Tensor]) -> str:
    """Returns the hex SHA-256 over names, dtypes, shapes and bytes of a state dict's tensors."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_tensors(path: Path, what: str) -> Any:
    """Loads a file written by torch.save, with plain types and tensors only, onto the CPU.

    Args:
        path: the file.
        what: what it should be, for the message ("teacher weights", "checkpoint").

    Raises:
        UserError: the file is missing, damaged, or holds anything that would have to be executed.
    """
    if not path.is_file():
        state = "is a folder, not a file" if path.is_dir() else "not found"
        raise UserError(f"{what} {state}: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{what} {path} is damaged, or holds Python objects and not only tensors; nothing "
            "in it was executed (save the model's state_dict() alone)"
        ) from None
    except OSError:
        raise
    except (
        Exception
    ) as error:  # whatever the reader stumbles over in a file that is none of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what} {path} is damaged: {reason}") from None
