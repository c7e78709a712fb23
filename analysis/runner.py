"""Runs the commands of a plan side by side: a GPU or a share of the cores each; resumable."""

import ctypes
import dataclasses
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils import cli, runlog
from utils.files import atomic_write

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Task:
    """A command of the plan: a label set or a run.

    Attributes:
        name: of its log, and of its run folder.
        command: arguments after `python`.
        done: a file that is there once it has been done.
        record: keeps the command that did it.
        facts: method, codec (where the plan has some), slc, ipc, student and seed of a run.
    """

    name: str
    command: list[str]
    done: Path
    record: Path
    facts: dict

    def is_done(self) -> bool:
        """Whether it has been done with these flags; with others, its command is to say so."""
        recorded = self.record.read_text() if self.record.exists() else self.text()
        return self.done.exists() and recorded == self.text()

    def text(self) -> str:
        """The command, without the folder of this repository."""
        return shlex.join(self.command[1:]) + "\n"


def machine_slots(jobs: int | None) -> list[dict[str, str]]:
    """Environments of the runs side by side: a GPU each in turn, or a share of the cores each."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        names = itertools.cycle(visible.split(","))
        return [{"CUDA_VISIBLE_DEVICES": next(names)} for _ in range(jobs or gpus)]
    if "OMP_NUM_THREADS" in os.environ or not jobs:
        return [{}] * (jobs or 1)
    return [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}] * jobs


def _die_with_parent() -> None:
    """In a new process: SIGTERM when the planner ends, however it ends (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


class Worker:
    """Starts tasks in one slot of the machine, one at a time."""

    def __init__(self, environment: dict[str, str], logs: Path):
        self.environment, self.logs = environment, logs
        self.task: Task | None = None

    def start(self, task: Task) -> None:
        """Starts a task; what it prints goes to its log."""
        self.task = task
        with (self.logs / f"{task.name}.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *task.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                preexec_fn=_die_with_parent,
            )

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def last_words(self) -> str:
        """The last line of the task's log."""
        text = (self.logs / f"{self.task.name}.log").read_text(errors="replace")
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        return lines[-1] if lines else "no output"

    def stop(self) -> None:
        """Ends the task, which saves first; the same command continues."""
        self.process.terminate()
        self.process.wait()


def run_all(tasks: list[Task], slots: list[dict[str, str]], logs: Path, what: str) -> list[str]:
    """Runs the tasks that are not done, as many at a time as there are slots.

    Returns:
        A line for each task that failed; the others were not kept from running.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [task for task in tasks if not task.is_done()]
    workers = [Worker(slot, logs) for slot in slots]
    failed = []
    bar = cli.progress(total=len(tasks), initial=len(tasks) - len(waiting), desc=what, unit="run")
    try:
        while waiting or any(worker.task for worker in workers):
            for worker in workers:
                if worker.task and worker.finished():
                    if worker.process.returncode:
                        failed.append(f"{worker.task.name}: {worker.last_words()}")
                    else:
                        atomic_write(worker.task.record, worker.task.text().encode())
                    bar.update()
                    worker.task = None
                if not worker.task and waiting:
                    worker.start(waiting.pop(0))
            running = [describe(worker.task) for worker in workers if worker.task]
            text = ", ".join(running) + f", {len(failed)} failed" * bool(failed)
            bar.set_postfix_str(text, refresh=False)
            bar.update(0)
            time.sleep(_POLL_SECONDS)
    finally:
        for worker in workers:
            if worker.task:
                worker.stop()
        bar.close()
    return failed


def describe(task: Task) -> str:
    """Its name, and the epoch that a run has reached."""
    log = task.done.with_name(runlog.LOG)
    epoch = log.read_bytes().count(b"\n") if log.exists() else 0
    return f"{task.name} (epoch {epoch})" if task.facts else task.name
