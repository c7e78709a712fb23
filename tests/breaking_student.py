"""A student that fails in the tenth training batch of the rank that BREAK_RANK names.

Where THREADS_FILE names a file, every process adds to it the names of its last threads.
"""

import atexit
import contextlib
import os
from pathlib import Path

import models


def build(num_classes: int):
    """A ConvNetW32 of `models`."""
    if "THREADS_FILE" in os.environ:
        atexit.register(_add_threads, Path(os.environ["THREADS_FILE"]))
    model = models.build("ConvNetW32", num_classes, 32)
    if os.environ.get("BREAK_RANK") == os.environ.get("RANK", "none"):
        batches = []

        def count(module, inputs):
            batches.append(module.training)
            if sum(batches) == 10:
                raise ValueError("broken on purpose")

        model.register_forward_pre_hook(count)
    return model


def _add_threads(path: Path) -> None:
    with path.open("a") as file:
        for name in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # it has just ended
                file.write(name.read_text())
