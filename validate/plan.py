"""What a run is made of: the command line of train.py, resolved and checked, as a Plan."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from utils import cli, loggers, runtime
from utils.cli import UserError, bounded
from utils.data import datasets, evaluation, images
from utils.data.views import MIXES, ViewSpec
from utils.files import sha256_file
from utils.labels import LabelSet
from validate import schedule

_DEFAULT_EPOCHS = 150
_DEFAULT_HYPER = (0.001, 2.0)


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
    _add_course(parser)
    _add_labels_and_views(parser)
    _add_loss(parser)
    _add_optimiser(parser)
    runtime.add_arguments(parser)
    evaluation.add_arguments(parser)
    loggers.add_arguments(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the student (torch.compile), on a GPU into CUDA graphs; needs a C++ compiler",
    )
    return parser.parse_args(arguments)


def _add_course(parser: argparse.ArgumentParser) -> None:
    """The student and the course of its training."""
    group = parser.add_argument_group("student and schedule")
    group.add_argument(
        "--model",
        required=True,
        help="a network of models/, a torchvision name, timm:NAME or package.module:factory",
    )
    group.add_argument(
        "--schedule",
        default="hald",
        help=f'{", ".join(schedule.NAMES)}, or a form like "soft:75,hard:150,soft:75"; '
        f"{', '.join(schedule.KINDS)} train soft + hard epochs on that kind alone",
    )
    group.add_argument(
        "--soft-epochs",
        type=_auto_or_count,
        metavar="N",
        help=f"of a schedule given by name (default: {_DEFAULT_EPOCHS}); auto: shares 2 x "
        "--hard-epochs between both kinds by labels per image and classes",
    )
    group.add_argument(
        "--hard-epochs",
        type=bounded(int, 0),
        metavar="N",
        help=f"of a schedule given by name (default: {_DEFAULT_EPOCHS})",
    )
    group.add_argument(
        "--batch-size",
        type=bounded(int, 1),
        metavar="N",
        help="must be the label set's (default: that, or 16 without labels)",
    )
    group.add_argument(
        "--grad-accum",
        type=bounded(int, 1),
        default=1,
        metavar="N",
        help="batches per optimiser step",
    )
    group.add_argument(
        "--seed",
        type=bounded(int, 0, 2**62),
        default=0,
        metavar="N",
        help="of the student's weights, the fresh views and the order of stored batches",
    )
    group.add_argument(
        "--eval-every",
        type=bounded(int, 1),
        default=10,
        metavar="N",
        help="epochs between evaluations; the last epoch is always evaluated",
    )


def _add_labels_and_views(parser: argparse.ArgumentParser) -> None:
    """Which stored labels are used, and how fresh views are drawn."""
    group = parser.add_argument_group("labels and views")
    group.add_argument(
        "--slc", type=bounded(int, 1), metavar="N", help="use only so many soft labels per class"
    )
    group.add_argument(
        "--slc-from",
        choices=("first", "random"),
        default="first",
        help="which ones: the first passes, or batches chosen at random from all passes",
    )
    group.add_argument(
        "--min-scale",
        type=bounded(float, 0.0001, 1),
        metavar="X",
        help="smallest crop in hard and static epochs (default: the label set's; 0.08 without "
        "labels and with those of whole images)",
    )
    group.add_argument(
        "--hard-mix",
        choices=MIXES,
        default="cutmix",
        help="mixing in hard epochs; none suits training a teacher",
    )


def _add_loss(parser: argparse.ArgumentParser) -> None:
    """Soft and hard loss."""
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--temperature",
        type=bounded(float, 0.01),
        default=20.0,
        metavar="T",
        help="of teacher and student in the soft loss",
    )
    group.add_argument(
        "--temperature-end",
        type=bounded(float, 0.01),
        metavar="T",
        help="anneal the temperature to this one over the run, by equal factors per epoch",
    )
    group.add_argument(
        "--soft-loss-scale",
        choices=("none", "T2"),
        default="none",
        help="none: as published; T2: times T^2, the balanced recipe",
    )
    group.add_argument(
        "--label-smoothing",
        type=bounded(float, 0, 1),
        default=0.8,
        metavar="S",
        help="of the hard labels; 0.8 suits 1000 classes, ten want less",
    )
    group.add_argument(
        "--hard-share",
        type=bounded(float, 0, 1),
        metavar="X",
        help="weight of the hard loss in joint epochs (default: 0.5)",
    )


def _add_optimiser(parser: argparse.ArgumentParser) -> None:
    """AdamW and its rate."""
    group = parser.add_argument_group("optimiser")
    group.add_argument(
        "--lr", type=bounded(float, 0), help="of the first epoch (default: validate/hyper.yaml)"
    )
    group.add_argument(
        "--eta",
        type=bounded(float, 0.01),
        help="length of the rate's cosine in runs: 1 ends at zero, 2 at half the rate (default: "
        "validate/hyper.yaml)",
    )
    group.add_argument(
        "--weight-decay",
        type=bounded(float, 0),
        default=0.01,
        metavar="X",
        help="AdamW's, of tensors with more than one dimension",
    )
    group.add_argument(
        "--reset-optimizer",
        action="store_true",
        help="forget Adam's moments at each switch to another kind of epoch",
    )


def _auto_or_count(text: str) -> int | str:
    """An argparse type: "auto", or a number of epochs."""
    return text if text == "auto" else bounded(int, 0)(text)


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
    soft, hard = (
        _DEFAULT_EPOCHS if given is None else given
        for given in (args.soft_epochs, args.hard_epochs)
    )
    if soft != "auto":
        return soft, hard
    total = 2 * hard
    if args.schedule in schedule.KINDS:  # which trains all of them, however they are shared
        return total, 0
    if not passes:
        raise UserError("--soft-epochs auto needs --label-dir: it looks at the labels per image")
    soft = schedule.auto_soft_epochs(total, passes, classes)
    print(
        f"--soft-epochs auto: {soft} soft and {total - soft} hard epochs, for {passes} labels per "
        f"image of {classes} classes"
    )
    return soft, total - soft


def published_hyper(dataset: str, model: str, ipc: int | None) -> tuple[float, float, str]:
    """Learning rate and eta of hyper.yaml, and a line that says which entry was taken.

    No entry for this IPC: the nearest of that student (the smaller of two equally near ones);
    none for the student: 0.001 and 2.
    """
    table = yaml.safe_load(Path(__file__).with_name("hyper.yaml").read_text())
    students = {name.lower(): entries for name, entries in table.get(dataset, {}).items()}
    entries = students.get(model.lower())
    if entries is None or ipc is None:
        lr, eta = _DEFAULT_HYPER
        return lr, eta, f"lr {lr}, eta {eta}: default, no entry for {model} on {dataset}"
    nearest = min(entries, key=lambda entry: (abs(entry - ipc), entry))
    lr, eta = entries[nearest]
    note = "" if nearest == ipc else f" (nearest to IPC {ipc})"
    return lr, eta, f"lr {lr}, eta {eta}: {model} on {dataset} at IPC {nearest}{note}"


def learning_rate(
    args: argparse.Namespace, dataset: datasets.Dataset, folder: images.ImageFolder
) -> tuple[float, float]:
    """Learning rate and eta: those of the flags, else of hyper.yaml, and then says which entry."""
    counts = set(folder.counts())
    ipc = counts.pop() if len(counts) == 1 else None
    lr, eta, source = published_hyper(dataset.name, args.model, ipc)
    if args.lr is None or args.eta is None:
        print(f"learning rate: {source}")
    return lr if args.lr is None else args.lr, eta if args.eta is None else args.eta


def fresh_views(
    args: argparse.Namespace, dataset: datasets.Dataset, labels: LabelSet | None
) -> ViewSpec:
    """What the views of hard and static epochs are drawn from: as the labels' are, or flags say."""
    crops_stored = labels is not None and labels.spec.min_scale < 1
    return ViewSpec(
        dataset.input_size,
        args.batch_size or (labels.spec.batch_size if labels else 16),
        args.min_scale or (labels.spec.min_scale if crops_stored else 0.08),
        mix=args.hard_mix,
    )


def open_labels(
    args: argparse.Namespace,
    dataset: datasets.Dataset,
    folder: images.ImageFolder,
    fingerprint: str,
) -> LabelSet | None:
    """The label set, checked against images, data set and flags; None when none is given."""
    if args.label_dir is None:
        if args.slc is not None:
            raise UserError("--slc needs --label-dir")
        return None
    labels = LabelSet.open(args.label_dir)
    labels.check(dataset, folder.classes, fingerprint)
    stored = labels.manifest["batch_size"]
    if args.batch_size not in (None, stored):
        raise UserError(
            f"--batch-size {args.batch_size}: the labels in {args.label_dir} were made in batches "
            f"of {stored}; use that, with --grad-accum for larger steps, or relabel"
        )
    return labels


def choose_batches(args: argparse.Namespace, labels: LabelSet | None) -> tuple[int, list[int]]:
    """Soft labels per image, and the numbers of the stored batches that soft epochs draw from."""
    if labels is None:
        return 0, []
    stored = len(labels)
    if args.slc_from == "first":
        if args.slc is not None:
            labels.passes = labels.passes_for(args.slc)
        return labels.passes, list(range(len(labels)))
    if args.slc is None:
        raise UserError("--slc-from random needs --slc")
    everything = labels.passes
    labels.passes = labels.passes_for(args.slc)
    kept, passes = len(labels), labels.passes
    labels.passes = everything
    return passes, schedule.pruned(stored, kept, args.seed)


def check_used(args: argparse.Namespace, kinds: list[str]) -> None:
    """Raises UserError for a flag that means nothing in a schedule of these kinds of epoch."""
    users = {
        "hard_share": ({"joint"}, args.hard_share is not None),
        "temperature_end": ({"soft", "joint", "static"}, args.temperature_end is not None),
        "slc_from": ({"soft", "joint"}, args.slc_from == "random"),
    }
    for name, (of, given) in users.items():
        if given and not of & {*kinds}:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is for {' or '.join(sorted(of))} epochs; this run has none")


def check_static(args: argparse.Namespace, labels: LabelSet) -> None:
    """Raises UserError unless every image has a label of its own: unmixed, and none left out."""
    if args.slc_from == "random":
        raise UserError("--slc-from random would leave images without a label for static epochs")
    if labels.spec.mix != "none":
        raise UserError(
            f"static epochs need one label per image, but {labels.path} labels {labels.spec.mix} "
            "views; make a set of whole images: relabel/generate.py --mix none --min-scale 1"
        )


@dataclasses.dataclass
class Plan:
    """Everything that a run is made of, checked.

    Attributes:
        dataset, machine: see utils.data.datasets.Dataset and utils.runtime.Runtime.
        folder, sizes: the distilled images, and int [images, 2] their heights and widths.
        validation: the validation images.
        labels: the label set, or None without --label-dir.
        batch_numbers: the stored label batches that soft and joint epochs draw from.
        kinds: one of schedule.KINDS for every epoch.
        spec: what the views of hard and static epochs are drawn from.
        settings: all that decides the result, for the run folder.
    """

    dataset: datasets.Dataset
    machine: runtime.Runtime
    folder: images.ImageFolder
    sizes: np.ndarray
    validation: images.ImageFolder
    labels: LabelSet | None
    batch_numbers: list[int]
    kinds: list[str]
    spec: ViewSpec
    settings: dict


def make_plan(args: argparse.Namespace) -> Plan:
    """Resolves and checks the arguments; raises UserError, and writes nothing."""
    dataset = datasets.from_arguments(args)
    machine = runtime.from_arguments(args)
    print(runtime.describe(machine, dataset.input_size))
    folder = images.scan(args.data_dir, dataset.num_classes)
    dataset = dataclasses.replace(dataset, num_classes=len(folder.classes))
    validation = images.scan(args.val_dir)
    if args.val_dir.resolve() == args.data_dir.resolve():
        print("--val-dir is --data-dir: top-1 is that on the training images")
    images.check_same_classes(validation, folder.classes, str(args.data_dir))
    sizes, fingerprint = images.inspect(folder)
    labels = open_labels(args, dataset, folder, fingerprint)

    if args.temperature_end == args.temperature:
        raise UserError(f"--temperature-end {args.temperature_end:g} is what --temperature is")
    passes, batch_numbers = choose_batches(args, labels)
    soft, hard = count_epochs(args, passes, dataset.num_classes)
    phases = schedule.phases(args.schedule, soft, hard, max(passes, 1))
    kinds = schedule.epoch_kinds(phases)
    for kind in sorted({*kinds} - {"hard"}):
        if labels is None:
            raise UserError(f"schedule {args.schedule} has {kind} epochs: give --label-dir")
    if "static" in kinds:
        check_static(args, labels)
    check_used(args, kinds)
    spec = fresh_views(args, dataset, labels)
    lr, eta = learning_rate(args, dataset, folder)
    settings = {
        **{name: list(v) if isinstance(v, tuple) else v for name, v in vars(dataset).items()},
        "images_sha256": fingerprint,
        "labels_sha256": sha256_file(labels.path / "manifest.json") if labels else None,
        "validation_images": validation.listing_sha256(),
        "model": args.model,
        "phases": [list(phase) for phase in phases],
        "passes": passes,
        "batch_size": spec.batch_size,
        "min_scale": spec.min_scale,
        "hard_mix": spec.mix,
        "lr": lr,
        "eta": eta,
        "grad_accum": args.grad_accum,
        "temperature": args.temperature,
        "soft_loss_scale": args.soft_loss_scale,
        "label_smoothing": args.label_smoothing,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "eval_every": args.eval_every,
        "precision": machine.precision,
    }
    # Recorded only where they are used, so that runs begun before they existed can continue.
    optional = {
        "slc_from": args.slc_from if args.slc_from == "random" else None,
        "temperature_end": args.temperature_end,
        "reset_optimizer": args.reset_optimizer or None,
        "hard_share": (0.5 if args.hard_share is None else args.hard_share)
        if "joint" in kinds
        else None,
    }
    if machine.world > 1:
        optional["processes"] = machine.world
    settings |= {name: value for name, value in optional.items() if value is not None}
    return Plan(
        *(dataset, machine, folder, sizes, validation, labels, batch_numbers, kinds, spec, settings)
    )
