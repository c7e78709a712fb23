"""The manifest of a label set: how it is made, read and compared, and the names of its files."""

from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError
from utils.data.datasets import Dataset
from utils.data.folders import ImageFolder
from utils.data.views import ViewSpec
from utils.files import read_json, read_sealed
from utils.runtime import versions

FORMAT, VERSION = "hald-labels", 2
MANIFEST, PARTIAL = "manifest.json", "manifest.partial.json"
SIZES, CODEC = "sizes.npz", "codec.npz"
# What is known only when all passes are there; everything else is a label set's settings.
RESULTS = {"teacher_top1", "files"}
# Recorded, but free to differ when an interrupted set is continued.
NOT_COMPARED = {"versions", "small_crops_top1", *RESULTS}


def pass_name(pass_index: int) -> str:
    """File name of a pass."""
    return f"pass_{pass_index:04d}.npz"


def make_settings(
    *,
    dataset: Dataset,
    folder: ImageFolder,
    sizes: np.ndarray,
    images_sha256: str,
    ipc: int | None,
    passes: int,
    spec: ViewSpec,
    seed: int | None,
    origin: dict[str, Any],
    codec: dict[str, Any],
) -> dict[str, Any]:
    """A manifest without results, for a `LabelWriter`.

    `sizes`, int [images, 2], are heights and widths of the images in pixels; `ipc` is None where
    labels are not counted by class, and `seed` where views are stored. `origin` says where the
    labels come from, "teachers" first.
    """
    return {
        "dataset": dataset.name,
        "num_classes": dataset.num_classes,
        "classes": folder.classes,
        "ipc": ipc,
        "slc": None if ipc is None else ipc * passes,
        "passes": passes,
        "batch_size": spec.batch_size,
        "image_size": sizes[0].tolist() if (sizes == sizes[0]).all() else None,
        "input_size": spec.input_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "seed": seed,
        "crop_scale": [spec.min_scale, spec.max_scale],
        "crop_ratio": list(spec.ratio),
        "mix": spec.mix,
        **origin,
        "codec": codec,
        "images": {
            "count": len(sizes),
            "per_class": ipc or folder.counts(),
            "sha256": images_sha256,
        },
        "versions": versions(),
    }


def view_spec(manifest: dict) -> ViewSpec:
    """What the views of a manifest's label set are drawn from."""
    size, ratio = manifest["input_size"], tuple(manifest["crop_ratio"])
    return ViewSpec(size, manifest["batch_size"], *manifest["crop_scale"], ratio, manifest["mix"])


def read_manifest(path: Path) -> dict:
    """A manifest, whole or partial, verified; raises UserError."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a label set")
    if (found := raw.get("version")) != VERSION:
        made_by = {"recoded_from": "compress", "imported": "convert"}
        script = next((made_by[field] for field in made_by if field in raw), "generate")
        raise UserError(
            f"{path.parent} has label format version {found}; this code reads version {VERSION}: "
            f"make the set again, in another folder, with relabel/{script}.py"
        )
    return read_sealed(path)


def begun(folder: Path) -> dict | None:
    """The manifest of a label set, whole or partial, or None; raises UserError."""
    paths = [path for name in (MANIFEST, PARTIAL) if (path := folder / name).exists()]
    return read_manifest(paths[0]) if paths else None


def finished(folder: Path) -> dict:
    """The manifest of a finished label set; raises UserError, saying what there is instead."""
    if not folder.is_dir():
        raise UserError(f"label folder not found: {folder}")
    if (manifest := begun(folder)) is None:
        raise UserError(f"{folder} holds no label set (no {MANIFEST})")
    if not (folder / MANIFEST).exists():
        names = map(pass_name, range(manifest["passes"]))
        done = sum((folder / name).exists() for name in names)
        raise UserError(
            f"the label set {folder} is incomplete: {done} of {manifest['passes']} passes; run the "
            "relabel/generate.py command that started it again"
        )
    return manifest


def first_difference(expected: dict, stored: dict, skip: frozenset | set = frozenset()) -> str:
    """ "field: expected X, found Y" of the first field in which two manifests differ, or ""."""
    for key in {**expected, **stored}:
        if key not in skip and expected.get(key) != stored.get(key):
            return f"{key}: expected {_short(expected.get(key))}, found {_short(stored.get(key))}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
