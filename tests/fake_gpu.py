"""A GPU that is not there: tensors say "cuda", operators check shapes, types and devices.

Nothing is computed. What a GPU would be asked to do is counted (kernel launches), and what would
make the host wait for it is noted, with the line of the project that asked: that is as exact
without a GPU as with one. How long things take, and whether kernels are right, it cannot say.
"""

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import models
from utils.labels import LabelSet
from utils.runtime import Runtime

ROOT = Path(models.__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)

# Operators that only look at memory in another way, or allocate it.
_NO_LAUNCH = """
    view _unsafe_view _reshape_alias reshape expand permute transpose t select slice split
    split_with_sizes unsqueeze squeeze detach alias as_strided as_strided_ unbind lift_fresh empty
    empty_like empty_strided new_empty new_empty_strided diagonal unfold view_as resize_ set_
    is_pinned _local_scalar_dense chunk flatten
""".split()  # noqa: SIM905
# Operators of several kernels: gradients of input and weight, two passes over the data.
_LAUNCHES = {"convolution_backward": 2, "topk": 2, "sort": 2, "index_put_": 2, "_fused_adamw_": 2}
_READ_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


class Watch(TorchDispatchMode):
    """Sees every operator.

    Attributes:
        launches: kernel launches by phase, see `phases`.
        waits: how often what would make the host wait, or costs time for nothing: "what, file:
            line".
    """

    def __init__(self):
        super().__init__()
        self.phase, self.pinned = "other", set()
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()

    def clear(self) -> None:
        """Forgets what was seen so far."""
        self.launches.clear()
        self.waits.clear()

    def note(self, what: str) -> None:
        """Notes it with the innermost line of the project on the stack."""
        frame = sys._getframe()
        while frame and not (
            frame.f_code.co_filename.startswith(str(ROOT))
            and frame.f_code.co_filename != __file__
            and ".venv" not in frame.f_code.co_filename
        ):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        line = path.read_text().splitlines()[frame.f_lineno - 1].partition("  #")[0].strip()
        self.waits[f"{what}, {path.relative_to(ROOT)}: {line}"] += 1

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.namespace == "prim":
            return operator(*args, **kwargs)
        if operator._can_decompose():  # as inference mode hands over composite operators whole
            with self:
                result = operator.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = operator._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in inputs)
        if on_gpu:
            self._check_inputs(name, args)
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            if on_gpu:
                self.note("a value is read")
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else dtype is torch.bool or 1
        if name == "_fused_adamw_" and not isinstance(kwargs["lr"], float):
            result = None  # has no fake kernel for a rate in a tensor, and works in place
        else:
            result = operator(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], outputs[0]) if name == "_to_copy" else (args[1], args[0])
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2))
            self._check_copy(source, target, waits)
        # cuDNN returns, and copies, an empty reserve.
        empty = outputs and not any(tensor.numel() for tensor in outputs)
        gpu = on_gpu or any(tensor.is_cuda for tensor in outputs)
        if gpu and not empty and name not in _NO_LAUNCH:
            self.launches[self.phase] += _LAUNCHES.get(name, 1)
        return result

    def _check_inputs(self, name: str, args: tuple) -> None:
        if name in _READ_VALUES:
            self.note(f"{name} has as many results as the values say")
        if name in ("index", "index_put_", "index_put"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note("a mask as index has as many results as its values say")
                elif index is not None and index.device != args[0].device:
                    self.note(f"an index on {index.device.type}")
        if (
            name == "convolution"
            and args[0].shape[1] > 3
            and not args[0].is_contiguous(memory_format=torch.channels_last)
        ):
            self.note("a convolution of channels first")

    def _check_copy(self, source: torch.Tensor, target: torch.Tensor, waits: bool) -> None:
        if source.is_cuda and not target.is_cuda:
            self.note("a copy to the CPU is waited for" if waits else "a copy to the CPU")
        elif target.is_cuda and not source.is_cuda:
            if id(source) not in self.pinned:
                self.note("an upload from memory that is not pinned")
            elif waits:
                self.note("an upload is waited for")

    @contextlib.contextmanager
    def phases(self, **owners: tuple[object, str]) -> Iterator[None]:
        """Counts launches of functions, given as phase=(owner, name), by their phase."""
        with contextlib.ExitStack() as patches:
            for phase, (owner, name) in owners.items():
                counted = self._counted(getattr(owner, name), phase)
                patches.enter_context(mock.patch.object(owner, name, counted))
            yield

    def _counted(self, function: Callable, phase: str) -> Callable:
        def call(*args, **kwargs):
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return call


def backward(loss: torch.Tensor) -> None:
    """loss.backward() in Python; torch's own engine asks a driver for streams."""
    order, seen = [], set()
    stack = [(loss.grad_fn, False)]
    while stack:  # depth first; a node comes after all that follow from it
        node, visited = stack.pop()
        if visited:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following]
    gradients: dict = collections.defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    with torch.no_grad():
        for node in reversed(order):
            given = gradients.pop(node, {})
            if hasattr(node, "variable"):
                leaf, gradient = node.variable, given[0]
                assert gradient.shape == leaf.shape and gradient.device == leaf.device
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            results = node(*(given.get(slot) for slot in range(max(given, default=0) + 1)))
            results = results if isinstance(results, tuple) else (results,)
            for (following, slot), gradient in zip(node.next_functions, results, strict=False):
                if following is None or gradient is None:
                    continue
                expected = following._input_metadata[slot]
                assert gradient.device == expected.device, node
                if gradient.shape != expected.shape:
                    gradient = gradient.sum_to_size(expected.shape)
                if gradient.dtype != expected.dtype:
                    gradient = gradient.to(expected.dtype)
                slots = gradients[following]
                slots[slot] = slots[slot] + gradient if slot in slots else gradient


@contextlib.contextmanager
def fake_gpu(free_bytes: int = 80 << 30) -> Iterator[Watch]:
    """Inside it there is a device "cuda" with so much free memory."""
    watch = Watch()

    def for_real(function: Callable) -> Callable:
        """What becomes fake when it is moved to the GPU, weights and stored labels, is real."""

        def call(*args):
            with _disable_current_modes():
                return function(*args)

        return call

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone() if isinstance(tensor, FakeTensor) else tensor
        watch.pinned.add(id(pinned))
        kept.append(pinned)  # so that its id stays its own
        return pinned

    kept: list[torch.Tensor] = []
    replaced = {
        "models.build": for_real(models.build),
        "utils.labels.LabelSet.load_pass": for_real(LabelSet.load_pass),
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.Event": mock.Mock,
        "torch.cuda.mem_get_info": lambda *_: (free_bytes, free_bytes),
        "torch.Tensor.backward": backward,
        "torch.Tensor.pin_memory": pin,
    }
    with contextlib.ExitStack() as stack:
        for target, value in replaced.items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        yield watch


def machine(dtype: torch.dtype | None = torch.float16) -> Runtime:
    """The fake GPU, alone."""
    return Runtime(CUDA, dtype)
