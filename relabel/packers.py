"""Passes of a label set packed and written by processes of their own, beside the labelling."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from utils import runtime
from utils.cli import ENDING_SIGNALS, UserError, world_size
from utils.data.views import Views
from utils.labels import LabelWriter

_MOST = 8  # packers beside a GPU, unless told otherwise: a teacher may label faster than 4 pack
_FEW = 30_000  # labels of 1000 classes that are packed in five seconds, which starting one took
_COPIES = 4  # of the float32 logits of a pass that a packer is reckoned to hold while packing
_IN_FLIGHT = 4  # those of two passes in pinned memory, which is handed out in powers of two


def default_packers(device: torch.device, writer: LabelWriter) -> int:
    """How many processes pack beside a device: as many as cores and memory allow, none on a CPU.

    There, a small network labelled half as fast beside a second thread (measured). Nor for few
    labels, which are packed before a process has started.
    """
    if device.type != "cuda" or writer.settings["passes"] * len(writer.sizes) < _FEW:
        return 0
    local = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's processes on this machine
    sharing = max(1, int(local)) if local.isdecimal() else world_size()
    pass_bytes = 4 * len(writer.sizes) * writer.settings["num_classes"]
    room = runtime.available_memory() // sharing - _IN_FLIGHT * pass_bytes
    with_room = max(room, 0) // (_COPIES * pass_bytes)
    return min(_MOST, max(1, runtime.usable_cores() // sharing - 1), with_room)


@contextlib.contextmanager
def pass_writer(writer: LabelWriter, packers: int) -> Iterator[Callable[..., None]]:
    """Gives a function like `writer.write_pass`; on leaving, what it was given is on disk.

    It returns when one of at most `packers` processes has taken the pass, so that the next can be
    labelled meanwhile; with none it is `writer.write_pass`. Processes are started one by one, when
    all others are at work, and each holds one pass, whose views `writer.draw` gives. An error of
    theirs, or UserError where one was ended from outside, is raised by a later call, or on leaving.
    """
    if packers == 0:
        yield writer.write_pass
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU may hang
    processes, idle, busy = [], [], []

    def start() -> None:
        ours, theirs = spawn.Pipe()
        arguments = (theirs, writer.path, writer.settings, writer.sizes)
        processes.append(spawn.Process(target=_pack, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()  # so that its end is noticed
        busy.append(ours)  # until it says that it is there

    def collect(seconds: float | None) -> None:
        for connection in multiprocessing.connection.wait(busy, seconds):
            busy.remove(connection)
            if (error := connection.recv()) is not None:
                raise error
            idle.append(connection)

    def write_pass(
        pass_index: int, logits: torch.Tensor, views: Views, hard_labels: torch.Tensor
    ) -> None:
        with _end_noticed():
            collect(seconds=0)
            if not idle and len(processes) < packers:
                start()
            while not idle:
                collect(seconds=None)
            connection = idle.pop()
            busy.append(connection)
            # Through the pipe and not through shared memory, of which a container may have little.
            connection.send((pass_index, hard_labels.numpy()))
            connection.send_bytes(logits.contiguous().numpy())

    try:
        yield write_pass
    except SystemExit:  # a signal's, which has ended the processes, too
        busy.clear()
        raise
    finally:
        try:
            with _end_noticed():
                while busy:
                    collect(seconds=None)
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextlib.contextmanager
def _end_noticed() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError):
        raise UserError(
            "a process that packs labels was ended from outside, perhaps for lack of memory; run "
            "the same command again (fewer --packers take less)"
        ) from None


def _pack(connection: Connection, path: Path, settings: dict, sizes: np.ndarray) -> None:
    """In a process of its own: packs and writes the passes that come, until it is ended."""
    for signal_number in ENDING_SIGNALS:  # the process that labels is told, and ends this one
        signal.signal(signal_number, signal.SIG_IGN)
    torch.set_num_threads(1)
    runtime.keep_freed_memory()
    with contextlib.suppress(EOFError, ConnectionError):  # when the process that labels is gone
        try:
            writer = LabelWriter(path, settings, sizes)
            logits = np.empty((len(sizes), settings["num_classes"]), dtype=np.float32)
            while True:
                connection.send(None)  # ready for the next pass
                pass_index, hard_labels = connection.recv()
                connection.recv_bytes_into(logits.reshape(-1))
                labels, views = torch.from_numpy(hard_labels), writer.draw(pass_index)
                writer.write_pass(pass_index, torch.from_numpy(logits), views, labels)
        except Exception as error:  # whatever it is, the process that labels raises it
            connection.send(error)
