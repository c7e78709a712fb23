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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.bench import Bench
from utils.cli import UserError


def by_turns(pipelines: dict[str, Callable], bench: Bench) -> Iterator[dict]:
    """Times pipelines by turns, each in a process of its own, once it has found its pace.

    So neither memory nor settings of one are another's, and a machine that slows down slows all.
    Of `pipelines`, by name what makes one, `run(passes: range)` is timed, which returns how many
    images it went through. bench.args says how often (`repeats`), and how many `seconds` a timing
    takes at least.

    Yields a row for each timing, once it is taken. `peak_mb` is what the process, without its
    workers, had held at most by then, on a GPU what torch had allocated there.

    Raises UserError where a process was ended from outside; else what a pipeline raises.
    """
    device, threads, counts = bench.machine.device, torch.get_num_threads(), {}
    spawn = multiprocessing.get_context("spawn")
    try:
        with _gpu_samples(device) as samples, contextlib.ExitStack() as ending:
            for name, make in pipelines.items():
                process = ending.enter_context(ProcessPoolExecutor(1, spawn))
                ending.callback(process.submit, _end)
                begun = process.submit(_begin, threads, device, make, bench.args.seconds)
                counts[name] = process, begun.result()
            for repeat in range(1, bench.args.repeats + 1):
                for name, (process, count) in counts.items():
                    started = time.perf_counter()
                    images, seconds, peak = process.submit(_run, count).result()
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
    except BrokenProcessPool:
        raise UserError(
            "a process of the benchmark was ended from outside, perhaps for lack of memory; "
            "try a smaller --ipc"
        ) from None


def _begin(threads: int, device: torch.device, make: Callable, at_least: float) -> int:
    """In a process of its own: makes the pipeline; how many passes take so many seconds."""
    global _pipeline, _device, _done
    torch.set_num_threads(threads)
    _device, _pipeline, _done = device, make(), 0
    _run(1)  # compiles, captures, fills caches
    count, seconds = 1, 0.0
    while seconds < at_least:
        count *= 2
        _, seconds, _ = _run(count)
    return count


def _run(count: int) -> tuple[int, float, int]:
    """In that process: images and seconds of the next passes, and the most bytes held so far."""
    global _done
    passes = range(_done, _done + count)
    _done = passes.stop
    started = time.perf_counter()
    images = _pipeline.run(passes)
    if _device.type == "cuda":
        torch.cuda.synchronize(_device)
    seconds = time.perf_counter() - started
    if _device.type == "cuda":
        return images, seconds, torch.cuda.max_memory_allocated(_device)
    most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return images, seconds, int(most[1]) * 1024


def _end() -> None:
    """In that process: ends what the pipeline started; one that was left would be waited for."""
    if hasattr(_pipeline, "close"):
        _pipeline.close()


@contextlib.contextmanager
def _gpu_samples(device: torch.device) -> Iterator[list[tuple[float, float]]]:
    """A list that nvidia-smi, where it is, fills: every 50 ms a time and how busy the GPU is."""
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
