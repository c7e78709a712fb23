"""What a run is made of: its settings, from the command line, hyper.yaml and the label set."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
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
_DEFAULT_HARD_SHARE = 0.5
_COUNT, _SHARE, _POSITIVE = bounded(int, 1), bounded(float, 0, 1), bounded(float, 0.01)
# Fields that say where things lie and how fast they go; all others decide the result.
FREE = {"data_dir", "label_dir", "val_dir", "device", "workers", "compile", "graph", "val_cache"}


def _flag(text: str, number: Callable | None = None, **options) -> dataclasses.Field:
    """A field that a flag of its name sets, perhaps to a number; options are add_argument's."""
    if number:
        options |= {"type": number, "metavar": "X"}
    return dataclasses.field(metadata={"help": text, **options})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a run is made of, found and checked by `resolve`; args.yaml holds it as it is."""

    dataset: str  # see utils.data.datasets.Dataset
    num_classes: int
    input_size: int
    mean: list[float]
    std: list[float]
    images_sha256: str  # fingerprint of the distilled images
    labels_sha256: str | None  # of the label set's manifest, which has those of its other files
    validation_images: str  # fingerprint of the listing of the validation images
    schedule: str  # in the form "soft:75,hard:150,soft:75"
    passes: int  # soft labels per image; 0 without a label set
    processes: int  # of torchrun; each takes grad_accum batches per optimiser step
    precision: str  # "fp16", "bf16" or "off"
    data_dir: str
    label_dir: str | None
    val_dir: str
    device: str
    workers: int
    val_cache: str
    model: str = _flag(
        "student of models/ or torchvision, timm:NAME, package.module:factory", required=True
    )
    seed: int = _flag("of weights, fresh views, batch order", bounded(int, 0, 2**62), default=0)
    batch_size: int = _flag(f"the label set's; without one, {ViewSpec.batch_size}", _COUNT)
    hard_batch_size: int = _flag("in hard and static epochs (default: --batch-size)", _COUNT)
    grad_accum: int = _flag("batches per optimiser step", _COUNT, default=1)
    eval_every: int = _flag("epochs between evaluations; the last has one", _COUNT, default=10)
    slc_from: str = _flag(
        "--slc takes first passes or random batches", choices=("first", "random"), default="first"
    )
    min_scale: float = _flag(
        f"smallest fresh crop (default: the label set's; {ViewSpec.min_scale} where that has none)",
        bounded(float, 0.0001, 1),
    )
    hard_mix: str = _flag("of fresh views; none suits teachers", choices=MIXES, default="cutmix")
    temperature: float = _flag("of the soft loss (default: the recipe's)", _POSITIVE)
    temperature_end: float | None = _flag("anneal to this by equal factors per epoch", _POSITIVE)
    soft_loss_scale: str = _flag(
        "T2: times T^2, the balanced loss (default: the recipe's)", choices=("none", "T2")
    )
    hard_share: float | None = _flag(
        f"weight of the hard loss in joint epochs (default: {_DEFAULT_HARD_SHARE})", _SHARE
    )
    label_smoothing: float = _flag(
        "of hard labels; few classes want less (default: the recipe's, 0.8 as published)", _SHARE
    )
    lr: float = _flag("of the first epoch (default: validate/hyper.yaml)", bounded(float, 0))
    eta: float = _flag(
        "of the rate's cosine: 1 ends at zero, 2 at half (default: validate/hyper.yaml)", _POSITIVE
    )
    optimizer: str = _flag(
        "sgd has momentum 0.9, and needs --lr", choices=step.OPTIMIZERS, default="adamw"
    )
    weight_decay: float = _flag("of all but biases and norms", bounded(float, 0), default=0.01)
    reset_optimizer: bool = _flag("forget moments where the kind changes", action="store_true")
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
        parts = (part.split(":") for part in self.schedule.split(","))
        return [(kind, int(epochs)) for kind, epochs in parts]

    @property
    def kinds(self) -> list[str]:
        """The kind of every epoch."""
        return [kind for kind, epochs in self.phases for _ in range(epochs)]

    @property
    def view_spec(self) -> ViewSpec:
        """What freshly drawn views are drawn from."""
        scale = self.min_scale
        return ViewSpec(self.input_size, self.hard_batch_size, min_scale=scale, mix=self.hard_mix)

    @classmethod
    def from_record(cls, record: dict, path: Path) -> "Settings":
        """The settings that `vars` gave; raises UserError for another version's, at `path`."""
        try:
            return cls(**record)
        except TypeError:
            what = f"the settings in {path} are damaged or of another version of this code"
            raise UserError(f"{what}; choose another folder") from None

    def difference(self, earlier: "Settings") -> str:
        """ "--flag: expected X, found Y" of the first field that decides the result, or ""."""
        name, colon, values = first_difference(vars(self), vars(earlier), FREE).partition(":")
        return _FLAGS.get(name, name) + colon + values

    def check_continues(self, earlier: "Settings", path: Path) -> None:
        """Raises UserError unless the run at `path` was begun with settings of the same result."""
        if self.processes != earlier.processes:
            what = f"{path} is trained by {earlier.processes} processes, not {self.processes}"
            raise UserError(f"{what}: start as many (TRAIN_GPUS), or choose another folder")
        if difference := self.difference(earlier):
            what = f"{path} holds a run with other settings ({difference})"
            raise UserError(f"{what}; choose another folder or the same settings")


_FIELDS = {field.name: field.metadata for field in dataclasses.fields(Settings)}
_FLAGS = {name: "--" + name.replace("_", "-") for name, options in _FIELDS.items() if options}


@dataclasses.dataclass(frozen=True)
class Materials:
    """The images and labels of a run, checked against each other."""

    dataset: datasets.Dataset
    folder: folders.ImageFolder  # the distilled images
    sizes: np.ndarray  # int [images, 2], their heights and widths
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
        recorded = labels.manifest if labels else None
        dataset = custom.complete(dataset, folder, sizes, recorded, f"the labels in {label_dir}")
        if labels:
            labels.check(dataset, folder.classes, fingerprint)
        return cls(dataset, folder, sizes, fingerprint, validation, labels)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or other arguments."""
    parser = cli.Parser(description="Train a student on soft and hard labels.")
    parser.add_argument("--data-dir", type=Path, required=True, help="distilled images")
    parser.add_argument("--label-dir", type=Path, help="their label set; soft epochs need it")
    parser.add_argument("--val-dir", type=Path, required=True, help="validation images")
    parser.add_argument("--output-dir", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--resume", choices=("auto", "off"), default="auto", help="off: refuse a run that is there"
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
        "a kind alone takes soft + hard epochs (default: the recipe's, hald as published)",
    )
    of_a_name = f"of a schedule given by name (default: {_DEFAULT_EPOCHS})"
    group.add_argument(
        "--soft-epochs",
        type=lambda text: text if text == "auto" else bounded(int, 0)(text),
        metavar="N",
        help=f"{of_a_name}; auto: shares 2 x --hard-epochs by labels per image and classes",
    )
    group.add_argument("--hard-epochs", type=bounded(int, 0), metavar="N", help=of_a_name)
    group.add_argument("--slc", type=_COUNT, metavar="N", help="use only so many labels per class")
    for name, flag in _FLAGS.items():
        group.add_argument(flag, **_FIELDS[name])
    runtime.add_arguments(parser)
    evaluation.add_arguments(parser)
    loggers.add_arguments(parser)
    return parser.parse_args(arguments)


def resolve(args: argparse.Namespace, materials: Materials, machine: runtime.Runtime) -> Settings:
    """The settings that flags, hyper.yaml and label set give; raises UserError if they clash."""
    dataset, labels = materials.dataset, materials.labels
    if args.slc and not labels:
        raise UserError("--slc needs --label-dir")
    if args.slc_from == "random" and not args.slc:
        raise UserError("--slc-from random needs --slc")
    passes = labels.passes if labels else 0
    passes = labels.passes_for(args.slc) if args.slc else passes
    args = recipe.training_flags(args, labels, dataset.num_classes)
    phases = phases_of(args, passes, dataset.num_classes)
    kinds = [KINDS[name] for name in sorted({name for name, _ in phases})]
    if readers := [kind.name for kind in kinds if kind.needs_labels and not labels]:
        what = f"schedule {args.schedule} has {readers[0]} epochs, which read labels"
        raise UserError(f"{what}: give --label-dir, or in a plan `like: soft`")
    used = {flag for kind in kinds for flag in kind.flags}
    for name in sorted({flag for kind in KINDS.values() for flag in kind.flags} - used):
        if getattr(args, name) != _FIELDS[name].get("default"):
            users = " or ".join(sorted(kind.name for kind in KINDS.values() if name in kind.flags))
            raise UserError(f"{_FLAGS[name]} is for {users} epochs; this run has none")
    if args.optimizer == "sgd" and args.lr is None:
        raise UserError("--optimizer sgd needs --lr: the published rates are those of AdamW")
    lr, eta, entry = published_hyper(dataset.name, args.model, materials.folder.counts())
    if recipe.fill(args, {"lr": lr, "eta": eta}):
        print(f"learning rate: {entry}")
    stored = labels.spec if labels else ViewSpec(dataset.input_size)
    min_scale = stored.min_scale if stored.min_scale < 1 else ViewSpec.min_scale
    recipe.fill(args, {"batch_size": stored.batch_size, "min_scale": min_scale})
    recipe.fill(args, {"hard_batch_size": args.batch_size})
    if "hard_share" in used:
        recipe.fill(args, {"hard_share": _DEFAULT_HARD_SHARE})
    if labels and args.batch_size != stored.batch_size:
        made = f"the labels in {labels.path} were made in batches of {stored.batch_size}"
        raise UserError(f"--batch-size {args.batch_size}: {made}; use that, with --grad-accum")
    given = {name: getattr(args, name, None) for name in _FIELDS}
    given |= {name: str(value) for name, value in given.items() if isinstance(value, Path)}
    found = {
        "dataset": dataset.name,
        "num_classes": dataset.num_classes,
        "input_size": dataset.input_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "images_sha256": materials.images_sha256,
        "labels_sha256": sha256_file(labels.path / "manifest.json") if labels else None,
        "validation_images": materials.validation.listing_sha256(),
        "schedule": ",".join(f"{kind}:{epochs}" for kind, epochs in phases),
        "passes": passes,
        "processes": machine.world,
        "precision": machine.precision,
    }
    settings = Settings(**{**given, **found})
    for kind in kinds:
        kind.check(settings, labels)
    return settings


def phases_of(args: argparse.Namespace, passes: int, classes: int) -> list[schedule.Phase]:
    """The phases that the flags ask for, with so many labels per image; says what "auto" means.

    Raises UserError for a wrong schedule, a number of epochs beside one that names its own, or auto
    without labels.
    """
    given = {"soft": args.soft_epochs, "hard": args.hard_epochs}
    for kind, epochs in given.items():
        if ":" in args.schedule and epochs is not None:
            raise UserError(
                f"--{kind}-epochs {epochs}: schedule {args.schedule} names its epochs itself"
            )
    soft, hard = (_DEFAULT_EPOCHS if each is None else each for each in given.values())
    if soft == "auto" and args.schedule in (*KINDS, *schedule.ALTERNATING):
        soft = hard  # which share the sum in their own way
    elif soft == "auto":
        if not passes:
            raise UserError("--soft-epochs auto needs --label-dir: it counts labels per image")
        total = 2 * hard
        soft = schedule.auto_soft_epochs(total, passes, classes)
        hard = total - soft
        shares = f"--soft-epochs auto: {soft} soft and {hard} hard epochs"
        print(f"{shares}, for {passes} labels per image of {classes} classes")
    return schedule.phases(args.schedule, soft, hard, max(passes, 1), [*KINDS])


def published_hyper(dataset: str, model: str, counts: Sequence[int]) -> tuple[float, float, str]:
    """Learning rate and eta of hyper.yaml, and a line that says which entry was taken.

    The nearest IPC's, of two the smaller; 0.001 and 2 for a student without entries, or where
    classes differ in size (`counts`, images per class).
    """
    table = yaml.safe_load(Path(__file__).with_name("hyper.yaml").read_text())
    students = {name.lower(): entries for name, entries in table.get(dataset, {}).items()}
    entries, ipc = students.get(model.lower()), counts[0]
    if entries is None or {*counts} != {ipc}:
        return 0.001, 2.0, f"lr 0.001, eta 2.0: default, no entry for {model} on {dataset}"
    nearest = min(entries, key=lambda entry: (abs(entry - ipc), entry))
    lr, eta = entries[nearest]
    note = "" if nearest == ipc else f" (nearest to IPC {ipc})"
    return lr, eta, f"lr {lr}, eta {eta}: {model} on {dataset} at IPC {nearest}{note}"
