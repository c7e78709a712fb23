"""Views per second that relabelling could make with a teacher that costs nothing, codec klt.

python benchmarks/packing.py --out OUT.csv

A pass is drawn, "labelled" by a teacher that has the logits already, handed to the processes that
pack, packed and written, as relabel/generate.py does it; only rendering and the network are left
out. The logits are drawn at random, with a spectrum that makes them as many bytes as those of an
ImageNet teacher under CutMix and BSSL are at distortion .002 (benchmarks/README.md). A timing ends
when all its passes are on disk. How long the fit takes is printed, too.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shlex
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from analysis.tables import column, grouped
from relabel.generate import fit_codec, label_passes
from relabel.packers import pass_writer
from utils import cli, hardware, runtime
from utils.cli import UserError
from utils.data import datasets
from utils.data.folders import ImageFolder
from utils.data.views import Views, ViewSpec
from utils.labels import LabelWriter, make_settings
from utils.labels.manifest import pass_name
from utils.results import provenance, write_csv

CLASSES = 1000
SET_LABELS = 150_000
DECAY = 1.3  # the variance of principal component k is proportional to k ** -DECAY
_SAMPLE = 20_000  # logits that are kept, and labelled with again and again
_STARTING = 20  # seconds until all processes are at work, for certain


class Free:
    """A teacher that has all logits already, and a source of views, which it need not see."""

    def __init__(self, machine: runtime.Runtime):
        self.runtime, self.given = machine, 0
        random = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(CLASSES, CLASSES, generator=random)).Q
        spread = 20 * torch.arange(1, CLASSES + 1) ** (-DECAY / 2)
        coefficients = torch.randn(_SAMPLE, CLASSES, generator=random) * spread
        self.stored = (coefficients @ directions).to(machine.device)

    def render(self, groups: Iterable[Views]) -> Iterator[torch.Tensor]:
        """Yields as many rows as there are views in a group."""
        return (views.index for views in groups)

    def logits(self, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
        """float32 [N, C]: the next ones."""
        if self.given + len(pixels) > len(self.stored):
            self.given = 0
        self.given += len(pixels)
        return self.stored[self.given - len(pixels) : self.given]


def new_writer(root: Path, images: int) -> LabelWriter:
    """A writer of so many labels per pass."""
    facts, labels = datasets.named("imagenet1k"), torch.arange(images) * CLASSES // images
    dataset = datasets.Dataset("benchmark", CLASSES, facts.input_size, facts.mean, facts.std)
    sizes = np.full((images, 2), facts.input_size)
    settings = make_settings(
        dataset=dataset,
        folder=ImageFolder(root, [f"{label:05d}" for label in range(CLASSES)], [], labels),
        sizes=sizes,
        images_sha256="",
        ipc=None,
        passes=-(-SET_LABELS // images),
        spec=ViewSpec(facts.input_size, 16),
        seed=0,
        origin={"views_per_forward": 256},
        codec={"name": "klt", "distortion": 0.002},
    )
    return LabelWriter(root / "labels", settings, sizes)


def rates(
    writer: LabelWriter,
    teacher: Free,
    labels: torch.Tensor,
    packers: int,
    passes: int,
    repeats: int,
) -> Iterator[float]:
    """Yields views per second of so many passes, packed by so many processes (0: in line)."""
    files = [writer.path / pass_name(pass_index) for pass_index in range(passes)]
    begun = time.monotonic()
    with pass_writer(writer, packers) as write_pass, cli.progress(disable=True) as bar:
        while repeats:
            for file in files:
                file.unlink(missing_ok=True)
            started = time.perf_counter()
            labelled = label_passes(range(passes), writer, teacher, teacher, bar)
            for pass_index, views, logits in labelled:
                write_pass(pass_index, logits, views, labels)
            while not all(file.exists() for file in files):
                time.sleep(0.001)
            seconds = time.perf_counter() - started
            if packers == 0 or time.monotonic() > begun + _STARTING:
                repeats -= 1
                yield passes * len(labels) / seconds


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    count = cli.bounded(int, 1)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--views", type=count, default=20_000, metavar="N", help="per timing")
    parser.add_argument("--images", type=count, default=1000, metavar="N", help="views of a pass")
    parser.add_argument("--repeats", type=count, default=5, metavar="N")
    packers = "processes that pack, one table line each; 0 packs in line (default: 1 2 4)"
    parser.add_argument(
        "--packers",
        type=cli.bounded(int, 0),
        nargs="+",
        default=[1, 2, 4],
        metavar="N",
        help=packers,
    )
    runtime.add_arguments(parser, decodes=False)
    args = parser.parse_args()
    passes = -(-args.views // args.images)
    if passes * args.images > SET_LABELS:
        raise UserError(f"--views {args.views}: at most {SET_LABELS}")
    machine = runtime.from_arguments(args)
    teacher, rows = Free(machine), []
    with tempfile.TemporaryDirectory() as root:
        writer = new_writer(Path(root), args.images)
        labels = torch.arange(args.images) * CLASSES // args.images
        with writer.begun():
            started = time.perf_counter()
            fit_codec(writer, teacher, teacher, labels)
            fitted = f"fitted in {time.perf_counter() - started:.2f} s"
            for packers in args.packers:
                for rate in rates(writer, teacher, labels, packers, passes, args.repeats):
                    rows.append({"packers": packers, "views_per_second": round(rate)})
        stored = sum(file.stat().st_size for file in writer.path.glob("pass_*"))
    about = (
        f"{hardware.processor()}, {runtime.usable_cores()} CPU cores; {runtime.describe(machine)}; "
        f"{stored / passes / args.images:.1f} bytes per label in passes of {args.images}; {fitted}"
    )
    print(about)
    print(f"{'packers':>7}{'views/s':>10}{'per process':>13}{'(min to max)':>18}")
    for (packers,), timings in grouped(rows, "packers").items():
        found = column(timings, "views_per_second")
        middle, spread = statistics.median(found), f"({min(found)} to {max(found)})"
        print(f"{packers:7}{middle:10.0f}{middle / max(packers, 1):13.0f}{spread:>18}")
    command = provenance(shlex.join(["python", "benchmarks/packing.py", *sys.argv[1:]]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.out, command, about)


if __name__ == "__main__":
    cli.run(main)
