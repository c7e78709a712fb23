"""Command lines that fail in one line: what is wrong, where, and what to do."""

import argparse
import atexit
import contextlib
import difflib
import errno
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from utils import extensions

_REPEAT_SECONDS = 1.0
_told = False  # whether end_by_signal has said its line
# From a scheduler, a user, SLURM before the time limit, a terminal that is closed.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# What gloo and NCCL say when another process is gone.
_PEER_GONE = re.compile("(closed|reset) by peer|remote process exited|Broken pipe|[Tt]imed out")
_OUT_OF_MEMORY = (
    "out of GPU memory; relabel with a smaller --views-per-forward, train with --no-graph or a "
    "smaller --model, or free the GPU of other jobs"
)
_OF_THE_GPU = re.compile(r"(CUDA|CUDA driver|cuDNN) error|Triton Error \[CUDA\]")
# What CUDA and its libraries say, and what to do; the first that fits is told.
_GPU_FAILURES = {
    "no kernel image": "this build of torch has no code for this GPU: install the build for it",
    "ALLOC_FAILED": _OUT_OF_MEMORY,
    "out of memory": _OUT_OF_MEMORY,
    "busy or unavailable": "another job has it for itself",
    "NOT_INITIALIZED": "its memory may be full, or LD_LIBRARY_PATH names libraries of another CUDA",
    "": "with CUDA_LAUNCH_BLOCKING=1 the same command names the line; --device cpu does "
    "without the GPU",
}


class UserError(Exception):
    """Something the user can mend; its text is the one line printed before exit code 2."""


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Puts before the text of a UserError what it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations; raises UserError; ~ is the home folder."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]}{did_you_mean(unknown[0], flags)}")
        for name, value in vars(parsed).items():
            setattr(parsed, name, _at_home(value))
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def _at_home(value):
    """Paths with ~ expanded, which no shell does in --flag=~/folder or within quotes."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111 - Path's own fails for unknown users
    return value


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns "; did you mean A, B?" for the known words close to `word`, or ""."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(lower), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(lower[name] for name in close)}?" if close else ""


def bounded(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable:
    """Returns an argparse type: a finite number of type `kind` in [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: must be {bounds}")
        return value

    return parse


def progress(iterable=None, **options) -> tqdm:
    """A progress bar of the first process; in a log file, a line every ten seconds."""
    tqdm.set_lock(threading.RLock())  # else a semaphore, which a signal would leave behind
    interval = 0.1 if sys.stderr.isatty() else 10
    usual = {"mininterval": interval, "dynamic_ncols": True, "disable": _rank() > 0}
    return tqdm(iterable, **usual | options)


def world_size() -> int:
    """How many processes torchrun started; 1 without it, or where the variable is no number."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def _rank() -> int:
    """The number of this process among torchrun's; 0 without it."""
    text = os.environ.get("RANK", "")
    return int(text) if world_size() > 1 and text.isdecimal() else 0


def _tell(message: str) -> None:
    """Prints a line below the progress bar; only the first of several processes does."""
    if _rank() == 0:
        with contextlib.suppress(OSError):  # of a terminal that is closed
            print(f"\n{message}", file=sys.stderr)


def _fail(message: str) -> NoReturn:
    """Prints the one line of an error and exits with code 2."""
    program = Path(sys.argv[0]).name
    if _rank() > 0:
        # What every process meets, the first one says, and torchrun ends the others meanwhile.
        time.sleep(5)
        program = f"{program} (process {_rank()})"
    line = message.replace("\n", "\\n").replace("\r", "\\r")  # of the names of files
    print(f"{program}: {line}", file=sys.stderr)
    sys.exit(2)


def end_by_signal(number: int, where: str = "") -> NoReturn:
    """Exits with 128 + the signal's number; says once what the command continues with: `where`."""
    global _told
    how = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}.get(
        number, f"ended by {signal.Signals(number).name}"
    )
    if not _told:
        _told = True
        program = Path(sys.argv[0]).name
        _tell(f"{program}: {how}; the same command again continues {where}".rstrip())
    kill_children()
    sys.exit(128 + number)


def kill_children() -> None:
    """Ends the processes that decode images: one that hangs would be waited for, for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports children that are gone
    for child in multiprocessing.active_children():
        child.kill()


def gpu_failure(error: Exception) -> str | None:
    """What a failure of the GPU or its libraries is, in one line; None for all other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return _OUT_OF_MEMORY
    if not isinstance(error, RuntimeError) or not _OF_THE_GPU.search(str(error)):
        return None
    advice = next(advice for words, advice in _GPU_FAILURES.items() if words in str(error))
    what = str(error).splitlines()[0]
    return f"the GPU failed ({what}): {advice}; the same command continues after that"


def _in_one_line(error: Exception) -> str | None:
    """What is to be said of an error that the user can mend; None for a mistake of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" at {error.filename}" if error.filename else ""
            return f"the disk is full{where}; free some space, then run the same command again"
        known = error.filename is not None and error.strerror
        return f"{error.filename}: {error.strerror}" if known else None
    if not isinstance(error, RuntimeError):
        return None
    cause = getattr(error, "inner_exception", None)  # of torch.compile's
    if failure := gpu_failure(cause or error):
        return failure
    if cause:
        return (
            f"--compile failed ({' '.join(str(cause).split())[:300]}); it needs a C++ compiler and "
            "Python's header files (Debian: apt-get install g++ python3-dev); without --compile "
            "the run goes on"
        )
    if dist.is_initialized() and _PEER_GONE.search(str(error)):
        return (
            "another process of this job ended or hangs: see its message; the same command "
            f"continues ({str(error).splitlines()[0]})"
        )
    return None


def _heeded() -> list[signal.Signals]:
    """The signals that end the program: not those that it was started to ignore, as by nohup."""
    return [number for number in ENDING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def delayed_signals() -> Iterator[Callable[[], int | None]]:
    """Notes signals, which the function that it yields returns; the same one again ends at once.

    Not within a second: launchers and shells pass on what a terminal has already sent to all.
    """
    noted: dict[int, float] = {}

    def note(number: int, frame) -> None:
        if not noted:
            _tell("finishing the step; again: ending at once")
        if time.monotonic() - noted.setdefault(number, time.monotonic()) > _REPEAT_SECONDS:
            earlier[number](number, frame)

    earlier = {number: signal.signal(number, note) for number in _heeded()}
    try:
        yield lambda: next(iter(noted), None)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def run(main: Callable[[], None]) -> NoReturn:
    """Runs an entry script's `main`; whatever the user can mend ends in one line and exit code 2.

    Signals that ask for an end exit with 128 + their number; every other exception keeps its
    traceback. Under torchrun only the first process speaks, unless another one alone has met an
    error.
    """
    global _told
    _told = False
    if _rank() > 0:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - stays open to the end
    for number in {*_heeded()} - {signal.SIGINT}:  # which raises KeyboardInterrupt
        signal.signal(number, lambda number, frame: end_by_signal(number))
    try:
        try:
            extensions.load()
            main()
            sys.exit(0)
        except KeyboardInterrupt:
            end_by_signal(signal.SIGINT)
        except BrokenPipeError:  # as any program behind which head has ended
            sys.exit(128 + signal.SIGPIPE)
        except Exception as error:
            if (message := _in_one_line(error)) is not None:
                _fail(message)
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            sys.exit(1)
        finally:
            kill_children()
    except SystemExit as stopped:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # of `... | head -1`; else Python would try, and tell, once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not dist.is_initialized():
            raise
        if stopped.code == 0:  # else other processes may be waiting for this one, or gone
            dist.destroy_process_group()
        # Without Python's finalisation, in which a thread of gloo's may abort the process: it drops
        # tensors after their collective is done, for which it wants the interpreter
        # (https://github.com/pytorch/pytorch/issues/190489), and it outlives a destroyed process
        # group that anything still refers to.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stopped.code)
