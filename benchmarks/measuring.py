"""What the speed benchmark measures with: timings, memory, and pipelines in their own processes."""

import atexit
import contextlib
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path

import torch

from utils import runtime
from utils.cli import UserError


class Meter:
    """Times sections, and what they take: memory, and the GPU's utilisation where there is one.

    Attributes:
        rows: a timing each, in the order in which they were made.
        notes: further results by name.
    """

    def __init__(self, device: torch.device):
        self.device, self.rows, self.notes = device, [], {}
        self._utilisation = Utilisation(device)

    @contextlib.contextmanager
    def section(
        self, stage: str, name: str, repeat: int, count: int, pipeline: "Elsewhere | None" = None
    ) -> Iterator[None]:
        """Times a block that handles `count` images; repeat 0 warms up and is not counted.

        The block runs `pipeline`; without one it works in this process, whose memory on a CPU tells
        nothing: it goes on holding what other blocks took.
        """
        reset_peak(self.device)
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - started
        if repeat == 0:
            return
        peak = pipeline.peak if pipeline else peak_memory(self.device)
        self.rows.append(
            {
                "stage": stage,
                "pipeline": name,
                "repeat": repeat,
                "images": count,
                "seconds": round(seconds, 4),
                "images_per_second": round(count / seconds, 2),
                "peak_mb": round(peak / 1e6) if pipeline or self.device.type == "cuda" else None,
                "gpu_percent": self._utilisation.since(started),
            }
        )

    def alone(
        self, stage: str, name: str, repeats: int, count: int, work: Callable[[], object]
    ) -> None:
        """Times work in this process on `count` images, four times in a row per repeat."""
        for repeat in range(repeats + 1):
            with self.section(stage, name, repeat, 4 * count):
                for _ in range(4):
                    work()

    def by_turns(
        self, stage: str, pipelines: "dict[str, Elsewhere]", repeats: int, passes: int, images: int
    ) -> None:
        """Times the pipelines by turns: so many passes over so many images in each process."""
        with contextlib.ExitStack() as processes:
            for pipeline in pipelines.values():
                processes.enter_context(pipeline)
            for repeat in range(repeats + 1):
                for name, pipeline in pipelines.items():
                    count = passes * pipeline.processes
                    with self.section(stage, name, repeat, count * images, pipeline):
                        pipeline.run(range(repeat * count, (repeat + 1) * count))

    def rates(self, stage: str, name: str) -> list[float]:
        """Images per second of all counted repeats."""
        return [
            row["images_per_second"]
            for row in self.rows
            if (row["stage"], row["pipeline"]) == (stage, name)
        ]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reset_peak(device: torch.device) -> None:
    """Lets `peak_memory` start from what is held now, freed memory that is kept included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: of GPU memory, or of this process without its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(most[1]) * 1024


class Utilisation:
    """The GPU's utilisation as nvidia-smi samples it, where there is one."""

    def __init__(self, device: torch.device):
        self._samples: list[tuple[float, float]] = []
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
            query += ["-lms", "50", "-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
            sampler = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            atexit.register(sampler.kill)
            threading.Thread(target=self._read, args=(sampler.stdout,), daemon=True).start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line.strip().isdigit():
                self._samples.append((time.perf_counter(), float(line)))

    def since(self, started: float) -> float | None:
        """The mean of the samples since a time, in percent; None without any."""
        values = [value for moment, value in self._samples if moment > started]
        return round(statistics.mean(values), 1) if values else None


class Elsewhere:
    """A pipeline in processes of its own: memory and settings of one are not another's.

    A context, in which the processes live. They share this process's threads, and what they are
    told to run.

    Attributes:
        processes: how many they are.
        peak: bytes, the sum of what each process has held at most.
    """

    def __init__(
        self, device: torch.device, make: Callable, *arguments: object, processes: int = 1
    ):
        """In each of so many processes there will be a pipeline `make(*arguments)`."""
        self.processes, self.peak = processes, 0
        threads = max(torch.get_num_threads() // processes, 1)
        self._beginning = (threads, device, make, arguments)
        spawned = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, spawned) for _ in range(processes)]

    def run(self, passes: range) -> None:
        """Runs the pipeline, in each process on its share of the passes."""
        shares = [(passes[rank :: self.processes],) for rank in range(self.processes)]
        self.peak = sum(self._each(_run, shares))

    def _each(self, work: Callable, arguments: list[tuple]) -> list:
        """What a function returns in each of the processes."""
        waiting = [
            pool.submit(work, *own) for pool, own in zip(self._pools, arguments, strict=True)
        ]
        try:
            return [future.result() for future in waiting]
        except BrokenProcessPool:
            raise UserError(
                "a process of the benchmark was ended from outside, perhaps for lack of memory; "
                "try a smaller --ipc"
            ) from None

    def __enter__(self) -> "Elsewhere":
        try:
            self._each(_begin, [self._beginning] * len(self._pools))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for pool in self._pools:
            pool.shutdown()


def _begin(threads: int, device: torch.device, make: Callable, arguments: tuple) -> None:
    """In a process of Elsewhere: makes its pipeline."""
    global _pipeline, _device
    torch.set_num_threads(threads)
    _device = device
    if make.keeps_memory and device.type == "cpu":
        runtime.keep_freed_memory()
    _pipeline = make(*arguments)


def _run(passes: range) -> int:
    """In a process of Elsewhere: runs its pipeline; returns the most bytes that it held."""
    reset_peak(_device)
    _pipeline.run(passes)
    return peak_memory(_device)


def describe_machine(device: torch.device) -> str:
    """The processor, or the GPU, and the number of CPU cores."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    processor = model[1].strip() if model else platform.machine()
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {cores} ({processor})"
    return f"{processor}, {cores}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, str]:
    """The command of the running script, the date, the machine and torch's version, by name."""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": describe_machine(device),
        "torch": str(torch.__version__),
    }
