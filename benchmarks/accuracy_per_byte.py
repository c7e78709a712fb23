"""Student accuracy against bytes of soft labels on disk: fp16, topk, quant and klt.

python benchmarks/glyphs.py --fonts fonts --out-dir glyphs          (see there for the typefaces)
python scripts/prepare_torchvision.py --dataset fashion_mnist --size 32 --source-dir S --out-dir F
python scripts/prepare_split.py --data-dir F/train --out-dir split --held-out 500
mkdir fashion; ln -s ../split/rest fashion/train; ln -s ../split/held_out fashion/val
ln -s ../F/val fashion/test
python benchmarks/accuracy_per_byte.py --glyphs glyphs --fashion fashion --work-dir W

Teacher, distilled images (IPC 10), labels and students are made by the project's own commands; what
is finished is skipped. Temperature, learning rate and label smoothing are chosen with fp16 labels
on images that are neither trained nor tested on. Then three questions, three seeds each:
  near-lossless  at one label per image, how much distortion costs no accuracy?
  equal bytes    what do the labels teach that a budget of bytes buys?
  equal labels   what does a codec cost in accuracy, and save in bytes, at as many labels?
Bytes are those of the label set on disk, everything included.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import statistics
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.accuracy_tables import plot, tables
from relabel import compress, generate
from relabel.lost import compare
from scripts import prepare_distilled
from utils import cli
from utils.cli import UserError
from utils.data import datasets, images
from utils.data.views import Views
from utils.files import LockedError, atomic_write, read_json, to_json
from utils.labels import LabelSet
from utils.results import provenance, write_csv
from validate import engine, train
from validate.plan import make_plan
from validate.plan import parse_arguments as training_arguments
from validate.session import EpochRunner, build_student

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
IPC = 10


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


class Remembered:
    """A source of rendered views that renders each batch once: all codecs have the same views."""

    def __init__(self, source):
        self.source, self.size = source, source.size
        self.mean, self.std = source.mean, source.std
        self._kept: dict[bytes, torch.Tensor] = {}

    def render(self, batches: list[Views]) -> Iterator[torch.Tensor]:
        """Yields float32 [B, 1, S, S] for each batch of views, to half precision."""
        for views in batches:
            key = views.checksum()
            if key not in self._kept:
                self._kept[key] = next(iter(self.source.render([views])))[:, :1].half()
            yield self._kept[key].float()


@dataclasses.dataclass(frozen=True)
class Study:
    """One data set and the grid of its runs.

    Attributes:
        name: of the data set in the tables.
        data: the flags that name it.
        teacher: flags of the teacher's training, and its network.
        batch_size: of the labels and the students.
        epochs, long: of the students; the second where labels are bought by bytes, because a
            short training cannot use many labels.
        passes: labels per image in the fp16 set that all others are made from.
        min_scale: smallest crop.
        distortions: of klt in the first question.
        budgets: bytes: those of so many fp16 labels per class; below IPC, of fewer images.
        labels_per_image: in the third question, the same for all codecs.
        rivals: codecs with settings in the last two questions, as flags of relabel/compress.py.
        finer: further ones in the third.
        temperatures, rates, smoothings: to choose from.
    """

    name: str
    data: tuple[str, ...]
    teacher: tuple[str, ...]
    batch_size: int
    epochs: int
    long: int
    passes: int
    min_scale: float
    distortions: tuple[float, ...]
    budgets: tuple[int, ...]
    labels_per_image: tuple[int, ...]
    rivals: tuple[str, ...]
    finer: tuple[str, ...]
    temperatures: tuple[float, ...]
    rates: tuple[float, ...]
    smoothings: tuple[float, ...]


STUDIES = {
    "glyphs": Study(
        name="glyphs",
        data=(
            *("--dataset", "custom", "--input-size", "32"),
            *("--mean", "0.062", "0.062", "0.062", "--std", "0.219", "0.219", "0.219"),
        ),
        teacher=("--schedule", "hard:12", "--batch-size", "64", "--lr", "0.002"),
        batch_size=50,
        epochs=30,
        long=60,
        passes=30,
        min_scale=0.5,
        distortions=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
        budgets=(3, 5, 7, 10),
        labels_per_image=(1, 3, 10),
        rivals=("topk --topk 10", "quant --bits 4", "klt --distortion 0.01"),
        finer=("klt --distortion 0.005", "klt --distortion 0.002"),
        temperatures=(2, 4, 10, 20),
        rates=(0.001, 0.003),
        smoothings=(0.1, 0.4),
    ),
    "fashion": Study(
        name="fashion",
        data=("--dataset", "fashion_mnist"),
        teacher=("--schedule", "hard:2", "--batch-size", "64", "--lr", "0.002"),
        batch_size=20,
        epochs=100,
        long=200,
        passes=60,
        min_scale=0.3,
        distortions=(0.005, 0.02, 0.05),
        budgets=(10, 30, 100),
        labels_per_image=(1, 3, 10),
        rivals=("topk --topk 2", "quant --bits 4", "klt --distortion 0.01"),
        finer=("klt --distortion 0.005", "klt --distortion 0.002"),
        temperatures=(2, 4, 10, 20),
        rates=(0.001, 0.003),
        smoothings=(0.1, 0.4),
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One student.

    Attributes:
        question: "choice", "near-lossless", "equal bytes" or "equal labels".
        codec: flags of relabel/compress.py, beginning with the codec's name; "fp16" as made.
        passes: labels per image.
        schedule: "soft" or "hald".
        temperature, rate, smoothing, seed, epochs: of the training.
        budget: of the second question, in fp16 labels per class.
        ipc: images per class that are labelled: all, where the codec can afford it.
    """

    question: str
    codec: str
    passes: int
    schedule: str
    temperature: float
    rate: float
    smoothing: float
    seed: int
    epochs: int
    budget: int = 0
    ipc: int = IPC

    def name(self) -> str:
        """A name that tells this run from all others."""
        split = "val" if self.question == "choice" else "test"
        codec = self.codec.replace(" --", "_").replace(" ", "")
        codec += f"_ipc{self.ipc}" if self.ipc != IPC else ""
        return (
            f"{split}_{codec}_p{self.passes}_{self.schedule}_T{self.temperature:g}"
            f"_lr{self.rate:g}_s{self.smoothing:g}_seed{self.seed}_e{self.epochs}"
        )


class Workplace:
    """The folders of one study at one IPC, and how its parts are made."""

    def __init__(self, study: Study, folder: Path, home: Path, ipc: int = IPC):
        self.study, self.images, self.home, self.ipc = study, folder, home, ipc
        self.root = home / f"ipc{ipc}"
        self.root.mkdir(parents=True, exist_ok=True)
        self.common = (*study.data, "--device", "cpu", "--workers", "0")
        weights = home / "teacher" / "checkpoint.pt"
        self.named_teacher = ("--teacher", "ConvNetW32", "--teacher-weights", weights)
        self.passes = study.passes if ipc == IPC else 1

    @functools.cache  # noqa: B019 - one workplace per process
    def at(self, ipc: int) -> "Workplace":
        """The same study with other images per class, prepared."""
        other = Workplace(self.study, self.images, self.home, ipc)
        other.prepare()
        return other

    def prepare(self) -> None:
        """Teacher, distilled images and their fp16 labels."""
        study = self.study
        if not (self.home / "teacher" / "result.json").exists():
            call(
                train.main,
                *("--data-dir", self.images / "train", "--val-dir", self.images / "val"),
                *("--output-dir", self.home / "teacher", "--model", "ConvNetW32"),
                *("--hard-mix", "none", "--label-smoothing", 0, "--eta", 1, "--eval-every", 2),
                *("--min-scale", study.min_scale, *study.teacher, *self.common),
            )
        if not self.distilled.exists():
            call(
                prepare_distilled.main,
                *("--data-dir", self.images / "train", "--out-dir", self.distilled),
                *self.named_teacher,
                *("--ipc", self.ipc, "--crops", 0, *self.common),
            )
        self.recode("fp16", self.passes)

    @property
    def distilled(self) -> Path:
        return self.root / "distilled"

    def labels(self, codec: str, passes: int) -> Path:
        """Where the labels of a codec lie."""
        return self.root / f"labels_{codec.replace(' --', '_').replace(' ', '')}_{passes}"

    def recode(self, codec: str, passes: int) -> LabelSet:
        """So many passes of the teacher's labels in a codec, made where they are missing.

        A set of its own, also in fp16: the manifest of all passes would weigh in a small one.
        """
        path = self.labels(codec, passes)
        while not (path / "manifest.json").exists():
            try:
                self.make_labels(path, codec, passes)
            except LockedError:  # another process of --share is making them
                time.sleep(1)
        return LabelSet.open(path)

    def make_labels(self, path: Path, codec: str, passes: int) -> None:
        """Labels the distilled images, or re-encodes their fp16 labels."""
        study = self.study
        if codec == "fp16":
            call(
                generate.main,
                *("--data-dir", self.distilled, "--label-dir", path, *self.named_teacher),
                *("--no-bssl", "--slc", self.ipc * passes, "--codec", "fp16"),
                *("--batch-size", study.batch_size, "--min-scale", study.min_scale, *self.common),
            )
        else:
            whole = self.labels("fp16", self.passes)
            call(
                compress.main,
                *("--label-dir", whole, "--out-dir", path, "--slc", self.ipc * passes),
                *("--codec", *codec.split()),
            )

    def passes_for(self, codec: str, budget: int) -> int:
        """Labels per image, at most all there are, whose set is no larger than the budget."""
        ipc, fp16_passes = afforded(budget)
        size = self.at(ipc).recode("fp16", fp16_passes).bytes_on_disk()
        passes = self.passes
        while (found := self.recode(codec, passes).bytes_on_disk()) > size and passes > 1:
            passes = max(1, min(passes - 1, int(passes * size / found)))
        return passes

    def run(self, run: Run) -> dict:
        """Trains the student, if that was not done, and returns its line of the result file."""
        path = self.home / "runs" / f"{run.name()}.json"
        labels = self.recode(run.codec, run.passes)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            start = time.perf_counter()
            top1 = self.train(run, labels)
            seconds = round(time.perf_counter() - start, 1)
            atomic_write(path, to_json({"top1": top1, "seconds": seconds}))
        count = run.passes * labels.manifest["images"]["count"]
        result = read_json(path)
        return {
            "data": self.study.name,
            **dataclasses.asdict(run),
            "label_bytes": labels.bytes_on_disk(),
            "bytes_per_label": round(labels.bytes_on_disk() / count, 2),
            "distortion_t20": round(self.distortion(run.codec, run.passes), 5),
            "top1": round(result["top1"], 3),
            "seconds": result["seconds"],
        }

    @functools.cached_property
    def source(self) -> Remembered:
        """The distilled images."""
        folder = images.scan(self.distilled)
        sizes, _ = images.inspect(folder)
        whole = images.open_images(folder, sizes, self.dataset(), torch.device("cpu"), 0)
        return Remembered(whole)

    @functools.cache  # noqa: B019 - one workplace per process
    def evaluation(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and classes of the images of a split."""
        folder = images.scan(self.images / split)
        return images.load_evaluation(folder, self.dataset()), folder.labels

    def dataset(self) -> datasets.Dataset:
        """What the flags name."""
        manifest = self.recode("fp16", 1).manifest
        facts = (manifest[key] for key in ("dataset", "num_classes", "input_size", "mean", "std"))
        return datasets.Dataset(*facts)

    def train(self, run: Run, labels: LabelSet) -> float:
        """Top-1 of a student after its last epoch, in percent.

        As validate/train.py trains, but with views that are remembered, and nothing on disk.
        """
        soft, split = run.epochs // 2, "val" if run.question == "choice" else "test"
        with quietly():
            plan = make_plan(
                training_arguments(
                    [
                        *("--data-dir", str(self.distilled), "--label-dir", str(labels.path)),
                        *("--slc", str(self.ipc * run.passes)),
                        *("--val-dir", str(self.images / split), "--output-dir", str(self.root)),
                        *("--model", "benchmarks.accuracy_per_byte:student"),
                        *("--schedule", run.schedule, "--soft-loss-scale", "T2", "--eta", "1"),
                        *("--soft-epochs", str(soft), "--hard-epochs", str(run.epochs - soft)),
                        *("--temperature", str(run.temperature), "--lr", str(run.rate)),
                        *("--label-smoothing", str(run.smoothing), "--seed", str(run.seed)),
                        *self.common,
                    ]
                )
            )
        model, optimizer = build_student(plan)
        machine = plan.machine
        trainer = engine.Trainer(
            *(model, optimizer, machine.scaler(), machine, 1, lambda views: None)
        )
        epochs = EpochRunner(plan, trainer, self.source)
        for epoch in range(run.epochs):
            epochs.run(epoch)
        pixels, targets = self.evaluation(split)
        mean, std = self.source.mean, self.source.std
        return engine.evaluate(model, pixels, targets, mean, std, machine)[0]

    def distortion(self, codec: str, passes: int) -> float:
        """Distortion at temperature 20 of the first pass, against fp16."""
        if codec == "fp16":
            return 0.0
        labels, reference = self.recode(codec, passes), self.recode("fp16", self.passes)
        return compare(labels, reference, [0], (20.0,))[0][0]


def afforded(budget: int) -> tuple[int, int]:
    """Images per class and labels per image of the fp16 set that is a budget."""
    return min(budget, IPC), max(1, budget // IPC)


def call(main: Callable[[], None], *arguments: object) -> None:
    """Runs an entry script's main in this process, quietly."""
    words = [str(word) for word in arguments]
    with patch.object(sys, "argv", [main.__module__, *words]), quietly():
        main()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What is printed goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def best(rows: list[dict], key: str) -> float:
    """The value of a setting whose runs have the highest mean accuracy."""
    values = {row[key] for row in rows}
    return max(
        sorted(values),
        key=lambda value: statistics.mean(row["top1"] for row in rows if row[key] == value),
    )


def grid(place: Workplace, finish: Callable[[list[Run]], list[dict]]) -> None:
    """All runs of a study in order; `finish(runs)` makes them and returns their lines."""
    study = place.study
    start = (study.temperatures[0], study.rates[0], 0.1, 0, study.epochs)
    first = Run("choice", "fp16", 2, "soft", *start)
    rates = finish([dataclasses.replace(first, rate=rate) for rate in study.rates])
    first = dataclasses.replace(first, rate=best(rates, "rate"))
    found = finish([dataclasses.replace(first, temperature=t) for t in study.temperatures])
    first = dataclasses.replace(first, temperature=best(found, "temperature"), schedule="hald")
    found = finish([dataclasses.replace(first, smoothing=s) for s in study.smoothings])
    chosen = dataclasses.replace(first, smoothing=best(found, "smoothing"))

    settings = ["fp16", *(f"klt --distortion {value:g}" for value in study.distortions)]
    near = dataclasses.replace(chosen, question="near-lossless", passes=1, schedule="soft")
    finish(
        [dataclasses.replace(near, codec=codec, seed=seed) for seed in SEEDS for codec in settings]
    )

    def equal_bytes(schedule: str) -> list[Run]:
        return [
            dataclasses.replace(
                chosen,
                question="equal bytes",
                codec=codec,
                passes=afforded(budget)[1] if codec == "fp16" else place.passes_for(codec, budget),
                ipc=afforded(budget)[0] if codec == "fp16" else IPC,
                budget=budget,
                schedule=schedule,
                seed=seed,
                epochs=study.long,
            )
            for seed in SEEDS
            for budget in study.budgets
            for codec in ("fp16", *study.rivals)
        ]

    finish(equal_bytes("soft"))
    long = dataclasses.replace(chosen, question="equal labels", schedule="soft", epochs=study.long)
    finish(
        [
            dataclasses.replace(long, codec=codec, passes=passes, seed=seed)
            for seed in SEEDS
            for passes in study.labels_per_image
            for codec in ("fp16", *study.rivals, *study.finer)
        ]
    )
    finish(equal_bytes("hald"))


class OutOfTime(Exception):
    """The minutes of this call are used up before the settings are chosen."""


def work(place: Workplace, minutes: float, share: tuple[int, int]) -> list[dict]:
    """Makes a share of what is missing, for so many minutes; the lines of all finished runs."""
    rows, deadline = [], time.monotonic() + 60 * minutes

    def finish(runs: list[Run]) -> list[dict]:
        lines = []
        bar = cli.progress(runs, desc=f"{place.study.name}, {runs[0].question}", unit="run")
        for number, run in enumerate(bar):
            done = (place.home / "runs" / f"{run.name()}.json").exists()
            mine = number % share[1] == share[0] or run.question == "choice"
            if done or (mine and time.monotonic() < deadline):
                lines.append(place.at(run.ipc).run(run))
        rows.extend(lines)
        if len(lines) < len(runs) and runs[0].question == "choice":
            raise OutOfTime
        return lines

    with contextlib.suppress(OutOfTime):
        place = place.at(IPC)
        grid(place, finish)
    return rows


def read_csv(path: Path) -> tuple[list[dict], dict[str, str]]:
    """The lines of a result file, numbers as text; and by data set, where they come from."""
    if not path.exists():
        raise UserError(f"{path} is missing: run the study first")
    lines = path.read_text().splitlines()
    about = (line[2:].partition(": ") for line in lines if line.startswith("#"))
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return rows, {name: source for name, _, source in about if name in STUDIES}


def share_of(text: str) -> tuple[int, int]:
    """(K, N) of "K/N"."""
    first, _, every = text.partition("/")
    return int(first), int(every)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    for name in STUDIES:
        parser.add_argument(f"--{name}", type=Path, metavar="D", help="image folders of this study")
    parser.add_argument("--work-dir", type=Path, help="teachers, labels and runs")
    parser.add_argument(
        "--share",
        type=share_of,
        default=(0, 1),
        metavar="K/N",
        help="make every Nth run only, from the Kth (from 0) on: for N processes side by side",
    )
    parser.add_argument(
        "--minutes",
        type=cli.bounded(float, 0),
        default=1e6,
        help="start no run after so many; the same command again continues",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    result = RESULTS / "accuracy_per_byte.csv"
    chosen = {name: getattr(args, name) for name in STUDIES if getattr(args, name)}
    if chosen:
        if args.work_dir is None:
            raise UserError("--work-dir is needed to run a study")
        torch.set_num_threads(1)
        rows, about = read_csv(result) if result.exists() else ([], {})
        rows = [row for row in rows if row["data"] not in chosen]
        for name, folder in chosen.items():
            place = Workplace(STUDIES[name], folder, args.work_dir / name)
            rows += work(place, args.minutes, args.share)
            about[name] = provenance(
                f"python benchmarks/accuracy_per_byte.py --{name} D --work-dir W"
            )
        if not rows:
            print("prepared; no run is finished yet")
            return
        rows.sort(key=lambda row: list(STUDIES).index(row["data"]))
        sources = (f"{name}: {about[name]}" for name in STUDIES if name in about)
        write_csv(rows, result, "top1: of the last epoch, in percent", *sources)
        plot(result.with_suffix(".png"), rows)
    print(tables(read_csv(result)[0]))


if __name__ == "__main__":
    cli.run(main)
