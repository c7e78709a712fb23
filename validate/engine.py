"""One epoch of each kind (soft, hard, joint, static), one evaluation: straight-line loops.

Sums are kept on the device and read once per epoch: nothing in a loop waits for the GPU.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from utils.data.images import send
from utils.data.views import Views, normalise
from utils.labels import LabelSet
from utils.metrics import correct_top1_top5
from utils.runtime import Runtime

EVALUATION_BATCH = 256


class Truth(NamedTuple):
    """What the views of a batch show: int64 [B] classes, float32 [B] share of the own one."""

    own: torch.Tensor
    partner: torch.Tensor
    lam: torch.Tensor


@dataclasses.dataclass
class EpochSums:
    """What an epoch under way has added up on this rank; with it, the epoch can be continued.

    Attributes:
        step: batches done.
        views: views seen.
        loss: float32 [], sum over the views.
        correct: int64 [2], views whose class was in the top 1 and top 5.
        seconds: time spent, set when it is saved.
    """

    step: int
    views: int
    loss: torch.Tensor
    correct: torch.Tensor
    seconds: float = 0.0

    @classmethod
    def zero(cls, device: torch.device) -> "EpochSums":
        """The beginning of an epoch."""
        return cls(0, 0, torch.zeros((), device=device), torch.zeros(2, device=device).long())


@dataclasses.dataclass
class Trainer:
    """A student and what updates it.

    Attributes:
        model: the student; under torchrun in DistributedDataParallel.
        optimizer: AdamW over `parameter_groups`.
        scaler: loss scaling; inactive except in fp16.
        runtime: device and precision.
        grad_accum: batches per optimiser step.
        progress: called with the number of views after each batch.
        after_step: called after each optimiser step; may raise to end the epoch there.
        continued: where the next epoch was left, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    runtime: Runtime
    grad_accum: int
    progress: Callable[[int], object]
    after_step: Callable[[EpochSums], object] = lambda sums: None
    continued: EpochSums | None = None


@dataclasses.dataclass
class EpochResult:
    """Means over an epoch's views: loss, and top-1 and top-5 in percent.

    A view counts as correct when the prediction is the class that covers most of it. A soft epoch
    may have a few views more or less than there are images, as its batches come from the pool.
    """

    views: int
    loss: float
    top1: float
    top5: float


def compiled(model: nn.Module, runtime: Runtime, grad_accum: int) -> nn.Module:
    """The same network compiled, for training on batches of one size (and a last smaller one).

    On a GPU, forward and backward pass then are one CUDA graph each, where nothing keeps gradients
    from one batch to the next: small batches are bound by the launches of single kernels.
    """
    graphs = runtime.device.type == "cuda" and grad_accum == 1 and runtime.world == 1
    return torch.compile(model, mode="reduce-overhead" if graphs else None, dynamic=False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on tensors with more than one dimension, none on biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def soft_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, scale: str
) -> torch.Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), mean over the batch.

    Args:
        student, teacher: float32 [B, C] logits.
        temperature: T.
        scale: "none" as published, or "T2": times T^2 (Hinton et al., arXiv 1503.02531), which
            keeps gradients as large as those of hard labels.
    """
    loss = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return loss * temperature**2 if scale == "T2" else loss


def hard_loss(
    logits: torch.Tensor,
    own: torch.Tensor,
    partner: torch.Tensor,
    lam: torch.Tensor,
    smoothing: float,
) -> torch.Tensor:
    """Cross-entropy with label smoothing against both classes of each view, weighted by lambda.

    Args:
        logits: float32 [B, C].
        own, partner: int64 [B], the two classes in each view.
        lam: float32 [B], the share of the own image.
        smoothing: s; the target is 1 - s + s / C for the class and s / C elsewhere.
    """
    per_view = [
        F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
        for target in (own, partner)
    ]
    return (lam * per_view[0] + (1 - lam) * per_view[1]).mean()


def train_soft_epoch(
    trainer: Trainer,
    source,
    labels: LabelSet,
    batch_numbers: list[int],
    temperature: float,
    scale: str,
) -> EpochResult:
    """Trains on stored label batches: their views are rendered again, their labels expanded."""
    batches = [labels.views(number) for number in batch_numbers]

    def losses(logits: torch.Tensor, step: int, truth: Truth) -> torch.Tensor:
        return soft_loss(logits, labels[batch_numbers[step]].logits, temperature, scale)

    return _train(trainer, source, batches, labels.hard_labels, losses)


def train_hard_epoch(
    trainer: Trainer, source, batches: list[Views], hard_labels: torch.Tensor, smoothing: float
) -> EpochResult:
    """Trains on fresh views with the classes of their images."""

    def losses(logits: torch.Tensor, step: int, truth: Truth) -> torch.Tensor:
        return hard_loss(logits, *truth, smoothing)

    return _train(trainer, source, batches, hard_labels, losses)


def train_joint_epoch(
    trainer: Trainer,
    source,
    labels: LabelSet,
    batch_numbers: list[int],
    temperature: float,
    scale: str,
    smoothing: float,
    hard_share: float,
) -> EpochResult:
    """Trains on stored label batches with hard_share * hard loss + (1 - hard_share) * soft loss."""
    batches = [labels.views(number) for number in batch_numbers]

    def losses(logits: torch.Tensor, step: int, truth: Truth) -> torch.Tensor:
        hard = hard_loss(logits, *truth, smoothing)
        soft = soft_loss(logits, labels[batch_numbers[step]].logits, temperature, scale)
        return hard_share * hard + (1 - hard_share) * soft

    return _train(trainer, source, batches, labels.hard_labels, losses)


def train_static_epoch(
    trainer: Trainer,
    source,
    batches: list[Views],
    labels: LabelSet,
    image_logits: torch.Tensor,
    temperature: float,
    scale: str,
) -> EpochResult:
    """Trains on fresh views with one soft label per image (arXiv 2406.10485).

    Args:
        batches: as for a hard epoch.
        labels: the label set that image_logits came from.
        image_logits: float32 [images, C], see `static_labels`.
        temperature, scale: see `soft_loss`.
    """

    def losses(logits: torch.Tensor, step: int, truth: Truth) -> torch.Tensor:
        teacher = image_logits[batches[step].index]
        if (partner := batches[step].partner()) is not None:
            teacher = mixed_logits(teacher, teacher[partner], truth.lam, temperature)
        return soft_loss(logits, teacher, temperature, scale)

    return _train(trainer, source, batches, labels.hard_labels, losses)


def static_labels(labels: LabelSet) -> torch.Tensor:
    """float32 [images, C]: the mean over the passes of each image's logits."""
    images, classes = labels.manifest["images"]["count"], labels.manifest["num_classes"]
    total = torch.zeros(images, classes, device=labels.device)
    for number in range(len(labels)):
        total.index_add_(0, labels.views(number).index, labels[number].logits)
    return total / labels.passes


def mixed_logits(
    own: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Logits whose probabilities at T are lam * those of `own` + (1 - lam) * those of `partner`.

    Args:
        own, partner: float32 [B, C].
        lam: float32 [B].
        temperature: T.
    """
    shares = torch.stack([lam, 1 - lam]).log()[:, :, None]
    log_probabilities = torch.log_softmax(torch.stack([own, partner]) / temperature, dim=2)
    return temperature * torch.logsumexp(shares + log_probabilities, dim=0)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Sets the optimiser's moments and step counts to zero, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def _train(
    trainer: Trainer,
    source,
    batches: list[Views],
    hard_labels: torch.Tensor,
    losses: Callable[[torch.Tensor, int, Truth], torch.Tensor],
) -> EpochResult:
    """The loop of an epoch; `losses(logits, step, truth)` gives the mean loss of batch `step`.

    Under torchrun every rank has as many batches; gradients are averaged over the ranks at each
    optimiser step, running statistics at the end.
    """
    trainer.model.train()
    runtime = trainer.runtime
    sums = trainer.continued or EpochSums.zero(runtime.device)
    trainer.continued = None
    for step, pixels in enumerate(source.render(batches[sums.step :]), start=sums.step):
        truth = Truth(*batches[step].mixture(hard_labels, source.size))
        updates = (step + 1) % trainer.grad_accum == 0 or step + 1 == len(batches)
        unshared = runtime.world > 1 and not updates
        with trainer.model.no_sync() if unshared else contextlib.nullcontext():
            with runtime.autocast():
                logits = trainer.model(pixels)
            logits = logits.float()
            loss = losses(logits, step, truth)
            # A last group that is smaller than grad_accum averages over the batches it has.
            group_start = step - step % trainer.grad_accum
            group = min(trainer.grad_accum, len(batches) - group_start)
            trainer.scaler.scale(loss / group).backward()
        if updates:
            trainer.scaler.step(trainer.optimizer)
            trainer.scaler.update()
            trainer.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            mainly = torch.where(truth.lam >= 0.5, truth.own, truth.partner)
            sums.correct += correct_top1_top5(logits, mainly)
            sums.loss += loss.detach() * len(pixels)
        sums.step = step + 1
        sums.views += len(pixels)
        trainer.progress(len(pixels) * runtime.world)
        if updates:
            trainer.after_step(sums)
    runtime.average_buffers(trainer.model)
    views = torch.tensor([sums.views], device=runtime.device)
    totals = runtime.total(torch.cat([sums.loss.double()[None], sums.correct.double(), views]))
    loss, *correct, seen = totals.tolist()
    top1, top5 = (100 * count / seen for count in correct)
    return EpochResult(int(seen), loss / seen, top1, top5)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    pixels: torch.Tensor,
    targets: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    runtime: Runtime,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent; under torchrun the ranks share the batches.

    Args:
        model: the network, on runtime.device.
        pixels: uint8 [N, 3, S, S], see utils.data.evaluation.load.
        targets: int64 [N].
        mean, std: float32 [3] on runtime.device.
        runtime: device and precision.
        progress: wraps the sequence of batch starts, to show a bar.
    """
    model.eval()
    targets = targets.to(runtime.device)
    correct = torch.zeros(2, dtype=torch.int64, device=runtime.device)
    starts = range(0, len(pixels), EVALUATION_BATCH)
    for start in progress(starts[runtime.rank :: runtime.world]):
        rows = slice(start, start + EVALUATION_BATCH)
        images = send(pixels[rows], runtime.device).float()
        with runtime.autocast():
            logits = model(normalise(images, mean, std))
        correct += correct_top1_top5(logits.float(), targets[rows])
    top1, top5 = (100 * count / len(pixels) for count in runtime.total(correct).tolist())
    return top1, top5
