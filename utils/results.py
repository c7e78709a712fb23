"""Result files: rows of numbers as CSV that says where they came from."""

import csv
import datetime
import io
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.files import atomic_write


def provenance(command: str) -> str:
    """When, on what machine and by which command something is measured; for `write_csv`."""
    machine = f"{len(os.sched_getaffinity(0))}-core {platform.machine()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return f"{datetime.date.today()}; {machine}; torch {torch.__version__}; {command}"


def write_csv(
    rows: list[dict], path: Path, *about: str, columns: Sequence[str] | None = None
) -> None:
    """Writes rows as comma-separated values under a header.

    Args:
        rows: a dictionary for each line; what one lacks stays empty.
        path: the file.
        about: comments above the header.
        columns: the header (default: the keys of the first row).
    """
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in about)
    writer = csv.DictWriter(text, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())
