"""Packing and writing passes in a thread of its own, while a GPU labels the next one."""

import contextlib
import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from utils.data.views import Views
from utils.labels import LabelWriter

_CHUNKS_AHEAD = 128  # labelled views that wait for the thread: at most so many forward passes


class _StoppedError(Exception):
    """The pass that the thread is writing will not be completed."""


def pass_writer(writer: LabelWriter, device: torch.device) -> contextlib.AbstractContextManager:
    """A context that gives what writes passes: a BackgroundWriter beside a GPU, else the writer.

    On a CPU another thread takes a core from the teacher's, which wait for each other at every
    layer: a small network then labelled half as fast (measured).
    """
    return BackgroundWriter(writer) if device.type == "cuda" else contextlib.nullcontext(writer)


class BackgroundWriter:
    """Hands the labels of passes, in order, to one thread that packs and writes them.

    Used as a context: on leaving it everything handed over is on disk, or, after an error, what
    was handed over whole. An error of the thread is raised by the next call, or on leaving.
    """

    def __init__(self, writer: LabelWriter):
        self._writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._passes: list[Future] = []  # not yet known to be written; at most two

    def write_pass(
        self,
        number: int,
        chunks: Iterable[torch.Tensor],
        views: Views,
        hard_labels: torch.Tensor,
    ) -> None:
        """Like LabelWriter.write_pass, but returns when the last chunk has been handed over.

        Args:
            chunks: float32 [n, C] on the CPU; computed in the caller's thread.
        """
        waiting: queue.Queue = queue.Queue(_CHUNKS_AHEAD)
        self._passes.append(
            self._thread.submit(
                self._writer.write_pass, number, _received(waiting), views, hard_labels
            )
        )
        try:
            for chunk in chunks:
                self._put(waiting, chunk)
            self._put(waiting, None)
        except BaseException:
            self._stop(waiting)
            raise
        if len(self._passes) > 1:
            self._passes.pop(0).result()

    def _put(self, waiting: queue.Queue, item: torch.Tensor | None) -> None:
        while True:
            for written in self._passes:
                if written.done():
                    written.result()  # raises the thread's error
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _stop(self, waiting: queue.Queue) -> None:
        """Makes the thread give up the pass that it receives through this queue."""
        while True:
            try:
                waiting.get_nowait()
            except queue.Empty:
                return waiting.put(_StoppedError())

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self._thread.shutdown()
        if kind is None:
            for written in self._passes:
                written.result()


def _received(waiting: queue.Queue) -> Iterator[torch.Tensor]:
    """The chunks put into a queue, up to None."""
    while (item := waiting.get()) is not None:
        if isinstance(item, _StoppedError):
            raise item
        yield item
