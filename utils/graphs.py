"""Functions of tensors as CUDA graphs, which a GPU runs without waiting for single launches."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from utils.cli import UserError

Body = Callable[..., Tensor | None]
_WARM_UP = 3  # runs before a capture, in which cuDNN, cuBLAS, autocast and Adam set themselves up


class Graphs:
    """Runs functions of tensors as CUDA graphs, one for each function and shape of its tensors.

    A graph launches all kernels of a function at once, and repeats them on the same memory: the
    tensors are copied into buffers that stay, and whatever else changes from run to run is filled
    in place. Where there is no GPU, every run calls the function, on the buffers, too.
    """

    def __init__(self, device: torch.device, what: str):
        """Graphs on a device; `what` says in error messages what they do ("a training step")."""
        self.real = device.type == "cuda" and torch.cuda.is_available()
        self.what = what
        if self.real:
            self.side_stream = torch.cuda.Stream(device)
            self.memory_pool = torch.cuda.graph_pool_handle()
        self._recordings: dict[tuple, SimpleNamespace] = {}

    def run(self, name: object, body: Body, *tensors: Tensor | None) -> Tensor | None:
        """body(*tensors), where body and everything it refers to is the same for the same name.

        What it returns is overwritten by the next run of the same name and shapes. Raises UserError
        where the body cannot be captured, as it waits for the GPU.
        """
        key = (name, *(None if tensor is None else tensor.shape for tensor in tensors))
        if key not in self._recordings:
            buffers = [None if tensor is None else torch.empty_like(tensor) for tensor in tensors]
            recording = SimpleNamespace(buffers=buffers, runs=0, graph=None, result=None)
            self._recordings[key] = recording
        recording = self._recordings[key]
        for buffer, tensor in zip(recording.buffers, tensors, strict=True):
            if tensor is not None:
                buffer.copy_(tensor)
        recording.runs += 1
        if not self.real:  # results are overwritten, too, so that tests see who relies on them
            result, last = body(*recording.buffers), recording.result
            recording.result = result if last is None or result is None else last.copy_(result)
            return recording.result
        if recording.runs <= _WARM_UP:
            self.side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side_stream):
                result = body(*recording.buffers)
            torch.cuda.current_stream().wait_stream(self.side_stream)
            return result
        if recording.graph is None:
            self._capture(recording, body)
        recording.graph.replay()
        return recording.result

    def _capture(self, recording: SimpleNamespace, body: Body) -> None:
        """Makes the graph of the body; capturing it computes nothing."""
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            # Other threads, which draw views and pin memory, may allocate memory meanwhile.
            with torch.cuda.graph(graph, pool=self.memory_pool, capture_error_mode="thread_local"):
                try:
                    recording.result = body(*recording.buffers)
                except BaseException as error:  # leaving the capture raises another one
                    cause = error
                    raise
        except BaseException as error:
            cause = cause or error
            if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, RuntimeError):
                raise cause from None
            reason = (str(cause) or type(cause).__name__).splitlines()[0]
            what = f"{self.what} cannot be captured as a CUDA graph ({reason})"
            raise UserError(f"{what}; --no-graph does without") from None
        recording.graph = graph
