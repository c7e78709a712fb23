"""Trains a student on stored soft labels and on hard labels, by a schedule that alternates them.

python validate/train.py --data-dir D --label-dir L --val-dir V --output-dir O
    --dataset imagenet1k --model ResNet18
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import dataclasses
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import yaml
from torch import nn

import models
from utils import cli, datasets, evaluation, images, loggers, runlog, runtime
from utils.cli import UserError, bounded
from utils.files import sha256_file
from utils.labels import LabelSet
from utils.views import MIXES, ViewSpec, draw
from validate import engine, schedule

_DEFAULT_HYPER = (0.001, 2.0)
_CHECKPOINT_SECONDS = 60


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
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--model", required=True, help="a network of models/, or a torchvision name"
    )
    recipe.add_argument(
        "--schedule",
        default="hald",
        help=f'{", ".join(schedule.NAMES)}, or a form like "soft:75,hard:150,soft:75"; '
        f"{', '.join(schedule.KINDS)} train all epochs on that kind",
    )
    recipe.add_argument(
        "--soft-epochs",
        type=_auto_or_count,
        default=150,
        metavar="N",
        help="or auto: shares 2 x --hard-epochs between both kinds by labels per image and classes",
    )
    recipe.add_argument("--hard-epochs", type=bounded(int, 0), default=150, metavar="N")
    recipe.add_argument(
        "--slc", type=bounded(int, 1), metavar="N", help="use only so many soft labels per class"
    )
    recipe.add_argument(
        "--slc-from",
        choices=("first", "random"),
        default="first",
        help="which ones: the first passes, or batches chosen at random from all passes",
    )
    recipe.add_argument(
        "--batch-size",
        type=bounded(int, 1),
        metavar="N",
        help="must be the label set's (default: that, or 16 without labels)",
    )
    recipe.add_argument(
        "--grad-accum",
        type=bounded(int, 1),
        default=1,
        metavar="N",
        help="batches per optimiser step",
    )
    recipe.add_argument("--temperature", type=bounded(float, 0.01), default=20.0, metavar="T")
    recipe.add_argument(
        "--temperature-end",
        type=bounded(float, 0.01),
        metavar="T",
        help="anneal the temperature to this one over the run, by equal factors per epoch",
    )
    recipe.add_argument(
        "--soft-loss-scale",
        choices=("none", "T2"),
        default="none",
        help="none: as published; T2: times T^2, the balanced recipe",
    )
    recipe.add_argument(
        "--reset-optimizer",
        action="store_true",
        help="forget Adam's moments at each switch to another kind of epoch",
    )
    recipe.add_argument("--label-smoothing", type=bounded(float, 0, 1), default=0.8, metavar="S")
    recipe.add_argument(
        "--hard-share",
        type=bounded(float, 0, 1),
        metavar="X",
        help="weight of the hard loss in joint epochs (default: 0.5)",
    )
    recipe.add_argument(
        "--min-scale",
        type=bounded(float, 0.0001, 1),
        metavar="X",
        help="smallest crop in hard and static epochs (default: the label set's; 0.08 without "
        "labels and with those of whole images)",
    )
    recipe.add_argument(
        "--hard-mix",
        choices=MIXES,
        default="cutmix",
        help="mixing in hard epochs; none suits training a teacher",
    )
    recipe.add_argument("--lr", type=bounded(float, 0), help="default: hyper.yaml")
    recipe.add_argument("--eta", type=bounded(float, 0.01), help="default: hyper.yaml")
    recipe.add_argument("--weight-decay", type=bounded(float, 0), default=0.01)
    recipe.add_argument("--seed", type=bounded(int, 0, 2**62), default=0, metavar="N")
    recipe.add_argument("--eval-every", type=bounded(int, 1), default=10, metavar="N")
    runtime.add_arguments(parser)
    evaluation.add_arguments(parser)
    loggers.add_arguments(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the student (torch.compile), on a GPU into CUDA graphs; needs a C compiler",
    )
    return parser.parse_args(arguments)


def _auto_or_count(text: str) -> int | str:
    """An argparse type: "auto", or a number of epochs."""
    return text if text == "auto" else bounded(int, 0)(text)


def count_epochs(args: argparse.Namespace, passes: int, classes: int) -> tuple[int, int]:
    """Soft and hard epochs; says what "auto" means here.

    Raises:
        UserError: auto without a label set, or with a schedule that names its own epochs.
    """
    if args.soft_epochs != "auto":
        return args.soft_epochs, args.hard_epochs
    if not passes:
        raise UserError("--soft-epochs auto needs --label-dir: it looks at the labels per image")
    if ":" in args.schedule:
        raise UserError(f"--soft-epochs auto: schedule {args.schedule} names its epochs itself")
    total = 2 * args.hard_epochs
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
            labels.use_slc(args.slc)
        return labels.passes, list(range(len(labels)))
    if args.slc is None:
        raise UserError("--slc-from random needs --slc")
    everything = labels.passes
    labels.use_slc(args.slc)
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
        dataset, machine: see utils.datasets.Dataset and utils.runtime.Runtime.
        folder, sizes: the distilled images, and int [images, 2] their heights and widths.
        validation: the validation images.
        labels: the label set, or None when every epoch is hard.
        batch_numbers: the stored label batches that soft and joint epochs draw from.
        kinds: one of schedule.KINDS for every epoch.
        spec: what the views of hard epochs are drawn from.
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
    counts = set(folder.counts())
    lr, eta, source = published_hyper(
        dataset.name, args.model, counts.pop() if len(counts) == 1 else None
    )
    if args.lr is None or args.eta is None:
        print(f"learning rate: {source}")
    crops_stored = labels is not None and labels.spec.min_scale < 1
    spec = ViewSpec(
        dataset.input_size,
        args.batch_size or (labels.spec.batch_size if labels else 16),
        args.min_scale or (labels.spec.min_scale if crops_stored else 0.08),
        mix=args.hard_mix,
    )
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
        "lr": lr if args.lr is None else args.lr,
        "eta": eta if args.eta is None else args.eta,
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


class EpochRunner:
    """Trains single epochs of a plan, each with the kind, rate and labels that it is to have.

    Attributes:
        plan, trainer, source: what is trained on what.
        pool: the pool of label batches.
        pool_before: its state before the current epoch; part of a checkpoint.
        batches: batches per epoch over all ranks, as many on each.
    """

    def __init__(self, plan: Plan, trainer: engine.Trainer, source):
        self.plan, self.trainer, self.source = plan, trainer, source
        device = plan.machine.device
        self.labels = plan.labels.to(device) if plan.labels else None
        self.hard_labels = plan.folder.labels.to(device)
        self.pool = schedule.BatchPool(len(plan.batch_numbers), plan.settings["seed"])
        self.pool_before = self.pool.state
        world = plan.machine.world
        self.batches = math.ceil(len(plan.folder.files) / plan.spec.batch_size / world) * world
        self.image_logits = engine.static_labels(self.labels) if "static" in plan.kinds else None

    def learning_rate(self, epoch: int) -> float:
        """The rate of an epoch."""
        settings = self.plan.settings
        return schedule.learning_rate(epoch, len(self.plan.kinds), settings["lr"], settings["eta"])

    def run(self, epoch: int) -> engine.EpochResult:
        """Trains epoch `epoch`, counted from 0; epochs must follow one another."""
        plan, settings, trainer = self.plan, self.plan.settings, self.trainer
        kind, switches = plan.kinds[epoch], epoch > 0 and plan.kinds[epoch] != plan.kinds[epoch - 1]
        self.pool_before = self.pool.state
        for group in trainer.optimizer.param_groups:
            group["lr"] = self.learning_rate(epoch)
        if switches and settings.get("reset_optimizer") and trainer.continued is None:
            engine.forget(trainer.optimizer)
        first = settings["temperature"]
        last = settings.get("temperature_end", first)
        temperature = schedule.temperature(epoch, len(plan.kinds), first, last)
        soft = (temperature, settings["soft_loss_scale"])
        smoothing = settings["label_smoothing"]
        if kind in ("soft", "joint"):
            if epoch == 0 or switches:
                self.pool.refill()
            taken = self._share(self.pool.take(self.batches))
            numbers = [plan.batch_numbers[place] for place in taken]
            stored = (trainer, self.source, self.labels, numbers)
            if kind == "soft":
                return engine.train_soft_epoch(*stored, *soft)
            return engine.train_joint_epoch(*stored, *soft, smoothing, settings["hard_share"])
        views = draw(plan.spec, plan.sizes, settings["seed"], epoch + 1).to(plan.machine.device)
        fresh = (trainer, self.source, self._share(list(views)))
        if kind == "hard":
            return engine.train_hard_epoch(*fresh, self.hard_labels, smoothing)
        return engine.train_static_epoch(*fresh, self.labels, self.image_logits, *soft)

    def _share(self, batches: list) -> list:
        """This rank's batches of an epoch; the first ones again where they do not divide evenly."""
        machine = self.plan.machine
        return list(
            itertools.islice(itertools.cycle(batches), machine.rank, self.batches, machine.world)
        )

    def label_bytes(self) -> int:
        """Bytes on disk of the labels that the run uses."""
        if self.labels is None or {*self.plan.kinds} == {"hard"}:
            return 0
        return self.labels.bytes_on_disk(self.plan.settings["passes"])


def build_student(plan: Plan) -> tuple[nn.Module, torch.optim.AdamW]:
    """The student with fresh weights of the run's seed, and its optimiser."""
    settings = plan.settings
    torch.manual_seed(settings["seed"])
    try:
        model = models.build(settings["model"], plan.dataset.num_classes, plan.dataset.input_size)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    # Convolutions are faster with channels last, on GPUs in mixed precision and on CPUs.
    model.to(plan.machine.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        engine.parameter_groups(model, settings["weight_decay"]),
        lr=settings["lr"],
        fused=True,
    )
    return model, optimizer


def distributed(model: nn.Module) -> nn.Module:
    """DistributedDataParallel that leaves running statistics to each rank until the epoch ends."""
    kind = nn.parallel.DistributedDataParallel
    # Newer versions of torch call the argument by its second name, and warn about the first.
    names = [*inspect.signature(kind).parameters]
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return kind(model, **{name: False})


@dataclasses.dataclass
class Reached:
    """What a run has reached; part of its checkpoint.

    Attributes:
        epochs: epochs done.
        seconds: wall time spent, over all starts.
        best, last: {"epoch", "top1", "top5"} of the best and the latest evaluation.
        trained: the log line of an epoch that is trained but not evaluated yet, or None.
    """

    epochs: int = 0
    seconds: float = 0.0
    best: dict | None = None
    last: dict | None = None
    trained: dict | None = None


class Session:
    """A run under way: the student, what trains it and how far it has come.

    Every rank has one; the first alone writes to the run folder.

    Attributes:
        reached: how far it has come.
        noted: returns the signal that asks the program to end, or None; see `train`.
    """

    def __init__(
        self, plan: Plan, run: runlog.RunFolder, workers: int, compiled: bool, val_cache: str
    ):
        """Builds the student and restores the run's checkpoint, if there is one.

        Args:
            plan, run: what is trained, and where it is recorded.
            workers: processes that decode images.
            compiled: whether the student is compiled.
            val_cache: where decoded validation images are kept.
        """
        self.plan, self.run = plan, run
        self.noted: Callable[[], int | None] = lambda: None
        self.machine, device = plan.machine, plan.machine.device
        self.model, self.optimizer = build_student(plan)
        self.scaler = self.machine.scaler()
        self.reached, continued = Reached(), None
        if self.machine.rank > 0:  # dropout of its own on every rank
            torch.manual_seed(plan.settings["seed"] + self.machine.rank)
        saved = run.checkpoint()
        if saved:
            continued = self._restore(saved)
        runtime.check_outputs(self.model, plan.dataset, device, f"--model {plan.settings['model']}")
        self.source = images.open_images(plan.folder, plan.sizes, plan.dataset, device, workers)
        self.validation = evaluation.load(plan.validation, plan.dataset, device, val_cache)
        accumulated = plan.settings["grad_accum"]
        shared = self.model
        if compiled:
            shared = engine.compiled(self.model, self.machine, accumulated)
        if self.machine.world > 1:
            shared = distributed(shared)
            if saved:  # making it has given every rank the buffers of the first
                self.model.load_state_dict(
                    saved["ranks"][plan.machine.rank]["buffers"], strict=False
                )
        views, epochs = len(plan.folder.files), len(plan.kinds)
        done = self.reached.epochs * views
        self.bar = cli.progress(desc="train", unit="view", total=epochs * views, initial=done)
        self.trainer = engine.Trainer(
            *(shared, self.optimizer, self.scaler, self.machine, accumulated, self.bar.update),
            *(self._after_step, continued),
        )
        self.epochs = EpochRunner(plan, self.trainer, self.source)
        if saved:
            self.epochs.pool.state = saved["pool"]
        self.saved_at = self.started = self.agreed_at = time.monotonic()
        self.agree_every = self.steps_to_agree = 1

    def _restore(self, saved: dict) -> engine.EpochSums | None:
        """Takes over a checkpoint; returns where it left an epoch, if it is from within one."""
        device = self.machine.device
        if "ranks" not in saved:
            raise UserError(
                f"{self.run.path}: its checkpoint is of an earlier version of this code; choose "
                "another --output-dir"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.reached = Reached(**saved["reached"])
        own = saved["ranks"][self.machine.rank]
        torch.set_rng_state(own["rng"]["cpu"])
        if device.type == "cuda" and own["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(own["rng"]["cuda"], device)
        where = f"after epoch {self.reached.epochs} of {len(self.plan.kinds)}"
        if own["sums"] is None:
            print(f"{self.run.path}: continuing {where}")
            return None
        sums = engine.EpochSums(**own["sums"])
        sums.loss, sums.correct = sums.loss.to(device), sums.correct.to(device)
        print(f"{self.run.path}: continuing {sums.step} batches {where}")
        return sums

    def save(self, sums: engine.EpochSums | None = None) -> None:
        """Writes the checkpoint; `sums` when an epoch is under way."""
        device, self.saved_at = self.machine.device, time.monotonic()
        own = {
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
            "buffers": {},
            "sums": None,
        }
        if sums is not None:
            sums.seconds = time.monotonic() - self.started
            own["sums"] = {**vars(sums), "loss": sums.loss.cpu(), "correct": sums.correct.cpu()}
            own["buffers"] = {name: value.cpu() for name, value in self.model.named_buffers()}
        ranks = self.machine.gather(own)
        if self.machine.rank == 0:
            state = {
                **describe_network(self.plan),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "pool": self.epochs.pool.state if sums is None else self.epochs.pool_before,
                "reached": dataclasses.asdict(self.reached),
                "ranks": ranks,
            }
            self.run.save(runlog.CHECKPOINT, state)

    def _after_step(self, sums: engine.EpochSums) -> None:
        """Within an epoch, saves from time to time, and when a signal asks the program to end."""
        machine, signal = self.machine, self.noted()
        due = time.monotonic() - self.saved_at > _CHECKPOINT_SECONDS
        if machine.world > 1:
            self.steps_to_agree -= 1
            if self.steps_to_agree > 0:
                return
            now = time.monotonic()
            answers = machine.gather((signal, due, now - self.agreed_at))
            found, (due, *_), (seconds, *_) = zip(*answers, strict=True)
            signal = next(filter(None, found), None)
            # The next time in about a second, by the steps that rank 0 has made meanwhile.
            self.agree_every = max(1, min(64, int(self.agree_every / max(seconds, 0.01))))
            self.agreed_at, self.steps_to_agree = now, self.agree_every
        if due or signal:
            self._check_finite(machine.total(sums.loss.clone()).item())
            self.save(sums)
        if signal:
            cli.act_on(signal)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            epoch = self.reached.epochs
            raise UserError(
                f"the loss became {loss} in epoch {epoch + 1} ({self.plan.kinds[epoch]} labels); "
                f"the last good checkpoint is kept in {self.run.path}; try a lower --lr or "
                "--amp off"
            )

    def train_epoch(self) -> None:
        """Trains the next epoch, evaluates when it is time, logs, and saves."""
        plan, epoch = self.plan, self.reached.epochs
        if self.reached.trained is None:
            self.reached.trained = self._train(epoch)
        else:
            self.started = time.monotonic() - self.reached.trained["seconds"]
        line = self.reached.trained
        ends = epoch + 1 == len(plan.kinds)
        evaluated = ends or (epoch + 1) % plan.settings["eval_every"] == 0
        if evaluated:
            line |= self._evaluate(epoch + 1)
        self.reached.epochs, self.reached.trained = epoch + 1, None
        self.reached.seconds += time.monotonic() - self.started
        if self.machine.rank == 0:
            self.run.log(line)
        self.bar.n = self.reached.epochs * len(plan.folder.files)
        last = self.reached.last
        self.bar.set_postfix_str(
            f"epoch {epoch + 1}/{len(plan.kinds)} {line['kind']} loss {line['loss']:.4g} "
            + (f"top-1 {last['top1']:.2f} %" if last else "not evaluated yet"),
            refresh=False,
        )
        due = self.machine.from_first(time.monotonic() - self.saved_at > _CHECKPOINT_SECONDS)
        signal = next(filter(None, self.machine.gather(self.noted())), None)
        if evaluated or due or signal:
            self.save()
        if signal and not ends:
            cli.act_on(signal)

    def _train(self, epoch: int) -> dict:
        """Trains an epoch; returns its line of the log."""
        plan = self.plan
        before = self.trainer.continued.seconds if self.trainer.continued else 0.0
        self.started = time.monotonic() - before
        kind, lr = plan.kinds[epoch], self.epochs.learning_rate(epoch)
        result = self.epochs.run(epoch)
        self._check_finite(result.loss)
        trained = time.monotonic() - self.started
        return {
            "epoch": epoch + 1,
            "kind": kind,
            "lr": lr,
            "loss": result.loss,
            "train_top1": result.top1,
            "train_top5": result.top5,
            "seconds": round(trained, 3),
            "images_per_second": round(result.views / trained, 1),
        }

    def _watched(self, starts: Sequence[int]) -> Iterator[int]:
        """The batches of an evaluation with a bar; a signal saves the trained epoch and ends."""
        for start in cli.progress(starts, desc="evaluate", leave=False, delay=2):
            # Several ranks, which have no common moment here, finish their shares first.
            if self.machine.world == 1 and (signal := self.noted()):
                self.save()
                cli.act_on(signal)
            yield start

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Evaluates, keeps the best weights, and returns what the log gets."""
        top1, top5 = engine.evaluate(
            *(self.model, self.validation, self.plan.validation.labels),
            *(self.source.mean, self.source.std, self.machine),
            self._watched,
        )
        self.reached.last = {"epoch": epoch, "top1": top1, "top5": top5}
        if self.reached.best is None or top1 > self.reached.best["top1"]:
            self.reached.best = self.reached.last
            if self.machine.rank == 0:
                weights = {"model": self.model.state_dict()}
                self.run.save(
                    runlog.BEST, {**describe_network(self.plan), **self.reached.best, **weights}
                )
        return {"val_top1": top1, "val_top5": top5}

    def result(self) -> dict:
        """What a finished run records."""
        settings, device = self.plan.settings, self.machine.device
        return {
            "dataset": self.plan.dataset.name,
            "model": settings["model"],
            "best": self.reached.best,
            "last": self.reached.last,
            "epochs": self.reached.epochs,
            "phases": settings["phases"],
            "seed": settings["seed"],
            "label_bytes": self.epochs.label_bytes(),
            "seconds": round(self.reached.seconds, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }


def train(
    plan: Plan, run: runlog.RunFolder, workers: int, compiled: bool, val_cache: str = "auto"
) -> None:
    """Trains from the run's checkpoint, or from scratch, to the end of the schedule.

    SIGTERM and Ctrl-C end it after the optimiser step under way, with a checkpoint written.
    """
    if plan.machine.world > 1:
        accumulated = plan.machine.world * plan.settings["grad_accum"]
        print(
            f"{plan.machine.world} processes: an optimiser step takes {accumulated} batches of "
            f"{plan.spec.batch_size} = {accumulated * plan.spec.batch_size} views"
        )
    if run.started and not run.has_checkpoint:
        print(f"{run.path}: stopped before its first checkpoint; starting over")
    session = Session(plan, run, workers, compiled, val_cache)
    if plan.machine.rank == 0:
        run.begin(session.reached.epochs)
    with cli.delayed_signals() as session.noted:
        while session.reached.epochs < len(plan.kinds):
            session.train_epoch()
    session.bar.close()
    if plan.machine.rank == 0:
        run.finish(session.result())
        print(f"{run.path}: {describe_result(session.result())}")


def describe_network(plan: Plan) -> dict:
    """What evaluate.py needs beside the weights; plain types, part of every checkpoint."""
    return {
        "format": "hald-student",
        "network": plan.settings["model"],
        "dataset": {**vars(plan.dataset)},
        "classes": plan.folder.classes,
        "precision": plan.machine.precision,
    }


def describe_result(result: dict) -> str:
    """One line: best and last top-1, label bytes, seconds."""
    best, last = result["best"], result["last"]
    return (
        f"top-1 best {best['top1']:.2f} % (epoch {best['epoch']}), last {last['top1']:.2f} %; "
        f"{result['label_bytes']:,} label bytes, {result['seconds']:.0f} s"
    )


def main() -> None:
    args = parse_arguments()
    plan = make_plan(args)
    others = {name: str(value) for name, value in vars(args).items() if name not in plan.settings}
    run = runlog.RunFolder(args.output_dir, plan.settings, others)
    run.openers = loggers.from_arguments(args)
    if run.started and args.resume == "off":
        raise UserError(f"{args.output_dir} holds a run already; --resume auto continues it")
    if result := run.result():
        print(f"{args.output_dir} is done: {describe_result(result)}")
        return
    with run.locked() if plan.machine.rank == 0 else contextlib.nullcontext():
        train(plan, run, args.workers, args.compile, args.val_cache)


if __name__ == "__main__":
    cli.run(main)
