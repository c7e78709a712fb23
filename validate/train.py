"""Trains a student on stored soft labels and on hard labels, by a schedule that alternates them.

python validate/train.py --data-dir D --label-dir L --val-dir V --output-dir O
    --dataset imagenet1k --model ResNet18
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import itertools
import math
import time
from collections.abc import Iterator

import torch

import models
from utils import cli, loggers, runlog, runtime
from utils.cli import UserError
from utils.data import datasets, evaluation, folders, images
from utils.files import lock, save_tensors
from utils.runlog import RunFolder
from utils.runtime import Runtime
from validate import evaluate, schedule, step
from validate.kinds import KINDS, Batch, Kind, TrainingData, colours
from validate.settings import Materials, Settings, parse_arguments, resolve

_CHECKPOINT_SECONDS = 60  # between checkpoints after epochs that are not evaluated
_STEPS_TO_AGREE = 8  # between the moments at which ranks ask each other for a signal


def main() -> None:
    args = parse_arguments()
    dataset = datasets.from_arguments(args, inferred=True)
    machine = runtime.start(args.device, args.amp)
    print(runtime.describe(machine))
    materials = Materials.open(dataset, args.data_dir, args.val_dir, args.label_dir)
    folder, validation = materials.folder, materials.validation
    training_on = f"training on {len(folder.files)} images of {folder.root}"
    print(f"{training_on}, validating on {len(validation.files)} of {validation.root}")
    if args.val_dir.resolve() == args.data_dir.resolve():
        print("--val-dir is --data-dir: top-1 is that on the training images")
    settings = resolve(args, materials, machine)
    if folders.selection_source(folder.root) == settings.validation_images:
        print(f"{folder.root} was selected from --val-dir: top-1 counts images trained on, too")
    run = RunFolder(args.output_dir, loggers.from_arguments(args))
    if recorded := run.settings():
        settings.check_continues(Settings.from_record(recorded, run.path), run.path)
        if args.resume == "off":
            raise UserError(f"{run.path} holds a run already; --resume auto continues it")
    if result := run.result():
        print(f"{run.path} is done: {runlog.describe(result)}")
        if (run.path / runlog.CURVES).exists():
            return
    with lock(run.path, "training in") if machine.rank == 0 else contextlib.nullcontext():
        result = result or train(settings, materials, machine, run)
        if machine.rank == 0:
            run.draw_curves(result, colours())


class Training:
    """A run in memory: the student, what updates it, and what its epochs are made of."""

    def __init__(self, settings: Settings, materials: Materials, machine: Runtime):
        self.settings, self.machine = settings, machine
        facts, device = settings.facts, machine.device
        torch.manual_seed(settings.seed)
        try:
            student = models.build(settings.model, settings.num_classes, settings.input_size)
        except ValueError as error:
            raise UserError(f"--model: {error}") from None
        # Convolutions are faster with channels last, on GPUs in mixed precision and on CPUs.
        self.student = student.to(device, memory_format=torch.channels_last)
        kinds = {name: KINDS[name] for name in {*settings.kinds}}
        stored, fresh = settings.batch_size, settings.hard_batch_size
        sizes = {stored if kind.draws_from_pool else fresh for kind in kinds.values()}
        last = min(len(materials.sizes) % size or size for size in sizes)
        what = f"--model {settings.model}"
        runtime.check_outputs(student, facts, device, what)
        runtime.check_trains(student, facts, device, last, what)
        self.lr = torch.zeros((), device=device)  # filled, never replaced
        decay = settings.weight_decay
        self.optimizer = step.make_optimizer(settings.optimizer, student, self.lr, decay)
        if machine.rank > 0:  # dropout of its own on every rank
            torch.manual_seed(settings.seed + machine.rank)
        source = images.open_images(
            materials.folder, materials.sizes, facts, device, settings.workers
        )
        self.data = TrainingData(settings, materials, source, machine)
        self.kinds = {name: kind(self.data) for name, kind in kinds.items()}
        model = torch.compile(student, dynamic=False) if settings.compile else student
        alone = machine.world == 1 and settings.grad_accum == 1
        graphs = settings.graph and alone and device.type == "cuda"
        self.step = step.Step(machine.shared(model), self.optimizer, machine, graphs)

    def begin_epoch(self, epoch: int) -> Kind:
        """Sets what changes with the epoch, counted from 0; returns its kind."""
        settings, kinds = self.settings, self.settings.kinds
        self.lr.fill_(schedule.learning_rate(epoch, len(kinds), settings.lr, settings.eta))
        if settings.reset_optimizer and epoch > 0 and kinds[epoch] != kinds[epoch - 1]:
            step.forget(self.optimizer)
        self.data.begin_epoch(epoch)
        self.step.begin_epoch()
        self.step.model.train()
        return self.kinds[kinds[epoch]]

    def batches(self, kind: Kind, epoch: int) -> Iterator[list[Batch]]:
        """The batches of an epoch, as many at a time as an optimiser step takes."""
        batches = kind.batches(epoch)
        while together := list(itertools.islice(batches, self.settings.grad_accum)):
            yield together

    def state(self) -> dict:
        """What a checkpoint holds of it; all ranks must ask for it together."""
        return {
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "random_states": self.machine.gather(self.machine.random_state()),
        }

    def restore(self, saved: dict) -> None:
        """Takes over what `state` gave."""
        self.student.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # which that has replaced; its value is that of the epoch
        self.step.scaler.load_state_dict(saved["scaler"])
        self.machine.set_random_state(saved["random_states"][self.machine.rank])


def train(settings: Settings, materials: Materials, machine: Runtime, run: RunFolder) -> dict:
    """Trains from the run's checkpoint, or from scratch, to the end; returns the result.

    Signals end the program after a step; what follows the last checkpoint is trained again later.
    """
    epochs, views_per_epoch = len(settings.kinds), len(materials.folder.files)
    if machine.world > 1:
        together = machine.world * settings.grad_accum
        views = f"batches of {settings.batch_size} = {together * settings.batch_size} views"
        print(f"{machine.world} processes: an optimiser step takes {together} {views}")
    training = Training(settings, materials, machine)
    student = training.student
    if machine.device.type == "cuda":
        graphs = training.step.graphs is not None
        print("a training step is " + ("one CUDA graph" if graphs else "launched kernel by kernel"))
    facts, targets = settings.facts, materials.validation.labels
    pixels = evaluation.load(materials.validation, facts, machine.device, settings.val_cache)
    reached = {"epochs": 0, "seconds": 0.0, "best": None, "last": None}
    if saved := run.checkpoint():
        reached = saved["reached"]
        training.restore(saved)
        print(f"{run.path}: continuing after epoch {reached['epochs']} of {epochs}")
    elif run.settings():
        print(f"{run.path}: stopped before its first checkpoint; starting over")
    first = checkpointed = reached["epochs"]
    saved_at = -math.inf
    network = {  # with the weights, what evaluate.py needs
        "format": "hald-student",
        "network": settings.model,
        "dataset": vars(facts),
        "classes": materials.folder.classes,
        "precision": machine.precision,
    }
    if machine.rank == 0:
        run.begin(vars(settings), first)
    total, initial = epochs * views_per_epoch, first * views_per_epoch
    bar = cli.progress(desc="train", unit="view", total=total, initial=initial)
    with bar, cli.delayed_signals() as noted_signal:

        def end_if_asked() -> None:
            signal = noted_signal()
            if machine.world > 1:  # all ranks end after the same step: none may wait for another
                if training.step.steps % _STEPS_TO_AGREE:
                    return
                signal = next(filter(None, machine.gather(signal)), None)
            if signal:
                cli.end_by_signal(signal, f"from epoch {checkpointed + 1} of {epochs}")

        for epoch in range(first, epochs):
            started = time.monotonic()
            kind = training.begin_epoch(epoch)
            for batches in training.batches(kind, epoch):
                training.step(batches, kind.loss)
                bar.update(sum(len(batch.pixels) for batch in batches) * machine.world)
                end_if_asked()
            machine.average_buffers(student)
            means = training.step.means()
            trained = time.monotonic() - started
            if not math.isfinite(means["loss"]):
                what = f"the loss became {means['loss']} in epoch {epoch + 1} ({kind.name} labels)"
                kept = f"{run.path} keeps epoch {checkpointed}"
                raise UserError(f"{what}; {kept}; try a lower --lr or --amp off")
            line = {
                "epoch": epoch + 1,
                "kind": kind.name,
                "lr": schedule.learning_rate(epoch, epochs, settings.lr, settings.eta),
                **means,
                "seconds": round(trained, 3),
                "images_per_second": round(training.step.views * machine.world / trained, 1),
            }
            evaluated = epoch + 1 == epochs or (epoch + 1) % settings.eval_every == 0
            if evaluated:
                heed = end_if_asked if machine.world == 1 else None
                top1, top5 = evaluate.accuracy(student, pixels, targets, facts, machine, heed)
                line |= {"val_top1": top1, "val_top5": top5}
                reached["last"] = {"epoch": epoch + 1, "top1": top1, "top5": top5}
                if reached["best"] is None or top1 > reached["best"]["top1"]:
                    reached["best"] = reached["last"]
                    if machine.rank == 0:
                        best = {**network, **reached["best"], "model": student.state_dict()}
                        save_tensors(run.path / runlog.BEST, best)
            reached["epochs"] = epoch + 1
            reached["seconds"] += time.monotonic() - started
            if machine.rank == 0:
                run.log(line)
            due = machine.from_first(time.monotonic() - saved_at > _CHECKPOINT_SECONDS)
            if evaluated or due:
                state = {**network, **training.state(), "reached": reached}
                if machine.rank == 0:
                    save_tensors(run.path / runlog.CHECKPOINT, state)
                checkpointed, saved_at = epoch + 1, time.monotonic()
            bar.n = (epoch + 1) * views_per_epoch
            top1 = f"top-1 {reached['last']['top1']:.2f} %" if reached["last"] else "not evaluated"
            told = f"epoch {epoch + 1}/{epochs} {kind.name} loss {means['loss']:.4g} {top1}"
            bar.set_postfix_str(told, refresh=False)
    reads_labels = any(kind.needs_labels for kind in training.kinds.values())
    result = {
        "dataset": settings.dataset,
        "model": settings.model,
        "best": reached["best"],
        "last": reached["last"],
        "epochs": reached["epochs"],
        "phases": settings.phases,
        "seed": settings.seed,
        "label_bytes": materials.labels.bytes_on_disk(settings.passes) if reads_labels else 0,
        "seconds": round(reached["seconds"], 1),
        "device": runtime.device_name(machine.device),
    }
    if machine.rank == 0:
        run.finish(result)
        print(f"{run.path}: {runlog.describe(result)}")
    return result


if __name__ == "__main__":
    cli.run(main)
