"""Students on klt labels of versions 1 and 2 of the label format, and on fp16 labels.

git worktree add --detach OLD c7c4b74                 (the last commit that writes version 1)
python benchmarks/versions.py --glyphs glyphs --old OLD --work-dir W       (see glyphs.py)

One teacher, one set of distilled images and of views. Version 1's code makes its labels from the
same fp16 labels, and they are stored in today's fp16, decoded, for today's train.py: only the
labels differ. Bytes are those of the whole set on disk, as its version writes it. A budget is that
of an fp16 set of so many labels per class: below ten, of fewer images.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
import subprocess

import numpy as np
import torch
from torch import nn

from relabel.compress import compare
from utils import cli
from utils.files import read_json
from utils.labels import LabelSet, LabelWriter
from utils.results import provenance, write_csv

ROOT = Path(__file__).resolve().parents[1]
SEEDS, IPC, PASSES, EPOCHS = (0, 1, 2), 10, 30, 60
LABELS_PER_IMAGE, BUDGETS = (10, 3, 1), (10, 3)
DATA = ("--dataset", "custom", "--input-size", 32, "--mean", *(0.062,) * 3, "--std", *(0.219,) * 3)
MACHINE = ("--device", "cpu", "--workers", 0)
# In the old checkout: the decoded labels of a set, float32 [passes, images, classes].
EXPORT = """
import sys, numpy, torch
from utils.labels import LabelSet
labels = LabelSet.open(sys.argv[1])
passes = []
for number in range(labels.passes):
    chunks = labels.expanded(*labels.load_pass(number))
    passes.append(torch.cat([logits for logits, _ in chunks]).numpy())
numpy.save(sys.argv[2], numpy.stack(passes))
"""


class Grey(nn.Module):
    """The first channel of an image: all three are equal here."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :1]


def student(num_classes: int) -> nn.Module:
    """A network for 32x32 grey pixels that trains in half a minute on one core."""
    layers: list[nn.Module] = [Grey()]
    for before, after, kernel in ((1, 16, 5), (16, 32, 3), (32, 64, 3)):
        layers += [
            nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, num_classes))


def call(script: str, *arguments: object, root: Path = ROOT) -> None:
    """Runs a script of a checkout."""
    words = [sys.executable, root / script, *arguments]
    subprocess.run([*map(str, words)], check=True, stdout=subprocess.DEVNULL, cwd=root)


class Study:
    """The folders, and how what is in them is made, where it is missing."""

    def __init__(self, glyphs: Path, old: Path, root: Path):
        self.glyphs, self.old, self.root = glyphs, old, root
        self.teacher = (
            "--teacher",
            "ConvNetW32",
            "--teacher-weights",
            root / "teacher/checkpoint.pt",
        )
        call(
            "validate/train.py",
            *("--data-dir", glyphs / "train", "--val-dir", glyphs / "val", *DATA, *MACHINE),
            *("--output-dir", root / "teacher", "--model", "ConvNetW32", "--schedule", "hard:12"),
            *("--batch-size", 64, "--lr", 0.002, "--hard-mix", "none", "--label-smoothing", 0),
            *("--eta", 1, "--eval-every", 6, "--min-scale", 0.5),
        )

    def distilled(self, ipc: int) -> Path:
        """So many images per class."""
        path = self.root / f"ipc{ipc}"
        if not path.exists():
            call(
                "scripts/prepare_distilled.py",
                *("--data-dir", self.glyphs / "train", "--out-dir", path, *self.teacher),
                *("--ipc", ipc, "--crops", 0, *DATA, *MACHINE),
            )
        return path

    def teachers(self, ipc: int, passes: int, root: Path = ROOT) -> Path:
        """The fp16 labels of the code in `root`."""
        path = self.root / f"fp16_ipc{ipc}_{passes}{'' if root == ROOT else '_version1'}"
        call(
            "relabel/generate.py",
            *("--data-dir", self.distilled(ipc), "--label-dir", path, *self.teacher, "--no-bssl"),
            *("--slc", ipc * passes, "--batch-size", 50, "--min-scale", 0.5, *DATA, *MACHINE),
            root=root,
        )
        return path

    def labels(self, version: int, distortion: float, passes: int) -> tuple[Path, int]:
        """A set that today's code reads, and the bytes of the one that it was decoded from."""
        path = self.root / f"klt{distortion}_{passes}_version{version}"
        root = self.old if version == 1 else ROOT
        call(
            "relabel/compress.py",
            *("--label-dir", self.teachers(IPC, PASSES, root), "--out-dir", path),
            *("--slc", IPC * passes, "--codec", "klt", "--distortion", distortion),
            root=root,
        )
        size = sum(file.stat().st_size for file in path.iterdir() if file.name != ".lock")
        return (self.decoded(path, passes) if version == 1 else path), size

    def decoded(self, path: Path, passes: int) -> Path:
        """Version 1's labels as today's fp16."""
        target, array = path.with_name(f"{path.name}_decoded"), path.with_suffix(".npy")
        source = LabelSet.open(self.teachers(IPC, PASSES))
        settings = {**source.manifest, "passes": passes, "slc": IPC * passes}
        writer = LabelWriter(target, settings, source.sizes)
        if not writer.complete():
            command = [sys.executable, "-c", EXPORT, path, array]
            subprocess.run(command, check=True, cwd=self.old)
            logits = np.load(array, mmap_mode="r")
            with writer.begun():
                for pass_index in range(passes):
                    views = writer.draw(pass_index)
                    one = torch.from_numpy(logits[pass_index].copy())
                    writer.write_pass(pass_index, one, views, source.hard_labels)
                writer.finish()
        return target

    def affordable(self, version: int, distortion: float, budget: int) -> int:
        """The most labels per image whose set is no larger than the budget."""
        passes = PASSES
        while (size := self.labels(version, distortion, passes)[1]) > budget and passes > 1:
            passes = max(1, min(passes - 1, int(passes * budget / size)))
        return passes

    def top1(self, labels: Path, ipc: int, seed: int) -> float:
        """Of a student after its last epoch, in percent."""
        run = self.root / "runs" / f"{labels.name}_seed{seed}"
        call(
            "validate/train.py",
            *("--data-dir", self.distilled(ipc), "--label-dir", labels, "--output-dir", run),
            *("--val-dir", self.glyphs / "test", *DATA, *MACHINE, "--seed", seed),
            *("--model", "benchmarks.versions:student", "--schedule", f"soft:{EPOCHS}"),
            *("--eval-every", EPOCHS, "--temperature", 10, "--soft-loss-scale", "T2"),
            *("--lr", 0.003, "--eta", 1),
        )
        return read_json(run / "result.json")["last"]["top1"]


def cells(study: Study) -> list[dict]:
    """What is to be trained, the most telling first: labels, and what is known of them."""
    reference, found = LabelSet.open(study.teachers(IPC, PASSES)), []

    def klt(version: int, distortion: float, passes: int, **facts: object) -> None:
        labels, size = study.labels(version, distortion, passes)
        (lost,), _ = compare(LabelSet.open(labels), reference, range(min(passes, 3)), (20.0,))
        about = {"codec": f"klt {distortion}", "version": version, "labels_per_image": passes}
        row = {**facts, **about, "bytes": size, "distortion_t20": round(lost, 5)}
        found.append({"labels": labels, "ipc": IPC, **row})

    def fp16(ipc: int, passes: int, **facts: object) -> int:
        labels = study.teachers(ipc, passes)
        size = LabelSet.open(labels).bytes_on_disk()
        about = {"codec": "fp16", "version": 2, "labels_per_image": passes}
        row = {**facts, **about, "bytes": size, "distortion_t20": 0}
        found.append({"labels": labels, "ipc": ipc, **row})
        return size

    for passes in LABELS_PER_IMAGE:
        for version in (2, 1):
            klt(version, 0.002, passes, question="equal labels", budget="")
        fp16(IPC, passes, question="equal labels", budget="")
    for per_class in BUDGETS:
        facts = {"question": "equal bytes", "budget": per_class}
        budget = fp16(per_class, 1, **facts)
        for distortion in (0.01, 0.002):
            for version in (2, 1):
                most = study.affordable(version, distortion, budget)
                klt(version, distortion, most, **facts)
    return found


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--glyphs", type=Path, required=True, help="what glyphs.py made")
    parser.add_argument("--old", type=Path, required=True, help="a checkout of commit c7c4b74")
    parser.add_argument("--work-dir", type=Path, required=True, help="labels and runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(args.glyphs.resolve(), args.old.resolve(), args.work_dir.resolve())
    rows, command = [], "python benchmarks/versions.py --glyphs glyphs --old OLD --work-dir W"
    for cell in cells(study):
        for seed in SEEDS:
            facts = {key: value for key, value in cell.items() if key not in ("labels", "ipc")}
            top1 = study.top1(cell["labels"], cell["ipc"], seed)
            rows.append({**facts, "images_per_class": cell["ipc"], "seed": seed, "top1": top1})
            print(rows[-1], flush=True)
            about = "glyphs; top1: of the last epoch, in percent; 60 epochs, soft only, T 10"
            out = ROOT / "benchmarks/results/label_versions.csv"
            write_csv(rows, out, provenance(command), about)


if __name__ == "__main__":
    cli.run(main)
