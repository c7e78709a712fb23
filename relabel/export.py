"""Writes a label set in the layout of HALD's published labels, for other training code.

Every pass becomes `epoch_<p>.tar`, a list of batches [coords float16 [B, 4], flips bool [B],
mix_index int64 [B], lam, bbox, softmax(logits / 20) float16 [B, C]], and the images of all passes
`sampler_indices_dict.pt`. relabel/convert.py reads such folders. `export.json` tells the same
command that it has been done.

python relabel/export.py --label-dir L --out-dir F
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

import numpy as np
import torch

from relabel.published import HALD_ORDER, TEMPERATURE
from utils import cli
from utils.cli import UserError
from utils.data.views import Views
from utils.files import atomic_write, read_json, sha256_file, to_json, torch_save, whole_folder
from utils.labels import LabelSet
from utils.labels.manifest import MANIFEST

_RECORD = "export.json"


def fractions(box: torch.Tensor, sizes: np.ndarray) -> torch.Tensor:
    """float16 [B, 4] crops as fractions that give the same pixels truncated as rounded.

    Published code truncates, so that half precision must not round down. Of int32 [B, 4] pixels
    (top, left, height, width) of images whose heights and widths are int [B, 2].
    """
    pixels, scale = box.numpy().astype(np.float64), np.tile(sizes, 2).astype(np.float64)
    half = (pixels / scale).astype(np.float16)
    half = np.where(half * scale < pixels, np.nextafter(half, np.float16(2)), half)
    return torch.from_numpy(half)


def published_batch(views: Views, logits: torch.Tensor, sizes: np.ndarray, size: int) -> list[Any]:
    """A batch as published: `sizes` int [images, 2], `size` the side of a view in pixels."""
    partner = lam = bbox = None
    # Clones, as torch.save writes the whole of what a tensor is a part of.
    if views.mix_index is not None:
        partner, lam = views.mix_index.clone(), float(views.lam(size)[0])
    if views.mix_box is not None:
        top, left, height, width = views.mix_box[0].tolist()
        bbox = [top, left, top + height, left + width]
    coords = fractions(views.box, sizes[views.index.numpy()])
    labels = (logits / TEMPERATURE).softmax(dim=1).half()
    return [coords, views.flip.clone(), partner, lam, bbox, labels]


def main() -> None:
    parser = cli.Parser(description="Write a label set in the layout of HALD's published labels.")
    parser.add_argument("--label-dir", type=Path, required=True, help="a finished label set")
    parser.add_argument("--out-dir", type=Path, required=True, help="the published folder to make")
    args = parser.parse_args()
    labels, order, moved = LabelSet.open(args.label_dir), {}, 0
    if args.label_dir.resolve() in args.out_dir.resolve().parents:
        raise UserError(f"--out-dir {args.out_dir} is within the label set; choose another folder")
    record = {"labels_sha256": sha256_file(args.label_dir / MANIFEST)}
    if (args.out_dir / _RECORD).is_file() and read_json(args.out_dir / _RECORD) == record:
        print(f"{args.out_dir} is there already: nothing to do")
        return
    with whole_folder(args.out_dir) as folder:
        for pass_index in cli.progress(range(labels.passes), desc="export", unit="pass"):
            views, logits = labels.whole_pass(pass_index)
            parts = logits.split(views.batch_size)
            batches = [
                published_batch(one, part, labels.sizes, labels.spec.input_size)
                for one, part in zip(views, parts, strict=True)
            ]
            torch_save(folder / f"epoch_{pass_index}.tar", batches)
            order[str(pass_index)] = views.index.tolist()
            scale = torch.from_numpy(labels.sizes[views.index.numpy()]).repeat(1, 2)
            read = torch.cat([batch[0] for batch in batches]).double() * scale
            moved += int((read.round().int() != views.box).any(dim=1).sum())
        torch_save(folder / HALD_ORDER, order)
        atomic_write(folder / _RECORD, to_json(record))
    count = labels.passes * len(labels.hard_labels)
    print(f"{args.out_dir}: {count} soft labels of {labels.passes} passes")
    if moved:
        print(
            f"{moved} crops are of images too large for half-precision fractions: the published "
            "layout moves them by a pixel"
        )


if __name__ == "__main__":
    cli.run(main)
