"""One optimiser step on batches of tensors: forward, loss, backward, update, sums of the epoch."""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from utils.metrics import correct_top1_top5
from utils.runtime import Runtime
from validate.kinds import Batch

OPTIMIZERS = ("adamw", "sgd")


class Step:
    """Calling it with the batches of a step makes the step; nothing in it waits for the GPU.

    Attributes:
        loss_sum: float32 [], over the views of the epoch.
        correct: int64 [2], views whose main class was in the top 1 and top 5.
        views: views of the epoch so far on this rank.
        steps: optimiser steps so far, over all epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        machine: Runtime,
    ):
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.machine, self.steps = machine, 0
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Sets the sums to zero."""
        device = self.machine.device
        self.loss_sum = torch.zeros((), device=device)
        self.correct = torch.zeros(2, dtype=torch.int64, device=device)
        self.views = 0

    def __call__(
        self,
        batches: Sequence[Batch],
        loss_of: Callable[[torch.Tensor, Batch], torch.Tensor],
    ) -> None:
        """Averages the gradients of the batches, over torchrun's ranks too, and updates once.

        Args:
            batches: one, or as many as gradients are accumulated over.
            loss_of: the mean loss of a batch, given float32 [B, C] logits and the batch.
        """
        for position, batch in enumerate(batches, start=1):
            shared = self.machine.world == 1 or position == len(batches)
            with contextlib.nullcontext() if shared else self.model.no_sync():
                with self.machine.autocast():
                    logits = self.model(batch.pixels)
                logits = logits.float()
                loss = loss_of(logits, batch)
                self.scaler.scale(loss / len(batches)).backward()
            with torch.no_grad():
                self.correct += correct_top1_top5(logits, batch.mixture.main_class())
                self.loss_sum += loss.detach() * len(batch.pixels)
            self.views += len(batch.pixels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Loss, and top-1 and top-5 (%), over the epoch's views on all ranks: its only read-back.

        A view counts as correct when the prediction is the class that covers most of it.
        """
        views = torch.tensor([self.views], device=self.machine.device)
        sums = torch.cat([self.loss_sum.double()[None], self.correct.double(), views])
        loss, top1, top5, seen = self.machine.total(sums).tolist()
        means = {"loss": loss, "train_top1": 100 * top1, "train_top5": 100 * top5}
        return {name: value / seen for name, value in means.items()}


def make_optimizer(
    kind: str, model: nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser of OPTIMIZERS, which updates all parameters in one kernel."""
    groups = parameter_groups(model, weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on tensors with more than one dimension, none on biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Sets the optimiser's moments and step counts to zero, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def compiled(model: nn.Module, machine: Runtime, grad_accum: int) -> nn.Module:
    """The same network compiled, for training on batches of one size (and a last smaller one).

    On a GPU, forward and backward pass then are one CUDA graph each, where nothing keeps gradients
    from one batch to the next: small batches are bound by the launches of single kernels.
    """
    graphs = machine.device.type == "cuda" and grad_accum == 1 and machine.world == 1
    return torch.compile(model, mode="reduce-overhead" if graphs else None, dynamic=False)
