"""One optimiser step on batches of tensors: forward, loss, backward, update, sums of the epoch.

The same body runs kernel by kernel or, on one GPU, as CUDA graphs that hold all of it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.graphs import Graphs
from utils.metrics import hits
from utils.runtime import Runtime
from validate.kinds import Batch

OPTIMIZERS = ("adamw", "sgd")
Loss = Callable[[Tensor, Batch], Tensor]  # the mean of a batch, given its logits


class Step:
    """Calling it with the batches of a step makes the step; nothing in it waits for the GPU."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, machine: Runtime, graphs: bool):
        """A step of a model on the machine's device; `graphs` are for one GPU alone."""
        self.model, self.optimizer, self.machine = model, optimizer, machine
        self.scaler, self.steps = machine.scaler(), 0
        self.graphs = Graphs(machine.device, "a training step of this network") if graphs else None
        # Over the epoch: the loss, and views whose main class had the highest, second highest, ...
        # logit; views on this rank.
        self.loss_sum = torch.zeros((), device=machine.device)
        self.hits = torch.zeros(5, dtype=torch.int64, device=machine.device)
        self.views = 0
        kind = nn.modules.batchnorm._BatchNorm
        self.norms = [norm for norm in model.modules() if isinstance(norm, kind)]

    def begin_epoch(self) -> None:
        """Sets the sums to zero."""
        self.loss_sum.zero_()
        self.hits.zero_()
        self.views = 0

    def __call__(self, batches: Sequence[Batch], loss_of: Loss) -> None:
        """Averages the gradients of the batches, over torchrun's ranks too, and updates once."""
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
    counters = [
        (norm, norm.num_batches_tracked)
        for norm in norms
        if norm.training and norm.momentum is not None and norm.num_batches_tracked is not None
    ]
    for norm, _ in counters:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, counter in counters:
            norm.num_batches_tracked = counter
    if counters:
        torch._foreach_add_([counter for _, counter in counters], 1)


def make_optimizer(kind: str, model: nn.Module, lr: Tensor, weight_decay: float) -> Optimizer:
    """An optimiser of OPTIMIZERS, fused, which a CUDA graph can hold.

    `lr`, float32 [] on the model's device, is filled when the rate changes, never replaced. Weight
    decay is on tensors with more than one dimension, none on biases and norms.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=True)


def forget(optimizer: Optimizer) -> None:
    """Sets the optimiser's moments and step counts to zero, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
