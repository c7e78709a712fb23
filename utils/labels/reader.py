"""Reading a finished label set; what is incomplete, damaged or of another version is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.cli import UserError
from utils.data.datasets import Dataset
from utils.data.views import Mixture, Views, draw
from utils.files import sha256_file
from utils.labels import codecs
from utils.labels import manifest as layout
from utils.labels.arrays import read_npz, views_from_arrays
from utils.labels.codecs.base import Codes
from utils.runtime import send

_ROWS = 1024  # labels expanded at once where a whole pass is read, as codecs need room meanwhile


class LabelBatch(NamedTuple):
    """Views, and the teacher's labels for them: float32 [B, C] logits, centred per label."""

    views: Views
    logits: torch.Tensor


class LabelSet:
    """A finished label set, opened for reading: `labels[i]` is stored batch i.

    Batches are numbered pass by pass: batch i is batch i % batches_per_pass of pass
    i // batches_per_pass. Codes are loaded pass by pass when first used and then kept.
    """

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest = path, manifest
        self.spec = layout.view_spec(manifest)
        self.codec = codecs.from_manifest(manifest, path / layout.CODEC)
        self.device = torch.device("cpu")
        self.passes, images = manifest["passes"], manifest["images"]
        self.batches_per_pass = -(-images["count"] // manifest["batch_size"])
        hard_labels = np.repeat(np.arange(manifest["num_classes"]), images["per_class"])
        self.hard_labels = torch.from_numpy(hard_labels)
        if manifest["image_size"] is None:
            self.sizes = read_npz(path / layout.SIZES)["sizes"].astype(np.int32)
        else:
            self.sizes = np.tile(np.array(manifest["image_size"]), (images["count"], 1))
        self._loaded: dict[int, tuple[Views, Codes]] = {}

    @classmethod
    def open(cls, path: Path) -> "LabelSet":
        """Opens a label set after verifying its version and the checksum of every file.

        Raises UserError where there is none, or an incomplete, damaged or newer one.
        """
        path = Path(path)
        manifest = layout.finished(path)
        files = manifest.get("files", {})
        passes = {*map(layout.pass_name, range(manifest["passes"]))}
        if missing := sorted(passes - files.keys()):
            raise UserError(f"{path / layout.MANIFEST} is damaged: it does not list {missing[0]}")
        for name, checksum in files.items():
            if not (path / name).is_file():
                raise UserError(f"{path / name} is missing from the label set")
            if sha256_file(path / name) != checksum:
                raise UserError(f"{path / name} is damaged: its checksum is not the manifest's")
        if unknown := sorted({file.name for file in path.glob("pass_*")} - passes):
            raise UserError(f"{path / unknown[0]} does not belong to this label set; move it away")
        return cls(path, manifest)

    def __len__(self) -> int:
        """Number of stored batches: passes x batches per pass."""
        return self.passes * self.batches_per_pass

    def __getitem__(self, batch: int) -> LabelBatch:
        """Stored batch `batch`, its logits expanded, on the set's device."""
        views = self.views(batch)
        return LabelBatch(views, self.logits([batch], self.mixture(views)))

    def views(self, batch: int) -> Views:
        """The views of stored batch `batch`, on the set's device; IndexError past the last."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        pass_index, position = divmod(batch, self.batches_per_pass)
        return self._pass(pass_index)[0][position]

    def logits(self, batches: Sequence[int], mixture: Mixture) -> torch.Tensor:
        """float32 [views, C]: the logits of stored batches, given the hard labels in their views.

        Expanding many batches at once spares a GPU the launches of small kernels.
        """
        parts, size = [], self.spec.batch_size
        for batch in batches:
            pass_index, position = divmod(batch, self.batches_per_pass)
            rows = slice(position * size, (position + 1) * size)
            parts.append([code[rows] for code in self._pass(pass_index)[1]])
        codes = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        return self.codec.expand(codes, mixture)

    def mixture(self, views: Views) -> Mixture:
        """The hard labels in these views."""
        return views.mixture(self.hard_labels, self.spec.input_size)

    def image_logits(self, passes: int) -> torch.Tensor:
        """float32 [images, C]: the mean of each image's logits over the first passes."""
        total = torch.zeros(len(self.sizes), self.manifest["num_classes"], device=self.device)
        for batch in range(passes * self.batches_per_pass):
            views, logits = self[batch]
            total.index_add_(0, views.index, logits)
        return total / passes

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
        names = [layout.pass_name(pass_index) for pass_index in range(passes or self.passes)]
        paths = [self.path / name for name in (layout.MANIFEST, layout.CODEC, layout.SIZES, *names)]
        return sum(path.stat().st_size for path in paths if path.exists())

    def budgeted_bytes(self) -> int:
        """Bytes of the packed labels and the fitted codec, which --bytes-per-label counts."""
        packed = sum(len(self._stored(index)["payload"]) for index in range(self.passes))
        return packed + self.codec.fitted_bytes()

    def check(self, dataset: Dataset, classes: Sequence[str], images: str) -> None:
        """Raises UserError, naming the field, unless the labels were made for exactly this.

        `classes` are class names in order; `images` is the fingerprint of the image folder.
        """
        expected = {
            "dataset": dataset.name,
            "num_classes": dataset.num_classes,
            "input_size": dataset.input_size,
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "classes": list(classes),
        }
        stored = {field: self.manifest[field] for field in expected}
        if difference := layout.first_difference(expected, stored):
            inferred = difference.startswith(("mean", "std"))
            hint = " (left out, it is that of the labels)" if inferred else ""
            raise UserError(
                f"the labels in {self.path} were made for something else: {difference}{hint}"
            )
        if images != self.manifest["images"]["sha256"]:
            raise UserError(
                f"the labels in {self.path} are those of {len(self.sizes)} other images: names or "
                "contents of files differ from the ones that were labelled"
            )

    def teacher_correct(self, pass_index: int) -> int:
        """Views of a pass whose main class the teacher named."""
        return int(self._stored(pass_index)["teacher_correct"])

    def load_pass(self, pass_index: int) -> tuple[Views, Codes]:
        """Views and codes of one pass, read from disk, the views drawn again and verified."""
        path, stored = self.path / layout.pass_name(pass_index), self._stored(pass_index)
        if self.manifest["seed"] is None:
            views = views_from_arrays(stored, self.spec.batch_size)
        else:
            views = draw(self.spec, self.sizes, self.manifest["seed"] + pass_index)
        if views.checksum() != stored["views_sha256"].tobytes():
            raise UserError(f"{path} was made by an incompatible version: its views are others")
        codes, count = self.codec.unpack(stored["payload"].tobytes()), len(views.index)
        if len(codes[0]) != count:
            raise UserError(f"{path} is damaged: {len(codes[0])} labels of {count} views")
        return views, codes

    def whole_pass(self, pass_index: int) -> LabelBatch:
        """All views of a pass, read from disk, and their float32 [images, C] logits; CPU."""
        views, codes = self.load_pass(pass_index)
        mixture, parts = self.mixture(views), []
        for start in range(0, len(views.index), _ROWS):
            rows = slice(start, start + _ROWS)
            parts.append(self.codec.expand(tuple(code[rows] for code in codes), mixture.rows(rows)))
        return LabelBatch(views, torch.cat(parts))

    def _stored(self, pass_index: int) -> dict[str, np.ndarray]:
        return read_npz(self.path / layout.pass_name(pass_index))

    def _pass(self, pass_index: int) -> tuple[Views, Codes]:
        if pass_index not in self._loaded:
            views, codes = self.load_pass(pass_index)
            moved = tuple(send(code, self.device) for code in codes)
            self._loaded[pass_index] = views.to(self.device), moved
        return self._loaded[pass_index]
