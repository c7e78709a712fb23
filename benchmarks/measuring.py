"""What the speed benchmark measures with: a process per pipeline, memory, the GPU's utilisation."""

import contextlib
import multiprocessing
import re
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.bench import Bench
from utils.cli import UserError


def by_turns(pipelines: dict[str, Callable], bench: Bench) -> Iterator[dict]:
    """Times pipelines by turns, each in a process of its own, once it has found its pace.

    So neither memory nor settings of one are another's, and a machine that slows down slows all.

    Args:
        pipelines: by name what makes one; its `run(passes: range)` is timed, and returns how many
            images it went through.
        bench: its arguments say how often (`repeats`), and how long a timing is to take at least
            (`seconds`). How many passes that are is found beforehand, by doubling them.

    Yields:
        A row for each timing, once it is taken. `peak_mb` is what the process, without its workers,
        had held at most by then, on a GPU what torch had allocated there.

    Raises:
        UserError: a process was ended from outside; or what a pipeline raises.
    """
    device = bench.machine.device
    with contextlib.ExitStack() as ending:
        samples = ending.enter_context(gpu_samples(device))
        processes = {}
        for name, make in pipelines.items():
            spawn = multiprocessing.get_context("spawn")
            processes[name] = ending.enter_context(ProcessPoolExecutor(1, spawn))
            ending.callback(_end_pipeline, processes[name])
            _result(processes[name].submit(_begin, torch.get_num_threads(), device, make))
        passes = {}
        for name, process in processes.items():
            _result(process.submit(_run, range(1)))  # compiles, captures, fills caches
            passes[name], seconds = range(1), 0.0
            while seconds < bench.args.seconds:
                passes[name] = _next(passes[name], 2 * len(passes[name]))
                _, seconds, _ = _result(process.submit(_run, passes[name]))
        for repeat in range(1, bench.args.repeats + 1):
            for name, process in processes.items():
                passes[name] = _next(passes[name], len(passes[name]))
                started = time.perf_counter()
                images, seconds, peak = _result(process.submit(_run, passes[name]))
                # The driver's numbers are means over the last part of a second.
                used = [percent for moment, percent in samples if moment > started + 0.5]
                yield {
                    "pipeline": name,
                    "repeat": repeat,
                    "images": images,
                    "seconds": round(seconds, 4),
                    "images_per_second": round(images / seconds, 2),
                    "peak_mb": round(peak / 1e6),
                    "gpu_percent": round(statistics.mean(used), 1) if used else None,
                }


def _next(passes: range, count: int) -> range:
    return range(passes.stop, passes.stop + count)


def _result(future: Future):
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process of the benchmark was ended from outside, perhaps for lack of memory; "
            "try a smaller --ipc"
        ) from None


def _end_pipeline(process: ProcessPoolExecutor) -> None:
    with contextlib.suppress(BrokenProcessPool):
        process.submit(_end)


def _begin(threads: int, device: torch.device, make: Callable) -> None:
    """In a process of its own: makes the pipeline."""
    global _pipeline, _device
    torch.set_num_threads(threads)
    _device, _pipeline = device, make()


def _run(passes: range) -> tuple[int, float, int]:
    """In that process: images and seconds of the pipeline, and the most bytes held so far."""
    started = time.perf_counter()
    images = _pipeline.run(passes)
    if _device.type == "cuda":
        torch.cuda.synchronize(_device)
        seconds = time.perf_counter() - started
        return images, seconds, torch.cuda.max_memory_allocated(_device)
    seconds = time.perf_counter() - started
    most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return images, seconds, int(most[1]) * 1024


def _end() -> None:
    """In that process: ends what the pipeline started; one that was left would be waited for."""
    if hasattr(_pipeline, "close"):
        _pipeline.close()


@contextlib.contextmanager
def gpu_samples(device: torch.device) -> Iterator[list[tuple[float, float]]]:
    """Gives a list that fills up: a time and the GPU's utilisation in percent then, every 50 ms.

    It stays empty without a GPU or nvidia-smi.
    """
    samples: list[tuple[float, float]] = []
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        yield samples
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    query += ["-lms", "50", "-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    sampler = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        for line in sampler.stdout:
            if line.strip().isdigit():
                samples.append((time.perf_counter(), float(line)))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield samples
    finally:
        sampler.kill()
        sampler.wait()
