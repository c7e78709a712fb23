"""Device, mixed precision, what of the machine may be used, and the processes of torchrun."""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import importlib.metadata
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.distributed.rendezvous import rendezvous

from utils.cli import UserError, bounded, gpu_failure, world_size
from utils.data.datasets import Dataset

_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}
_NVIDIA_DEVICES = Path("/dev"), "nvidia[0-9]*"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# Of a step for the others'. Where rank 0 alone decodes, fits or writes, the others wait for long.
_PATIENCE = datetime.timedelta(minutes=30)
_PATIENCE_FOR_FIRST = datetime.timedelta(days=7)
_MEETING = datetime.timedelta(minutes=5)  # for all processes to have come and found each other


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and in which precision networks run, and as which of torchrun's processes."""

    device: torch.device
    dtype: torch.dtype | None  # autocast's; None runs in fp32
    rank: int = 0
    world: int = 1  # with one process the collectives below do nothing
    patient: dist.ProcessGroup | None = None  # of those that wait for what rank 0 does alone

    @property
    def precision(self) -> str:
        """ "fp16", "bf16" or "off": a value of --amp that gives the same precision again."""
        return next(name for name, dtype in _DTYPES.items() if dtype is self.dtype)

    def autocast(self) -> torch.autocast:
        """A context in which the forward pass runs in mixed precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, active only where fp16 gradients could underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def random_state(self) -> dict[str, torch.Tensor]:
        """The state of torch's random numbers on the CPU and, where it is one, the GPU."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on with a state that `random_state` gave, perhaps on another device."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def divisible(self, batches: int) -> int:
        """The number of batches, rounded up so that every rank gets equally many."""
        return -(-batches // self.world) * self.world

    def share(self, batches: list) -> list:
        """This rank's batches of an epoch; the first ones again where they do not divide evenly."""
        cycled = itertools.cycle(batches)
        return list(itertools.islice(cycled, self.rank, self.divisible(len(batches)), self.world))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list:
        """The values of all ranks, in their order, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.gather(None)

    @contextlib.contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Runs the block on rank 0, then on the others: for what is made once and then found."""
        if self.rank > 0:
            self.barrier()
        yield
        if self.rank == 0:
            self.barrier()

    def shared(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the ranks; of buffers see average_buffers."""
        if self.world == 1:
            return model
        kind = nn.parallel.DistributedDataParallel
        # Newer versions of torch call the argument by its second name, and warn about the first.
        newer = "forward_sync_buffers" in inspect.signature(kind).parameters
        return kind(model, **{"forward_sync_buffers" if newer else "broadcast_buffers": False})

    def average_buffers(self, model: nn.Module) -> None:
        """Gives every rank the mean of the ranks' floating-point buffers (running statistics)."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    self.total(buffer).div_(self.world)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; nothing waits for a copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begins to copy a tensor from its device; what it returns waits for that copy alone."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy, copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def result() -> torch.Tensor:
        copied.synchronize()
        return copy

    return result


def check_trains(
    model: nn.Module, dataset: Dataset, device: torch.device, views: int, what: str
) -> None:
    """Raises UserError unless a training pass takes a batch of so many views, as BatchNorm may not.

    `views` are those of an epoch's last batch, the smallest. A copy of the network is tried, and
    the random numbers it draws are given back.
    """
    pixels = torch.zeros(views, 3, dataset.input_size, dataset.input_size, device=device)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            copy.deepcopy(model).train()(pixels)
    except ValueError as error:
        raise UserError(
            f"{what} cannot be trained on the last batch of an epoch, which has {views} views "
            f"({error}); choose another --batch-size, or relabel with one"
        ) from None


def check_outputs(model: nn.Module, dataset: Dataset, device: torch.device, what: str) -> None:
    """Raises UserError, naming `what`, unless the network maps one image to one logit per class."""
    training, size = model.training, dataset.input_size
    try:
        with torch.inference_mode():
            logits = model.eval()(torch.zeros(1, 3, size, size, device=device))
    except Exception as error:  # whatever somebody else's network raises
        if gpu_failure(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{what} does not take {size}-pixel images: {reason}") from None
    model.train(training)
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    expected = (1, dataset.num_classes)
    if shape != expected:
        raise UserError(f"{what} gives {shape} for one image, {dataset.name} needs {expected}")


def add_arguments(parser: argparse.ArgumentParser, decodes: bool = True) -> None:
    """Adds --device, --amp and --workers."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    precision = "mixed precision; auto: fp16 on CUDA, off (exact) on a CPU, where bf16 is faster "
    precision += "on some processors"
    group.add_argument("--amp", choices=("auto", *_DTYPES), default="auto", help=precision)
    if decodes:
        decoders = "processes that decode images which are not kept in memory"
        group.add_argument("--workers", type=bounded(int, 0), default=4, metavar="N", help=decoders)


def usable_cores() -> int:
    """CPU cores that this process may use: a container's quota and the affinity counted."""
    cores = len(os.sched_getaffinity(0))
    # Version 2 says "max" and version 1 -1 where there is no quota.
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((_CGROUP / name).read_text() for name in names).split()
            if int(quota) > 0:
                cores = min(cores, -(-int(quota) // int(period)))
    return cores


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping, nor above a container's limit."""
    line = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(line[1]) * 1024
    # Version 2 says "max" and version 1 a huge number where there is no limit.
    for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
        folder = _CGROUP if limit == "max" else _CGROUP / "memory"
        with contextlib.suppress(OSError, ValueError):
            room = int((folder / f"memory.{limit}").read_text())
            room -= int((folder / f"memory.{used}").read_text())
            statistics = (folder / "memory.stat").read_text()
            # Cached pages of files count as used, and are given up when memory is wanted. With
            # the groups below this one, where version 1 counts those apart.
            total = "total_" if "total_inactive_file" in statistics else ""
            cached = re.findall(rf"^{total}(?:in)?active_file (\d+)", statistics, re.MULTILINE)
            available = min(available, room + sum(map(int, cached)))
    return max(available, 0)


def describe(machine: Runtime) -> str:
    """Device, precision and, on a CPU, threads: the first line of a run."""
    threads = f", {torch.get_num_threads()} threads" if machine.device.type == "cpu" else ""
    return f"{device_name(machine.device)}, precision {machine.precision}{threads}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def start(device: str, amp: str) -> Runtime:
    """Prepares this process to compute, on a device and in a precision as the flags name them.

    One of torchrun's processes gets a GPU of its own, and waits until all have come. Raises
    UserError where there is no such device, or none that has this precision.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())  # more than a container's quota wait for each other
    # On a GPU, too, fp32 is fp32: TF32 would move pixels and labels. Some containers switch it on.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    world, rank, local = _place()
    if not device.startswith("cpu"):
        _check_driver()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: not a device; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        if amp == "fp16":
            raise UserError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
        keep_freed_memory()
    else:
        if world > 1:
            if chosen.index is not None:
                raise UserError("--device cuda:N is for one process; leave it out under torchrun")
            chosen = torch.device("cuda", local)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            hint = f"--nproc_per_node={count}" if world > 1 and count else "--device cpu"
            raise UserError(f"--device {chosen}: there are {count} CUDA devices here; use {hint}")
        torch.cuda.set_device(chosen.index or 0)  # where memory is pinned, too
    if amp == "auto":
        amp = "off" if chosen.type == "cpu" else "fp16"
    patient = _meet(chosen, rank, world) if world > 1 else None
    return Runtime(chosen, _DTYPES[amp], rank, world, patient)


def _check_driver() -> None:
    """Raises UserError where there is an NVIDIA device, but CUDA does not start on it.

    Unsaid, a driver that is older than torch's CUDA would mean days on the CPU.
    """
    hidden = not re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    folder, names = _NVIDIA_DEVICES
    if torch.cuda.is_available() or hidden or not any(map(_opens, folder.glob(names))):
        return
    reason = "no device answers"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    driver = "driver unknown"
    with contextlib.suppress(OSError, IndexError):
        driver = _NVIDIA_DRIVER.read_text().splitlines()[0]
    raise UserError(
        f"there is an NVIDIA device, but CUDA does not start ({reason}; {driver}; torch "
        f"{torch.__version__} is built for CUDA {torch.version.cuda or '(none)'}): install a "
        "build of torch that fits the driver, or run with --device cpu"
    )


def _opens(path: Path) -> bool:
    """Whether a device file can be opened: schedulers leave other jobs' devices in sight."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def keep_freed_memory() -> None:
    """Has glibc keep what this thread frees for the next batch, not give it back to the system.

    The system hands out memory page by page and cleared, which took about a tenth of the time of a
    large network on a CPU. The process goes on holding what it held at most.
    """
    with contextlib.suppress(AttributeError):  # another C library has no such options
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, -1)


def _place() -> tuple[int, int, int]:
    """How many processes torchrun started, which of them this is, and which on this machine."""
    world = world_size()
    if world == 1:
        return 1, 0, 0
    for name in ("RANK", "LOCAL_RANK"):
        text = os.environ.get(name) or "not set"
        if not text.isdecimal() or int(text) >= world:
            raise UserError(
                f"WORLD_SIZE is {world} but {name} is {text}: start several processes with "
                "torchrun, or unset WORLD_SIZE"
            )
    return world, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])


def _meet(device: torch.device, rank: int, world: int) -> dist.ProcessGroup:
    """Waits for all of torchrun's processes; returns the group of those that wait for long."""
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            store, _, _ = next(rendezvous("env://", timeout=_MEETING))
            job = {"store": store, "rank": rank, "world_size": world, "timeout": _PATIENCE}
            dist.init_process_group(backend, **job)
        except (dist.DistError, ValueError) as error:
            raise UserError(
                f"the {world} processes of this job did not meet ({str(error).splitlines()[0]:.200}"
                "): start all of them, with torchrun, and let them reach each other"
            ) from None
    return dist.new_group(backend="gloo", timeout=_PATIENCE_FOR_FIRST)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, for manifests and run folders."""
    packages = {each.__name__: str(each.__version__) for each in (torch, torchvision, numpy)}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # codec klt alone needs it
        packages["pcodec"] = importlib.metadata.version("pcodec")
    return packages
