"""A training run under way: its student, the epochs of its plan one by one, its checkpoints."""

import dataclasses
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import models
from utils import cli, runlog, runtime
from utils.cli import UserError
from utils.data import evaluation, images
from utils.data.views import draw
from validate import engine, schedule
from validate.plan import Plan

_CHECKPOINT_SECONDS = 60


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


def describe_network(plan: Plan) -> dict:
    """What evaluate.py needs beside the weights; plain types, part of every checkpoint."""
    return {
        "format": "hald-student",
        "network": plan.settings["model"],
        "dataset": {**vars(plan.dataset)},
        "classes": plan.folder.classes,
        "precision": plan.machine.precision,
    }


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
        noted: returns the signal that asks the program to end, or None; see
            utils.cli.delayed_signals.
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
