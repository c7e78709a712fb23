"""Files that are written whole or not at all, and read without executing anything in them."""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import socket
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from utils.cli import UserError

# First bytes of a file in lower case, without blanks before them.
_FIRST_BYTES = {
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull gets the file)",
    b"gif8": "a GIF image",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document",
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"\xff\x0a": "a JPEG XL image",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"rar!": "a RAR archive",
    b"\x93numpy": "a NumPy array",
    b"\x89hdf": "an HDF5 file",
    b"#!": "a script",
}
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
# What training scripts save beside weights. Unpickling calls none of them with side effects.
_HARMLESS = [
    argparse.Namespace,
    pathlib.PurePosixPath,
    pathlib.PosixPath,
    np.dtype,
    _NUMPY_SCALAR,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # its name before NumPy 2
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")),
]
LOCK, _TEMPORARY, _SEAL = ".lock", ".hald-temporary", "content_sha256"


def atomic_write(path: Path, write: bytes | Callable[[BinaryIO], None]) -> None:
    """Makes or replaces a file by a temporary name, fsync and rename; `write` has its content."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


class LockedError(UserError):
    """Another process has the lock of a folder."""


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing, or holds no more than killed processes of ours left in it."""
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    return all(name == LOCK or name.endswith(_TEMPORARY) for name in names)


@contextlib.contextmanager
def lock(folder: Path, doing: str) -> Iterator[None]:
    """Keeps a second process from writing to a folder, which is made if need be.

    The lock is the operating system's and ends with its process, so none is ever left behind; its
    file names host and process. Temporary files of killed processes are removed on entry, and on
    exit a folder in which nothing was made. Raises LockedError, "another process is <doing>
    <folder>", where it is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder / LOCK, f"is {doing} {folder}")
    try:
        for leftover in folder.glob(f".*{_TEMPORARY}"):
            leftover.unlink()
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _acquire(path: Path, doing: str) -> BinaryIO:
    """The locked file, which names its owner."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().decode(errors="replace").strip()
            message = f"another process ({owner}) {doing}; wait for it, or end it"
            raise LockedError(message) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(f"{path.parent}: no locks on this file system; start no second process there")
        # The last owner may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when everything in it has been written.

    Until then it lies in `<path>.partial`; what an interrupted attempt left of it is removed.
    Raises UserError where `path` exists already, or another process is making it.
    """
    if path.exists():
        raise UserError(f"{path} exists already and is left as it is; choose another folder")
    partial = path.with_name(path.name + ".partial")
    content = partial / f"content{_TEMPORARY}"
    with lock(partial, "making"):
        if content.exists():
            shutil.rmtree(content)
        content.mkdir()
        yield content
        content.rename(path)


def content_name(path: Path) -> str | None:
    """What a file is that should be something else, by its first bytes: "a web page", ..."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":
        return f"an AVIF or HEIC image, or a film ({head[8:12].decode('latin-1')})"
    if head[257:262] == b"ustar":
        return "a tar archive (tar -xf unpacks it)"
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [Path(name).name for name in archive.namelist()]
        except Exception:  # whatever zipfile stumbles over in a damaged one
            return "a damaged zip archive"
        if "constants.pkl" in names:
            return "a TorchScript program, not weights"
        return None if "data.pkl" in names else "a zip archive (unzip unpacks it)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page, perhaps of a download that wants to be confirmed"
    return next((name for start, name in _FIRST_BYTES.items() if text.startswith(start)), None)


def save_figure(figure, path: Path) -> None:
    """Writes a matplotlib Figure as PNG (`path`), 120 dots per inch, and beside it as PDF."""
    name = path.name.removesuffix(".png")
    if name.lower().endswith(".pdf"):
        raise UserError(f"{path}: name the PNG; the PDF is written beside it")
    pdf = {"format": "pdf", "metadata": {"CreationDate": None}}
    atomic_write(path.with_name(f"{name}.pdf"), lambda file: figure.savefig(file, **pdf))
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def to_json(value: Any) -> bytes:
    """Returns `value` as indented UTF-8 JSON with a final newline: equal values, equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Returns the parsed JSON file; raises UserError when it does not parse, or is no file."""
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from None


def seal(value: dict) -> bytes:
    """`to_json` of a dict with the SHA-256 of its content as a last field."""
    return to_json({**value, _SEAL: hashlib.sha256(to_json(value)).hexdigest()})


def read_sealed(path: Path) -> dict:
    """What `seal` was given; raises UserError when the file's content is not what was written."""
    value = read_json(path)
    checksum = value.pop(_SEAL, None) if isinstance(value, dict) else None
    if checksum != hashlib.sha256(to_json(value)).hexdigest():
        raise UserError(f"{path} is damaged: its content does not agree with its checksum")
    return value


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_state(state: Any) -> str:
    """Hex SHA-256 over nested dicts and lists; of tensors dtype, shape and bytes count."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous()
            digest.update(f"{array.dtype} {tuple(array.shape)}\n".encode())
            digest.update(array.flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict | list | tuple):
            kind, items = ("dict", value.items()) if isinstance(value, dict) else ("list", value)
            digest.update(f"{len(value)} in {kind}\n".encode())
            for item in items:
                add(item)
        else:
            digest.update(f"{value!r}\n".encode())

    add(state)
    return digest.hexdigest()


def torch_save(path: Path, content: Any) -> None:
    """torch.save by way of memory: it hides a full disk behind an error of its own."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def save_tensors(path: Path, state: dict) -> None:
    """Writes a dict of tensors and plain values for `load_tensors`, sealed with a checksum."""
    torch_save(path, {**state, _SEAL: sha256_state(state)})


def load_tensors(path: Path, what: str) -> Any:
    """Loads a file of tensors, plain types and `_HARMLESS` objects, executing nothing, to the CPU.

    What `save_tensors` wrote is verified; .safetensors files need the package of that name. Raises
    UserError, calling the file `what` ("teacher weights"), where it is missing, damaged, or holds
    anything that would have to be executed.
    """
    if not path.is_file():
        state = "is a folder, not a file" if path.is_dir() else "not found"
        raise UserError(f"{what} {state}: {path}")
    safetensors = path.suffix == ".safetensors"
    if not safetensors and (name := content_name(path)):
        raise UserError(f"{what} {path} is {name}; get the file itself")
    try:
        if safetensors:
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"{what} {path}: pip install safetensors reads such files") from None
    except Exception as error:  # whatever the reader stumbles over in somebody else's file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which cut-off files give
            raise
        raise UserError(f"{what} {path} {_why_unreadable(path, error)}") from None
    checksum = content.pop(_SEAL, None) if isinstance(content, dict) else None
    if checksum is not None and checksum != sha256_state(content):
        raise UserError(f"{what} {path} is damaged: its content does not agree with its checksum")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    """Completes "FILE ..." for a file that is refused by its reader."""
    try:
        blocked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no archive of torch's
        blocked = []
    if blocked or isinstance(error, pickle.UnpicklingError):
        objects = ", ".join(sorted(blocked)) or "in an old format"
        return (
            f"is damaged, or holds Python objects ({objects}) and not only tensors; nothing in it "
            "was executed (save the model's state_dict() alone, where the file comes from)"
        )
    return f"is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
