"""100,000 soft labels of 1000 classes in fp16, and compressed to budgets of 64 and 20 bytes.

python benchmarks/large_label_set.py --photos photos --work-dir W     (photos: see label_size.py)

1000 pieces of real photos play the distilled images of 1000 classes (IPC 1); EfficientNet-Lite0
labels 100 views of each at 96 pixels in bf16, with CutMix and BSSL, all by relabel/generate.py.
Then relabel/compress.py makes the smaller sets, on one thread; its time and memory are those of the
whole process. Last, the time that a student's epoch spends on expanding labels.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import re
import subprocess
import time

import torch
from PIL import Image

import models
from benchmarks.label_size import find_photos
from relabel.lost import compare
from utils import cli
from utils.data import datasets
from utils.data.images import ResidentImages, decode
from utils.files import whole_folder
from utils.labels import LabelSet
from utils.results import provenance, write_csv
from utils.runtime import Runtime
from validate import engine

ROOT = Path(__file__).resolve().parents[1]
CLASSES, PASSES, INPUT, BUDGETS = 1000, 100, 96, (64, 20)
PIECE = 160  # pixels, the side of an image
STUDENT = "MobileNetV2"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder, searched recursively")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def cut_photos(photos: list[Path], folder: Path) -> None:
    """1000 square pieces of photos, each the only image of a class folder."""
    across = 1
    while across * across * len(photos) < CLASSES:
        across += 1
    with whole_folder(folder) as partial:
        for number, path in enumerate(cli.progress(photos, desc="photos", unit="photo")):
            side = across * PIECE
            square = decode(path).resize((side, side), Image.Resampling.LANCZOS)
            for piece in range(across * across):
                label = piece * len(photos) + number
                if label < CLASSES:
                    top, left = divmod(piece, across)
                    box = (left * PIECE, top * PIECE, (left + 1) * PIECE, (top + 1) * PIECE)
                    (partial / f"{label:05d}").mkdir()
                    square.crop(box).save(partial / f"{label:05d}" / "0.png")


def command(*arguments: object) -> tuple[float, int]:
    """Runs a Python script on one thread; its wall seconds and its peak memory in bytes."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while process.poll() is None:
        # Not getrusage: its maximum counts this process before the new program was loaded.
        status = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            peak = 1024 * int(found[1])
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return time.perf_counter() - start, peak


def shares_of_epoch(labels: LabelSet, dataset: datasets.Dataset) -> dict[str, float]:
    """Microseconds per label, and per view of a student's epoch, on one thread."""
    labels[0]  # reads the first pass
    batches = range(labels.batches_per_pass)
    start = time.perf_counter()
    for batch in batches:
        labels[batch]
    expand = (time.perf_counter() - start) / labels.manifest["images"]["count"]
    model = models.build(STUDENT, CLASSES, INPUT).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(engine.parameter_groups(model, 0.01), lr=0.001, fused=True)
    machine = Runtime(torch.device("cpu"), None)
    trainer = engine.Trainer(model, optimizer, machine.scaler(), machine, 1, lambda views: None)
    pixels = torch.randint(0, 256, (CLASSES, 3, PIECE, PIECE), dtype=torch.uint8)
    source = ResidentImages(pixels, dataset, machine.device)
    start = time.perf_counter()
    result = engine.train_soft_epoch(trainer, source, labels, list(range(12)), 20.0, "none")
    epoch = (time.perf_counter() - start) / result.views
    return {
        "expand_us_per_label": round(1e6 * expand, 1),
        "epoch_us_per_view": round(1e6 * epoch, 1),
        "expand_share_of_epoch": round(expand / epoch, 5),
    }


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    work = args.work_dir
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "images").exists():
        cut_photos(find_photos(args.photos), work / "images")
    facts = datasets.named("imagenet1k")
    flags = ("--mean", *facts.mean, "--std", *facts.std)
    whole = work / "labels_fp16"
    teacher = "benchmarks.efficientnet_lite0:factory"
    command(
        *(ROOT / "relabel/generate.py", "--data-dir", work / "images", "--label-dir", whole),
        *("--dataset", "custom", "--input-size", INPUT, *flags, "--teacher", teacher),
        *("--slc", PASSES, "--codec", "fp16", "--amp", "bf16", "--device", "cpu", "--force"),
    )
    reference = LabelSet.open(whole)
    dataset = datasets.Dataset("custom", CLASSES, INPUT, facts.mean, facts.std)
    count, before = CLASSES * PASSES, reference.bytes_on_disk()
    rows = []
    for budget in BUDGETS:
        small = work / f"labels_klt_{budget}"
        if small.exists():
            raise cli.UserError(f"{small} exists: move it away, so that it is made and timed again")
        seconds, memory = command(
            *(ROOT / "relabel/compress.py", "--label-dir", whole, "--out-dir", small),
            *("--codec", "klt", "--bytes-per-label", budget),
        )
        labels = LabelSet.open(small)
        after = labels.bytes_on_disk()
        # Of the last pass, which no codec was fitted to.
        (distortion,), _ = compare(labels, reference, [PASSES - 1], (20.0,))
        rows.append(
            {
                "budget": budget,
                "labels": count,
                "fp16_bytes": before,
                "klt_bytes": after,
                "klt_bytes_per_label": round(after / count, 2),
                "factor": round(before / after, 2),
                "distortion_t20_last_pass": round(distortion, 5),
                "compress_seconds": round(seconds, 1),
                "compress_labels_per_s": round(count / seconds),
                "compress_peak_mib": round(memory / 2**20),
                **shares_of_epoch(labels, dataset),
            }
        )
        print(rows[-1], flush=True)
    write_csv(
        *(rows, args.out / "large_label_set.csv"),
        provenance("python benchmarks/large_label_set.py --photos photos --work-dir W"),
        f"one thread; epoch of {STUDENT} at {INPUT} pixels, batch 16",
    )


if __name__ == "__main__":
    cli.run(main)
