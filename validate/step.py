"""One optimiser step on batches of tensors: forward, loss, backward, update, sums of the epoch.

The same body runs eagerly or, on one GPU, as CUDA graphs that hold all of it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from utils.graphs import Graphs
from utils.metrics import hits
from utils.runtime import Runtime
from validate.kinds import Batch

OPTIMIZERS = ("adamw", "sgd")
Loss = Callable[[torch.Tensor, Batch], torch.Tensor]


class Step:
    """Calling it with the batches of a step makes the step; nothing in it waits for the GPU.

    Attributes:
        loss_sum: float32 [], over the views of the epoch.
        hits: int64 [5], views whose main class had the highest, second highest, ... logit.
        views: views of the epoch so far on this rank.
        steps: optimiser steps so far, over all epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        machine: Runtime,
        graphs: bool = False,
    ):
        """A step of a model on the machine's device, eager or, on a GPU alone, as CUDA graphs."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.machine, self.steps, self.views = machine, 0, 0
        what = "a training step of this network"
        self.graphs = Graphs(machine.device, what) if graphs else None
        self.loss_sum = torch.zeros((), device=machine.device)
        self.hits = torch.zeros(5, dtype=torch.int64, device=machine.device)
        self.norms = [
            norm
            for norm in model.modules()
            if isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.num_batches_tracked is not None
            and norm.momentum is not None
        ]

    def begin_epoch(self) -> None:
        """Sets the sums to zero."""
        self.loss_sum.zero_()
        self.hits.zero_()
        self.views = 0

    def __call__(self, batches: Sequence[Batch], loss_of: Loss) -> None:
        """Averages the gradients of the batches, over torchrun's ranks too, and updates once.

        Args:
            batches: one, or as many as gradients are accumulated over.
            loss_of: the mean loss of a batch, given float32 [B, C] logits and the batch.
        """
        if self.graphs:
            (batch,) = batches
            self.graphs.run(loss_of, lambda *parts: self._update([Batch(*parts)], loss_of), *batch)
        else:
            self._update(batches, loss_of)
        self.views += sum(len(batch.pixels) for batch in batches)
        self.steps += 1

    def _update(self, batches: Sequence[Batch], loss_of: Loss) -> None:
        """The step itself: tensor arithmetic alone, as a CUDA graph holds nothing else."""
        for position, batch in enumerate(batches, start=1):
            shared = self.machine.world == 1 or position == len(batches)
            with contextlib.nullcontext() if shared else self.model.no_sync():
                with self.machine.autocast(), _counting_together(self.norms):
                    logits = self.model(batch.pixels)
                logits = logits.float()
                loss = loss_of(logits, batch)
                share = loss / len(batches) if len(batches) > 1 else loss
                self.scaler.scale(share).backward()
            with torch.no_grad():
                self.hits += hits(logits, batch.mixture.main_class())
                self.loss_sum.add_(loss, alpha=len(batch.pixels))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def means(self) -> dict[str, float]:
        """Loss, and top-1 and top-5 (%), over the epoch's views on all ranks: its only read-back.

        A view counts as correct when the prediction is the class that covers most of it.
        """
        views = self.loss_sum.new_full((1,), self.views, dtype=torch.float64)
        sums = torch.cat([self.loss_sum.double()[None], views, self.hits.double()])
        loss, seen, *correct = self.machine.total(sums).tolist()
        means = {"loss": loss, "train_top1": 100 * correct[0], "train_top5": 100 * sum(correct)}
        return {name: value / seen for name, value in means.items()}


@contextlib.contextmanager
def _counting_together(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Has BatchNorm layers in training count a batch with one kernel, instead of one each."""
    norms = [norm for norm in norms if norm.training]
    counters = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, counter in zip(norms, counters, strict=True):
            norm.num_batches_tracked = counter
    if counters:
        torch._foreach_add_(counters, 1)


def make_optimizer(
    kind: str, model: nn.Module, lr: torch.Tensor, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser of OPTIMIZERS over `parameter_groups`, fused, which a CUDA graph can hold.

    lr, float32 [] on the model's device, is filled when the rate changes, never replaced.
    """
    groups = parameter_groups(model, weight_decay)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=True)


def restore(optimizer: torch.optim.Optimizer, state: dict, lr: torch.Tensor) -> None:
    """Loads what `optimizer.state_dict()` gave, which would replace `lr`; its value is not kept."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["lr"] = lr


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
