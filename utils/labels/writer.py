"""Writing a label set pass by pass, in any order and from several processes."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from utils.cli import UserError
from utils.data.views import Mixture, Views, draw
from utils.files import LOCK, atomic_write, is_unused, lock, seal, sha256_file
from utils.labels import codecs
from utils.labels import manifest as layout
from utils.labels.arrays import npz_bytes, read_npz, views_to_arrays
from utils.labels.codecs.base import Codec, labels_to_fit
from utils.labels.reader import LabelSet


def centre(logits: torch.Tensor) -> torch.Tensor:
    """Logits [N, C] minus their mean per label: the same probabilities at every temperature."""
    return logits - logits.mean(dim=1, keepdim=True)


class LabelWriter:
    """Writes a label set pass by pass; every file is written whole or not at all.

    `manifest.partial.json` holds the settings while passes are missing; `manifest.json` appears
    when all are there. The result does not depend on the order of passes or on interruptions.
    """

    def __init__(self, path: Path, settings: dict, sizes: np.ndarray, flag: str = "--label-dir"):
        """Prepares to start a label set, or to continue one; nothing is written before `begun`.

        `settings` are from `make_settings`, or a manifest, whose results are left out; `sizes`, int
        [images, 2], are heights and widths of the images; `flag` names the folder in messages.
        Raises UserError where the folder holds something else, or labels with other settings.
        """
        self.path, self.sizes = Path(path), sizes
        settings = {key: value for key, value in settings.items() if key not in layout.RESULTS}
        self.settings = {"format": layout.FORMAT, "version": layout.VERSION, **settings}
        self.spec = layout.view_spec(self.settings)
        if existing := layout.begun(self.path):
            if difference := layout.first_difference(self.settings, existing, layout.NOT_COMPARED):
                raise UserError(
                    f"{self.path} holds a label set made with other settings ({difference}); "
                    f"choose another {flag} or the same settings"
                )
            kept = (layout.NOT_COMPARED - layout.RESULTS) & existing.keys()
            self.settings |= {key: existing[key] for key in kept}
        elif not is_unused(self.path):
            raise UserError(f"{self.path} is not empty and not a label set; choose another folder")
        self.codec: Codec | None = None
        self.open_codec()

    def open_codec(self) -> None:
        """Sets `codec`, which stays None while its fitted part has yet to be fitted."""
        kind, _ = codecs.find(self.settings["codec"])
        fitted = self.path / layout.CODEC
        if not kind.fitted or fitted.exists():
            self.codec = codecs.from_manifest(self.settings, fitted)

    def passes_to_fit(self) -> int:
        """How many first passes `fit` needs; 0 where the codec is there."""
        if self.codec is not None:
            return 0
        needed = -(-labels_to_fit(self.settings["num_classes"]) // len(self.sizes))
        return min(needed, self.settings["passes"])

    def fit(
        self,
        passes: Iterable[tuple[Views, torch.Tensor]],
        hard_labels: torch.Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        """Fits the codec, on a device, to the first passes: views and float32 [images, C] logits.

        `hard_labels` int64 [images] are the images' classes.
        """
        kind, options = codecs.find(self.settings["codec"])
        count, classes, samples = len(self.sizes), self.settings["num_classes"], []
        rows = slice(labels_to_fit(classes))  # the fit takes no more
        for views, logits in passes:
            shown = views.mixture(hard_labels, self.spec.input_size).rows(rows)
            mixture = Mixture(*(part.to(device) for part in shown))
            samples.append((centre(logits[rows].to(device)), mixture))
        labels = count * self.settings["passes"]
        self.codec = kind.fit(samples, classes, labels, pass_labels=count, **options)
        atomic_write(self.path / layout.CODEC, npz_bytes(self.codec.arrays()))

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Makes the folder, keeps other processes out of it, and records the settings."""
        with lock(self.path, "writing labels to"):
            if not (self.path / layout.PARTIAL).exists():
                atomic_write(self.path / layout.PARTIAL, seal(self.settings))
            if self.settings["image_size"] is None and not (self.path / layout.SIZES).exists():
                compact = {"sizes": np.asarray(self.sizes, dtype="<u4")}
                atomic_write(self.path / layout.SIZES, npz_bytes(compact))
            yield

    def complete(self) -> bool:
        """Whether the set is finished; if so, everything in it has been verified."""
        if not (self.path / layout.MANIFEST).exists():
            return False
        LabelSet.open(self.path)
        left_by_a_kill = (self.path / layout.PARTIAL, self.path / LOCK)
        if any(path.exists() for path in left_by_a_kill):
            with lock(self.path, "writing labels to"):
                (self.path / layout.PARTIAL).unlink(missing_ok=True)
        return True

    def draw(self, pass_index: int) -> Views:
        """The views of a pass."""
        return draw(self.spec, self.sizes, self.settings["seed"] + pass_index)

    def verified(self, pass_index: int) -> bool:
        """Whether a pass has been written; raises UserError when its file is not this set's."""
        path = self.path / layout.pass_name(pass_index)
        if not path.exists():
            return False
        stored = read_npz(path)
        checksum = stored.pop("sha256", np.empty(0)).tobytes()
        if checksum != self._checksum(pass_index, stored):
            hint = "delete it and run the same command again"
            raise UserError(f"{path} is damaged, or another label set's: {hint}")
        return True

    def _checksum(self, pass_index: int, arrays: dict[str, np.ndarray]) -> bytes:
        """SHA-256 of a pass: its index, its content, and the settings and codec it was made with.

        What is not compared is left out: a set may be continued with other versions.
        """
        settings = {k: v for k, v in self.settings.items() if k not in layout.NOT_COMPARED}
        fitted = self.codec.arrays()
        digest = hashlib.sha256(seal({**settings, "pass": pass_index}))
        for name, array in [*sorted(fitted.items()), *sorted(arrays.items())]:
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
        return digest.digest()

    def write_pass(
        self,
        pass_index: int,
        logits: torch.Tensor,
        views: Views,
        hard_labels: torch.Tensor,
        teacher_correct: int | None = None,
    ) -> None:
        """Packs and writes one pass.

        `logits` float32 [images, C] are the teacher's, in the order of the views, which are stored
        only where `draw(pass_index)` does not give them again; `hard_labels` int64 [images] are the
        images' classes. Views whose main class the teacher names are counted when None.
        """
        mixture = views.mixture(hard_labels, self.spec.input_size)
        if teacher_correct is None:
            teacher_correct = int((logits.argmax(1) == mixture.main_class()).sum())
        payload = self.codec.pack(centre(logits), mixture)
        arrays = {
            "payload": np.frombuffer(payload, dtype=np.uint8),
            "views_sha256": np.frombuffer(views.checksum(), dtype=np.uint8),
            "teacher_correct": np.array(teacher_correct, dtype="<i8"),
        }
        if self.settings["seed"] is None:
            arrays |= views_to_arrays(views)
        arrays["sha256"] = np.frombuffer(self._checksum(pass_index, arrays), dtype=np.uint8)
        atomic_write(self.path / layout.pass_name(pass_index), npz_bytes(arrays))

    def finish(self) -> dict:
        """Writes the manifest once every pass is there, and returns it."""
        names = [layout.pass_name(pass_index) for pass_index in range(self.settings["passes"])]
        correct = sum(int(read_npz(self.path / name)["teacher_correct"]) for name in names)
        extra = [name for name in (layout.CODEC, layout.SIZES) if (self.path / name).exists()]
        manifest = {
            **self.settings,
            "teacher_top1": round(100 * correct / (len(self.sizes) * len(names)), 4),
            "files": {name: sha256_file(self.path / name) for name in extra + names},
        }
        atomic_write(self.path / layout.MANIFEST, seal(manifest))
        (self.path / layout.PARTIAL).unlink(missing_ok=True)
        return manifest
