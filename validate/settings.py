"""What a run is made of: its settings, from the command line, hyper.yaml and the label set."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from utils import cli, loggers, recipe, runtime
from utils.cli import UserError, bounded
from utils.data import custom, datasets, evaluation, folders, images
from utils.data.views import MIXES, ViewSpec
from utils.files import sha256_file
from utils.labels import LabelSet, first_difference
from validate import schedule, step
from validate.kinds import KINDS

_DEFAULT_EPOCHS = 150
_DEFAULT_HYPER = (0.001, 2.0)
_DEFAULT_BATCH_SIZE = 16
_DEFAULT_HARD_SHARE = 0.5
_DEFAULT_MIN_SCALE = 0.08
# Fields that say where things lie and how fast they go; all others decide the result.
FREE = {"data_dir", "label_dir", "val_dir", "device", "workers", "compile", "graph", "val_cache"}


def _flag(text: str, **options) -> dataclasses.Field:
    """A field that a flag of its name sets; `options` are those of add_argument."""
    if "type" in options:
        options = {"metavar": "X", **options}
    return dataclasses.field(metadata={"help": text, **options})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run is made of, checked; args.yaml holds it as it is.

    Attributes:
        dataset, num_classes, input_size, mean, std: see utils.data.datasets.Dataset.
        images_sha256, validation_images, labels_sha256: fingerprints of the distilled images, of
            the listing of the validation images, and of the label set's manifest.
        schedule: its phases in the form "soft:75,hard:150,soft:75".
        passes: soft labels per image; 0 without a label set.
        processes: of torchrun; each takes grad_accum batches per optimiser step.
        precision: "fp16", "bf16" or "off".
        The others: see their flags. Where a flag has no default, resolve() finds the value.
    """

    dataset: str
    num_classes: int
    input_size: int
    mean: list[float]
    std: list[float]
    images_sha256: str
    labels_sha256: str | None
    validation_images: str
    schedule: str
    passes: int
    processes: int
    precision: str
    data_dir: str
    label_dir: str | None
    val_dir: str
    device: str
    workers: int
    val_cache: str
    model: str = _flag(
        "student: a name of models/ or torchvision, timm:NAME, package.module:factory",
        required=True,
    )
    seed: int = _flag(
        "of weights, fresh views and the order of batches", type=bounded(int, 0, 2**62), default=0
    )
    batch_size: int = _flag(
        f"the label set's; without one, default {_DEFAULT_BATCH_SIZE}", type=bounded(int, 1)
    )
    hard_batch_size: int = _flag(
        "of freshly drawn views, in hard and static epochs (default: the other batches')",
        type=bounded(int, 1),
    )
    grad_accum: int = _flag("batches per optimiser step", type=bounded(int, 1), default=1)
    eval_every: int = _flag(
        "epochs between evaluations; the last is always evaluated", type=bounded(int, 1), default=10
    )
    slc_from: str = _flag(
        "what --slc takes: first passes, or random batches",
        choices=("first", "random"),
        default="first",
    )
    min_scale: float = _flag(
        "smallest crop in hard and static epochs (default: the label set's; "
        f"{_DEFAULT_MIN_SCALE} without labels and with those of whole images)",
        type=bounded(float, 0.0001, 1),
    )
    hard_mix: str = _flag(
        "mixing in hard epochs; none suits training a teacher", choices=MIXES, default="cutmix"
    )
    temperature: float = _flag(
        "of teacher and student in the soft loss (default: the recipe's, 20 as published)",
        type=bounded(float, 0.01),
    )
    temperature_end: float | None = _flag(
        "anneal the temperature to this one over the run, by equal factors per epoch",
        type=bounded(float, 0.01),
    )
    soft_loss_scale: str = _flag(
        "none: as published; T2: times T^2 (arXiv 1503.02531), the balanced loss, which keeps "
        "gradients as large as those of hard labels (default: the recipe's)",
        choices=("none", "T2"),
    )
    hard_share: float | None = _flag(
        f"weight of the hard loss in joint epochs (default: {_DEFAULT_HARD_SHARE})",
        type=bounded(float, 0, 1),
    )
    label_smoothing: float = _flag(
        "of hard labels; 0.8 suits 1000 classes, ten want less (default: the recipe's, 0.8 as "
        "published)",
        type=bounded(float, 0, 1),
    )
    lr: float = _flag("of the first epoch (default: validate/hyper.yaml)", type=bounded(float, 0))
    eta: float = _flag(
        "length of the rate's cosine in runs: 1 ends at zero, 2 at half the rate (default: "
        "validate/hyper.yaml)",
        type=bounded(float, 0.01),
    )
    optimizer: str = _flag(
        "adamw: as published; sgd: with momentum 0.9, usual for teachers; needs --lr",
        choices=step.OPTIMIZERS,
        default="adamw",
    )
    weight_decay: float = _flag(
        "of tensors with more than one dimension", type=bounded(float, 0), default=0.01
    )
    reset_optimizer: bool = _flag(
        "forget the optimiser's moments at each switch to another kind",
        action="store_true",
    )
    compile: bool = _flag("compile the student; needs a C++ compiler", action="store_true")
    graph: bool = _flag(
        "on one GPU, and without --grad-accum, launch a whole training step as one CUDA graph",
        action=argparse.BooleanOptionalAction,
        default=True,
    )

    @property
    def facts(self) -> datasets.Dataset:
        """The facts of the data set."""
        mean, std = tuple(self.mean), tuple(self.std)
        return datasets.Dataset(self.dataset, self.num_classes, self.input_size, mean, std)

    @property
    def phases(self) -> list[schedule.Phase]:
        """The phases of the schedule."""
        return schedule.parse(self.schedule, [*KINDS])

    @property
    def kinds(self) -> list[str]:
        """The kind of every epoch."""
        return [kind for kind, epochs in self.phases for _ in range(epochs)]

    @property
    def view_spec(self) -> ViewSpec:
        """What freshly drawn views are drawn from."""
        scale = self.min_scale
        return ViewSpec(self.input_size, self.hard_batch_size, min_scale=scale, mix=self.hard_mix)

    def label_batches(self, labels: LabelSet) -> list[int]:
        """The stored label batches that epochs of this run draw from."""
        keep = self.passes * labels.batches_per_pass
        return schedule.label_batches(len(labels), keep, self.slc_from, self.seed)

    @classmethod
    def from_record(cls, record: dict, path: Path) -> "Settings":
        """The settings that `vars` gave; raises UserError for another version's, at `path`."""
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        fits = isinstance(record, dict) and {*record} == {*kinds}
        if not fits or not all(_is_a(record[name], kind) for name, kind in kinds.items()):
            raise UserError(
                f"the settings in {path} are damaged or of another version of this code; choose "
                "another folder"
            )
        return cls(**record)

    def difference(self, earlier: "Settings") -> str:
        """ "--flag: expected X, found Y" of the first field that decides the result, or "".

        A field without a flag stands under its name.
        """
        name, colon, values = first_difference(vars(self), vars(earlier), FREE).partition(":")
        flags = [field.name for field in dataclasses.fields(self) if field.metadata]
        shown = "--" + name.replace("_", "-") if name in flags else name
        return shown + colon + values

    def check_continues(self, earlier: "Settings", path: Path) -> None:
        """Raises UserError unless the run at `path` was begun with settings of the same result."""
        if self.processes != earlier.processes:
            raise UserError(
                f"{path} is trained by {earlier.processes} processes, not {self.processes}: "
                f"continue with torchrun --nproc_per_node={earlier.processes} validate/train.py "
                f"(TRAIN_GPUS={earlier.processes} of the run scripts), or choose another "
                "--output-dir"
            )
        if difference := self.difference(earlier):
            raise UserError(
                f"{path} holds a run with other settings ({difference}); choose another "
                "--output-dir or the same settings"
            )


def _is_a(value: object, kind: type) -> bool:
    """Whether a value read from YAML is of the type of its field."""
    if kind == list[float]:
        return isinstance(value, list) and all(isinstance(each, float) for each in value)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


@dataclasses.dataclass(frozen=True)
class Materials:
    """The images and labels of a run, checked against each other.

    Attributes:
        dataset: its facts, the number of classes counted.
        folder: the distilled images; `sizes` int [images, 2], their heights and widths;
            `images_sha256` their fingerprint.
        validation: the validation images.
        labels: the label set, or None.
    """

    dataset: datasets.Dataset
    folder: folders.ImageFolder
    sizes: np.ndarray
    images_sha256: str
    validation: folders.ImageFolder
    labels: LabelSet | None

    @classmethod
    def open(
        cls, dataset: datasets.Dataset, data_dir: Path, val_dir: Path, label_dir: Path | None
    ) -> "Materials":
        """Opens them; raises UserError for what is missing, damaged or does not belong together."""
        folder = folders.scan(data_dir, dataset.num_classes)
        validation = folders.scan(val_dir)
        folders.check_same_classes(validation, folder.classes, str(data_dir))
        sizes, fingerprint = images.inspect(folder)
        labels = None if label_dir is None else LabelSet.open(label_dir)
        recorded = labels.manifest if labels is not None else None
        dataset = custom.complete(dataset, folder, sizes, recorded, f"the labels in {label_dir}")
        if labels is not None:
            labels.check(dataset, folder.classes, fingerprint)
        return cls(dataset, folder, sizes, fingerprint, validation, labels)

    def labels_sha256(self) -> str | None:
        """Fingerprint of the label set's manifest, which holds those of its other files."""
        return sha256_file(self.labels.path / "manifest.json") if self.labels else None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or other arguments."""
    parser = cli.Parser(description="Train a student on soft and hard labels.")
    parser.add_argument("--data-dir", type=Path, required=True, help="distilled images")
    parser.add_argument(
        "--label-dir", type=Path, help="label set of these images; needed for soft epochs"
    )
    parser.add_argument("--val-dir", type=Path, required=True, help="validation images")
    parser.add_argument("--output-dir", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--resume",
        choices=("auto", "off"),
        default="auto",
        help="auto: continue the run in the output folder; off: refuse if there is one",
    )
    datasets.add_arguments(parser)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--recipe",
        choices=recipe.RECIPES,
        default="published",
        help="gives --schedule, --soft-loss-scale, --temperature, --label-smoothing, each unless "
        "it is given; auto: stored views alone, moved anew each time, for labels of that recipe",
    )
    group.add_argument(
        "--schedule",
        help=f'{", ".join([*schedule.NAMES, *KINDS])}, or a form like "soft:75,hard:150,soft:75"; '
        f"{', '.join(KINDS)} train soft + hard epochs on that kind alone (default: the recipe's, "
        "hald as published)",
    )
    of_a_name = f"of a schedule given by name (default: {_DEFAULT_EPOCHS})"
    group.add_argument(
        "--soft-epochs",
        type=lambda text: text if text == "auto" else bounded(int, 0)(text),
        metavar="N",
        help=f"{of_a_name}; auto: shares 2 x --hard-epochs between both kinds by labels per image "
        "and classes",
    )
    group.add_argument("--hard-epochs", type=bounded(int, 0), metavar="N", help=of_a_name)
    group.add_argument(
        "--slc", type=bounded(int, 1), metavar="N", help="use only so many soft labels per class"
    )
    for field in dataclasses.fields(Settings):
        if field.metadata:
            group.add_argument("--" + field.name.replace("_", "-"), **field.metadata)
    runtime.add_arguments(parser)
    evaluation.add_arguments(parser)
    loggers.add_arguments(parser)
    return parser.parse_args(arguments)


def resolve(args: argparse.Namespace, materials: Materials, machine: runtime.Runtime) -> Settings:
    """The settings that flags, hyper.yaml and label set give.

    Raises:
        UserError: flags that clash with each other, with the schedule or with the label set.
    """
    dataset, labels = materials.dataset, materials.labels
    passes = _labels_per_image(args, labels)
    args = recipe.training_flags(args, labels, dataset.num_classes)
    soft, hard = count_epochs(args, passes, dataset.num_classes)
    phases = schedule.phases(args.schedule, soft, hard, max(passes, 1), [*KINDS])
    kinds = sorted({kind for kind, _ in phases})
    for kind in kinds:
        if KINDS[kind].needs_labels and labels is None:
            raise UserError(f"schedule {args.schedule} has {kind} epochs: give --label-dir")
    if args.optimizer == "sgd" and args.lr is None:
        raise UserError("--optimizer sgd needs --lr: the published rates are those of AdamW")
    lr, eta, entry = published_hyper(dataset.name, args.model, materials.folder.counts())
    if args.lr is None or args.eta is None:
        print(f"learning rate: {entry}")
    batch_size = _batch_size(args, labels)
    hard_share = _DEFAULT_HARD_SHARE if args.hard_share is None else args.hard_share
    crops_stored = labels is not None and labels.spec.min_scale < 1
    stored_scale = labels.spec.min_scale if crops_stored else _DEFAULT_MIN_SCALE
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Settings)}
    resolved = {
        "dataset": dataset.name,
        "num_classes": dataset.num_classes,
        "input_size": dataset.input_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "images_sha256": materials.images_sha256,
        "labels_sha256": materials.labels_sha256(),
        "validation_images": materials.validation.listing_sha256(),
        "schedule": ",".join(f"{kind}:{epochs}" for kind, epochs in phases),
        "passes": passes,
        "processes": machine.world,
        "precision": machine.precision,
        "data_dir": str(args.data_dir),
        "label_dir": str(args.label_dir) if labels else None,
        "val_dir": str(args.val_dir),
        "batch_size": batch_size,
        "hard_batch_size": args.hard_batch_size or batch_size,
        "min_scale": args.min_scale or stored_scale,
        "hard_share": hard_share if "joint" in kinds else None,
        "lr": lr if args.lr is None else args.lr,
        "eta": eta if args.eta is None else args.eta,
    }
    settings = Settings(**{**given, **resolved})
    for kind in kinds:
        KINDS[kind].check(settings, labels)
    _check_flags_are_used(args, kinds)
    return settings


def count_epochs(args: argparse.Namespace, passes: int, classes: int) -> tuple[int, int]:
    """Soft and hard epochs of a schedule given by name; says what "auto" means here.

    Raises:
        UserError: a number of epochs beside a schedule that names its own, or auto without labels.
    """
    if ":" in args.schedule:
        for flag, given in (("soft", args.soft_epochs), ("hard", args.hard_epochs)):
            if given is not None:
                raise UserError(
                    f"--{flag}-epochs {given}: schedule {args.schedule} names its epochs itself"
                )
    soft = _DEFAULT_EPOCHS if args.soft_epochs is None else args.soft_epochs
    hard = _DEFAULT_EPOCHS if args.hard_epochs is None else args.hard_epochs
    if soft != "auto":
        return soft, hard
    total = 2 * hard
    if args.schedule in (*KINDS, *schedule.ALTERNATING):  # which share them in their own way
        return total, 0
    if not passes:
        raise UserError("--soft-epochs auto needs --label-dir: it looks at the labels per image")
    soft = schedule.auto_soft_epochs(total, passes, classes)
    print(
        f"--soft-epochs auto: {soft} soft and {total - soft} hard epochs, for {passes} labels per "
        f"image of {classes} classes"
    )
    return soft, total - soft


def _labels_per_image(args: argparse.Namespace, labels: LabelSet | None) -> int:
    """How many soft labels of each image are used; 0 without a label set."""
    if labels is None:
        if args.slc is not None:
            raise UserError("--slc needs --label-dir")
        return 0
    if args.slc is None and args.slc_from == "random":
        raise UserError("--slc-from random needs --slc")
    return labels.passes if args.slc is None else labels.passes_for(args.slc)


def _batch_size(args: argparse.Namespace, labels: LabelSet | None) -> int:
    """Views per batch: the label set's, or the flag's where there is none."""
    if labels is None:
        return args.batch_size or _DEFAULT_BATCH_SIZE
    stored = labels.spec.batch_size
    if args.batch_size not in (None, stored):
        raise UserError(
            f"--batch-size {args.batch_size}: the labels in {args.label_dir} were made in batches "
            f"of {stored}; use that, with --grad-accum for larger steps, or relabel"
        )
    return stored


def _check_flags_are_used(args: argparse.Namespace, kinds: Sequence[str]) -> None:
    """Raises UserError for a flag that means nothing in a schedule of these kinds of epoch."""
    defaults = {f.name: f.metadata.get("default") for f in dataclasses.fields(Settings)}
    for name in sorted({name for kind in KINDS.values() for name in kind.flags}):
        users = sorted(kind.name for kind in KINDS.values() if name in kind.flags)
        if getattr(args, name) != defaults[name] and not {*users} & {*kinds}:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is for {' or '.join(users)} epochs; this run has none")


def published_hyper(dataset: str, model: str, counts: Sequence[int]) -> tuple[float, float, str]:
    """Learning rate and eta of hyper.yaml, and a line that says which entry was taken.

    No entry for the IPC: the nearest of that student (the smaller of two equally near ones);
    none for the student, or classes that differ in size: 0.001 and 2.

    Args:
        dataset, model: names.
        counts: images per class.
    """
    table = yaml.safe_load(Path(__file__).with_name("hyper.yaml").read_text())
    students = {name.lower(): entries for name, entries in table.get(dataset, {}).items()}
    entries, ipc = students.get(model.lower()), counts[0]
    if entries is None or {*counts} != {ipc}:
        lr, eta = _DEFAULT_HYPER
        return lr, eta, f"lr {lr}, eta {eta}: default, no entry for {model} on {dataset}"
    nearest = min(entries, key=lambda entry: (abs(entry - ipc), entry))
    lr, eta = entries[nearest]
    note = "" if nearest == ipc else f" (nearest to IPC {ipc})"
    return lr, eta, f"lr {lr}, eta {eta}: {model} on {dataset} at IPC {nearest}{note}"
