"""Runs the commands of a plan side by side: a GPU or a share of the cores each; resumable."""

import dataclasses
import itertools
import multiprocessing.connection
import os
import runpy
import shlex
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from utils import cli, runlog
from utils.files import atomic_write
from utils.runtime import usable_cores

ROOT = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.1
# What the programs of a plan import, which takes seconds, longer than a small run.
_IMPORTS = ["validate.train", "relabel.generate", "relabel.compress", "analysis.sweep"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A command of the plan: a label set or a run.

    `command` is a program of this repository and its arguments, as after `python`; `done` a file
    that is there once it has been done; `logs` the folder for what it prints and the flags that it
    was done with. `facts` of a run are method, codec (where the plan has some), slc, ipc, student
    and seed; a label set has none.
    """

    name: str
    command: list[str]
    done: Path
    logs: Path
    facts: dict

    @property
    def log(self) -> Path:
        """Keeps what it prints."""
        return self.logs / f"{self.name}.log"

    def is_done(self) -> bool:
        """Whether it has been done with these flags; with others, its command is to say so."""
        record, flags = self.logs / f"{self.name}.command", shlex.join(self.command[1:])
        return self.done.exists() and (not record.exists() or record.read_text().strip() == flags)

    def note_done(self) -> None:
        """Keeps the flags that it was done with."""
        flags = shlex.join(self.command[1:])
        atomic_write(self.logs / f"{self.name}.command", f"{flags}\n".encode())

    def start(self, environment: dict[str, str]) -> BaseProcess:
        """Starts the command; what it prints goes to its log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # A server that has imported the programs, and nothing more, forks each command's process.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTS)
        process = context.Process(target=_run, args=(self.command, self.log, environment))
        process.start()
        return process

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(errors="replace").split("\n")  # a bar's "\r" are newlines, too
        return next((line for line in reversed(lines) if line.strip()), "no output")

    def describe(self) -> str:
        """Its name, and the epoch that a run has reached."""
        log = self.done.with_name(runlog.LOG)
        epoch = log.read_bytes().count(b"\n") if log.exists() else 0
        return f"{self.name} (epoch {epoch})" if self.facts else self.name


def machine_slots(jobs: int | None) -> list[dict[str, str]]:
    """Environments of the runs side by side: a GPU each in turn, or a share of the cores each."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        names = itertools.cycle(visible.split(","))
        return [{"CUDA_VISIBLE_DEVICES": next(names)} for _ in range(jobs or gpus)]
    if "OMP_NUM_THREADS" in os.environ or not jobs:
        return [{}] * (jobs or 1)
    return [{"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}] * jobs


def _end_with_planner() -> None:
    """Sends this process SIGTERM when the planner has ended, however it ended."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _run(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """In a new process: runs a command as `python` would."""
    threading.Thread(target=_end_with_planner, daemon=True).start()
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which torch has looked for already
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_all(tasks: list[Task], slots: list[dict[str, str]], what: str) -> list[str]:
    """Runs the tasks that are not done, one in each of the slots; `what` names the progress bar.

    Returns a line for each task that failed, which keeps none of the others from running. A signal
    ends the tasks under way, each as it ends by itself, then the program (see cli).
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # where the server imports
    waiting = [task for task in tasks if not task.is_done()]
    running: dict[int, tuple[Task, BaseProcess]] = {}  # by the position of their slot
    failed = []
    bar = cli.progress(total=len(tasks), initial=len(tasks) - len(waiting), desc=what, unit="run")
    with cli.delayed_signals() as noted_signal:
        try:
            while (waiting or running) and not noted_signal():
                for slot, environment in enumerate(slots):
                    if slot in running and running[slot][1].exitcode is not None:
                        task, process = running.pop(slot)
                        if process.exitcode:
                            failed.append(f"{task.name}: {task.last_words()}")
                        else:
                            task.note_done()
                        bar.update()
                    if slot not in running and waiting:
                        task = waiting.pop(0)
                        running[slot] = task, task.start(environment)
                text = ", ".join(task.describe() for task, _ in running.values())
                bar.set_postfix_str(text + f", {len(failed)} failed" * bool(failed), refresh=False)
                bar.update(0)
                time.sleep(_POLL_SECONDS)
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()
            bar.close()
        if number := noted_signal():
            cli.end_by_signal(number)
    return failed
