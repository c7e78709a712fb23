"""The label set on disk: a manifest, and one file of soft labels per pass.

`LabelWriter` makes a set pass by pass, in any order and from several processes; `LabelSet` reads
one and refuses whatever is incomplete, damaged, of another version or made for something else.
The folder is described in the README ("A label set on disk"); views are drawn again from the
seed, see utils/data/views.py.
"""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.cli import UserError
from utils.data.datasets import Dataset
from utils.data.views import Mixture, Views, ViewSpec, draw
from utils.files import (
    LOCK,
    atomic_write,
    is_unused,
    lock,
    read_json,
    read_sealed,
    seal,
    sha256_file,
)
from utils.labels import codecs
from utils.labels.codecs.base import Codec, Codes, blocks, join

FORMAT, VERSION = "hald-labels", 1
_ROWS = 1024  # labels expanded at once where a whole pass is read
_MANIFEST, _PARTIAL = "manifest.json", "manifest.partial.json"
_SIZES, _CODEC = "sizes.npz", "codec.npz"
# Recorded, but free to differ when an interrupted set is continued.
_NOT_COMPARED = {"versions", "files", "teacher_top1"}


@dataclasses.dataclass
class LabelBatch:
    """One stored batch: its views and the teacher's labels for them.

    Attributes:
        views: the batch's views.
        logits: float32 [B, C], centred per label.
    """

    views: Views
    logits: torch.Tensor


def pass_name(number: int) -> str:
    """File name of a pass."""
    return f"pass_{number:04d}.npz"


def view_spec(manifest: dict) -> ViewSpec:
    """What the views of a manifest's label set are drawn from."""
    return ViewSpec(
        manifest["input_size"],
        manifest["batch_size"],
        manifest["crop_scale"][0],
        manifest["crop_scale"][1],
        tuple(manifest["crop_ratio"]),
        manifest["mix"],
    )


def centre(logits: torch.Tensor) -> torch.Tensor:
    """Logits [N, C] minus their mean per label: the same probabilities at every temperature."""
    return logits - logits.mean(dim=1, keepdim=True)


def first_difference(expected: dict, found: dict, skip: frozenset | set = frozenset()) -> str:
    """ "field: expected X, found Y" of the first field in which two manifests differ, or ""."""
    for key in [*expected, *(key for key in found if key not in expected)]:
        if key not in skip and expected.get(key) != found.get(key):
            return f"{key}: expected {_short(expected.get(key))}, found {_short(found.get(key))}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """An uncompressed .npz archive: equal arrays, equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _read_npz(path: Path) -> dict[str, np.ndarray]:
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


def _views_to_arrays(views: Views) -> dict[str, np.ndarray]:
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


def _views_from_arrays(stored: dict[str, np.ndarray], batch_size: int) -> Views:
    """The views that _views_to_arrays stored."""

    def tensor(name: str, kind: type) -> torch.Tensor | None:
        return torch.from_numpy(stored[name].astype(kind)) if name in stored else None

    index = tensor("index", np.int64)
    flip = np.unpackbits(stored["flip"], count=len(index)).astype(bool)
    return Views(
        index,
        tensor("box", np.int32),
        torch.from_numpy(flip),
        batch_size,
        tensor("mix_index", np.int64),
        tensor("mix_box", np.int32),
        tensor("mix_lam", np.float32),
    )


class LabelWriter:
    """Writes a label set pass by pass; every file is written whole or not at all.

    `manifest.partial.json` holds the settings while passes are missing; `manifest.json` appears
    when all are there. The result does not depend on the order of passes or on interruptions.
    """

    def __init__(self, path: Path, settings: dict, sizes: np.ndarray, flag: str = "--label-dir"):
        """Prepares to start a label set, or to continue one with the same settings.

        Args:
            path: its folder; nothing is written before `begin`.
            settings: the manifest without per-pass results.
            sizes: int [images, 2], height and width of every image.
            flag: the flag that names the folder, for messages.

        Raises:
            UserError: the folder holds something else, or a label set with other settings.
        """
        self.path = Path(path)
        self.settings = {"format": FORMAT, "version": VERSION, **settings}
        self.spec = view_spec(self.settings)
        self.sizes = sizes
        existing = self._existing_settings()
        if existing is not None:
            if difference := first_difference(self.settings, existing, _NOT_COMPARED):
                raise UserError(
                    f"{self.path} holds a label set made with other settings ({difference}); "
                    f"choose another {flag} or the same settings"
                )
            self.settings["versions"] = existing["versions"]
        elif not is_unused(self.path):
            raise UserError(f"{self.path} is not empty and not a label set; choose another folder")
        self.codec: Codec | None = None
        self.open_codec()

    def open_codec(self) -> None:
        """Sets `codec`, which stays None while its fitted part has yet to be fitted."""
        parameters, fitted = self.settings["codec"], {}
        if codecs.needs_fit(parameters):
            if not (self.path / _CODEC).exists():
                return
            fitted = _read_npz(self.path / _CODEC)
        self.codec = codecs.from_manifest(parameters, self.settings["num_classes"], fitted)

    def fit(self, chunks: Iterable[tuple[torch.Tensor, Mixture]]) -> None:
        """Fits the codec, where that is needed, and records its fitted part.

        Args:
            chunks: logits float32 [n, C] and mixtures from the first pass on; read as far as
                needed.
        """
        if self.codec is None:
            count = self.settings["images"]["count"]
            self.codec = codecs.fit(
                self.settings["codec"],
                ((centre(logits), mixture) for logits, mixture in chunks),
                self.settings["num_classes"],
                labels=count * self.settings["passes"],
                pass_labels=count,
            )
            atomic_write(self.path / _CODEC, _npz_bytes(self.codec.arrays()))

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Makes the folder, keeps other processes out of it, and records the settings."""
        with lock(self.path, "writing labels to"):
            if not (self.path / _PARTIAL).exists():
                atomic_write(self.path / _PARTIAL, seal(self.settings))
            if self.settings["image_size"] is None and not (self.path / _SIZES).exists():
                compact = {"sizes": np.asarray(self.sizes, dtype="<u4")}
                atomic_write(self.path / _SIZES, _npz_bytes(compact))
            yield

    def _existing_settings(self) -> dict | None:
        for name in (_MANIFEST, _PARTIAL):
            if (self.path / name).exists():
                return _read_manifest(self.path / name)
        return None

    def complete(self) -> bool:
        """Whether the set is finished; if so, everything in it has been verified."""
        if not (self.path / _MANIFEST).exists():
            return False
        LabelSet.open(self.path)
        if any((self.path / name).exists() for name in (_PARTIAL, LOCK)):  # a kill at the very end
            with lock(self.path, "writing labels to"):
                (self.path / _PARTIAL).unlink(missing_ok=True)
        return True

    def draw(self, number: int) -> Views:
        """The views of a pass."""
        return draw(self.spec, self.sizes, self.settings["seed"] + number)

    def verified(self, number: int) -> bool:
        """Whether a pass has been written; raises UserError when its file is not this set's."""
        path = self.path / pass_name(number)
        if not path.exists():
            return False
        stored = _read_npz(path)
        checksum = stored.pop("sha256", np.empty(0)).tobytes()
        if checksum != self._checksum(number, stored):
            raise UserError(
                f"{path} is damaged, or another label set's: delete it and run the same command "
                "again"
            )
        return True

    def _checksum(self, number: int, arrays: dict[str, np.ndarray]) -> bytes:
        """SHA-256 of a pass: its number, its content, and the settings and codec it was made with.

        Versions are left out: a set may be continued with others.
        """
        settings = {k: v for k, v in self.settings.items() if k not in _NOT_COMPARED}
        fitted = self.codec.arrays()
        digest = hashlib.sha256(seal({**settings, "pass": number}))
        for name, array in [*sorted(fitted.items()), *sorted(arrays.items())]:
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
        return digest.digest()

    def write_pass(
        self,
        number: int,
        logits: torch.Tensor | Iterable[torch.Tensor],
        views: Views,
        hard_labels: torch.Tensor,
        teacher_correct: int | None = None,
    ) -> None:
        """Packs and writes one pass.

        Args:
            number: the pass.
            logits: float32 [images, C], the teacher's logits, at once or as a stream of chunks.
            views: the same views; stored only where `draw(number)` does not give them again.
            hard_labels: int64 [images], the class of every image.
            teacher_correct: views whose mainly shown class the teacher names; counted when None.
        """
        mixture = views.mixture(hard_labels, self.spec.input_size)
        mainly = mixture.main_class()
        checksum = views.checksum()
        drawn_again = self.settings["seed"] is not None
        codes, correct = [], 0
        for rows, block in blocks([logits] if isinstance(logits, torch.Tensor) else logits):
            correct += int((block.argmax(1) == mainly[rows]).sum())
            codes.append(self.codec.encode(centre(block), mixture.rows(rows)))
        payload = np.frombuffer(self.codec.pack_codes(join(codes)), dtype=np.uint8)
        if teacher_correct is None:
            teacher_correct = correct
        arrays = {
            "payload": payload,
            "views_sha256": np.frombuffer(checksum, dtype=np.uint8),
            "teacher_correct": np.array(teacher_correct, dtype="<i8"),
            **({} if drawn_again else _views_to_arrays(views)),
        }
        arrays["sha256"] = np.frombuffer(self._checksum(number, arrays), dtype=np.uint8)
        atomic_write(self.path / pass_name(number), _npz_bytes(arrays))

    def finish(self) -> dict:
        """Writes the manifest once every pass is there, and returns it."""
        names = [pass_name(number) for number in range(self.settings["passes"])]
        correct = sum(int(_read_npz(self.path / name)["teacher_correct"]) for name in names)
        extra = [name for name in (_CODEC, _SIZES) if (self.path / name).exists()]
        labels = self.settings["images"]["count"] * self.settings["passes"]
        manifest = {
            **self.settings,
            "teacher_top1": round(100 * correct / labels, 4),
            "files": {name: sha256_file(self.path / name) for name in extra + names},
        }
        atomic_write(self.path / _MANIFEST, seal(manifest))
        (self.path / _PARTIAL).unlink(missing_ok=True)
        return manifest


class LabelSet:
    """A finished label set, opened for reading: `labels[i]` is stored batch i.

    Batches are numbered pass by pass: batch i is batch i % batches_per_pass of pass
    i // batches_per_pass. Codes are loaded pass by pass when first used and then kept.
    """

    def __init__(self, path: Path, manifest: dict, sizes: np.ndarray, codec: Codec):
        self.path, self.manifest, self.sizes, self.codec = path, manifest, sizes, codec
        self.spec = view_spec(manifest)
        self.device = torch.device("cpu")
        self.passes = manifest["passes"]
        self.batches_per_pass = -(-manifest["images"]["count"] // manifest["batch_size"])
        self.hard_labels = torch.repeat_interleave(
            torch.arange(manifest["num_classes"]), torch.tensor(manifest["images"]["per_class"])
        )
        self._loaded: dict[int, tuple[Views, Codes]] = {}

    @classmethod
    def open(cls, path: Path) -> "LabelSet":
        """Opens a label set after verifying its version and the checksum of every file.

        Raises:
            UserError: no label set there, or an incomplete, damaged or newer one.
        """
        path = Path(path)
        if not (path / _MANIFEST).exists():
            raise UserError(_why_not_complete(path))
        manifest = _read_manifest(path / _MANIFEST)
        expected = {pass_name(number) for number in range(manifest["passes"])}
        if missing := sorted(expected - set(manifest["files"])):
            raise UserError(f"{path / _MANIFEST} is damaged: it does not list {missing[0]}")
        for name, checksum in manifest["files"].items():
            if not (path / name).is_file():
                raise UserError(f"{path / name} is missing from the label set")
            if sha256_file(path / name) != checksum:
                raise UserError(f"{path / name} is damaged: its checksum is not the manifest's")
        if unknown := sorted({file.name for file in path.glob("pass_*")} - expected):
            raise UserError(f"{path / unknown[0]} does not belong to this label set; move it away")
        if manifest["image_size"] is None:
            sizes = _read_npz(path / _SIZES)["sizes"].astype(np.int32)
        else:
            sizes = np.tile(np.array(manifest["image_size"]), (manifest["images"]["count"], 1))
        fitted = _read_npz(path / _CODEC) if (path / _CODEC).exists() else {}
        codec = codecs.from_manifest(manifest["codec"], manifest["num_classes"], fitted)
        return cls(path, manifest, sizes, codec)

    def __len__(self) -> int:
        """Number of stored batches: passes x batches per pass."""
        return self.passes * self.batches_per_pass

    def __getitem__(self, batch: int) -> LabelBatch:
        """Stored batch `batch`, its logits expanded, on the set's device."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        number, place = divmod(batch, self.batches_per_pass)
        views, codes = self._pass(number)
        chosen = views[place]
        start = place * views.batch_size
        rows = tuple(code[start : start + len(chosen.index)] for code in codes)
        return LabelBatch(chosen, self.codec.expand(rows, self.mixture(chosen)))

    def views(self, batch: int) -> Views:
        """The views of stored batch `batch`, on the set's device."""
        number, place = divmod(batch, self.batches_per_pass)
        return self._pass(number)[0][place]

    def mixture(self, views: Views) -> Mixture:
        """The hard labels in these views."""
        return views.mixture(self.hard_labels, self.spec.input_size)

    def expanded(self, views: Views, codes: Codes) -> Iterator[tuple[torch.Tensor, Mixture]]:
        """A pass (see `load_pass`) as float32 [n, C] logits and their mixtures, in chunks."""
        mixture = self.mixture(views)
        for start in range(0, len(views.index), _ROWS):
            rows = slice(start, start + _ROWS)
            known = mixture.rows(rows)
            yield self.codec.expand(tuple(code[rows] for code in codes), known), known

    def passes_for(self, slc: int) -> int:
        """How many passes hold `slc` labels per class; raises UserError when none do."""
        ipc, stored = self.manifest["ipc"], self.manifest["slc"]
        if ipc is None:
            raise UserError(f"{self.path} was made with --passes: it has no labels per class")
        if slc % ipc or slc > stored:
            raise UserError(
                f"--slc {slc}: {self.path} holds {stored} soft labels per class, {ipc} images "
                f"each; use a multiple of {ipc} up to {stored}"
            )
        return slc // ipc

    def to(self, device: torch.device) -> "LabelSet":
        """Moves views, codes and hard labels to a device, where they stay."""
        self.device = device
        self.hard_labels = self.hard_labels.to(device)
        self._loaded.clear()
        return self

    def bytes_on_disk(self, passes: int | None = None) -> int:
        """Bytes of the manifest, the fitted codec and so many passes (None: all)."""
        names = [pass_name(number) for number in range(passes or self.passes)]
        extra = [name for name in (_CODEC, _SIZES) if name in self.manifest["files"]]
        return sum((self.path / name).stat().st_size for name in [_MANIFEST, *extra, *names])

    def check(self, dataset: Dataset, classes: Sequence[str], images: str) -> None:
        """Raises UserError, naming the field, unless the labels were made for exactly this.

        Args:
            dataset: its facts, the number of classes counted.
            classes: class names in order.
            images: fingerprint of the image folder.
        """
        manifest = self.manifest
        found = {
            "dataset": manifest["dataset"],
            "number of classes": manifest["num_classes"],
            "input size": manifest["input_size"],
            "mean": manifest["mean"],
            "std": manifest["std"],
            "class list": manifest["classes"],
            "images (SHA-256 over names and contents)": manifest["images"]["sha256"],
        }
        facts = (dataset.name, dataset.num_classes, dataset.input_size)
        given = (*facts, list(dataset.mean), list(dataset.std), list(classes), images)
        expected = dict(zip(found, given, strict=True))
        if difference := first_difference(expected, found):
            raise UserError(f"the labels in {self.path} were made for something else: {difference}")

    def _pass(self, number: int) -> tuple[Views, Codes]:
        if number not in self._loaded:
            views, codes = self.load_pass(number)
            self._loaded[number] = (
                views.to(self.device),
                tuple(code.to(self.device) for code in codes),
            )
        return self._loaded[number]

    def teacher_correct(self, number: int) -> int:
        """Views of a pass whose mainly shown class the teacher named."""
        return int(_read_npz(self.path / pass_name(number))["teacher_correct"])

    def load_pass(self, number: int) -> tuple[Views, Codes]:
        """Views and codes of one pass, read from disk, the views drawn again and verified."""
        path = self.path / pass_name(number)
        stored = _read_npz(path)
        if self.manifest["seed"] is None:
            views = _views_from_arrays(stored, self.spec.batch_size)
        else:
            views = draw(self.spec, self.sizes, self.manifest["seed"] + number)
        if views.checksum() != stored["views_sha256"].tobytes():
            raise UserError(
                f"{path}: the views are not those that were labelled; the set was made by an "
                "incompatible version"
            )
        return views, self.codec.unpack(stored["payload"].tobytes())


def _read_manifest(path: Path) -> dict:
    """A manifest, whole or partial, verified; raises UserError."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a label set")
    if raw.get("version") != VERSION:
        raise UserError(
            f"{path.parent} has label format version {raw.get('version')}; this code reads "
            f"version {VERSION}"
        )
    return read_sealed(path)


def _why_not_complete(path: Path) -> str:
    """What is wrong with a folder that has no manifest."""
    if not path.is_dir():
        return f"label folder not found: {path}"
    if (path / _PARTIAL).exists():
        passes = _read_manifest(path / _PARTIAL)["passes"]
        done = sum((path / pass_name(number)).exists() for number in range(passes))
        return (
            f"the label set {path} is incomplete: {done} of {passes} passes; run the "
            "relabel/generate.py command that started it again"
        )
    return f"{path} holds no label set (no {_MANIFEST})"
