"""Result files: rows of numbers as CSV that says where they came from."""

import csv
import datetime
import io
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.files import atomic_write
from utils.hardware import processor
from utils.runtime import usable_cores


def provenance(command: str) -> str:
    """When, on what machine and by which command something is measured; for `write_csv`."""
    name = f"{usable_cores()} cores of {processor()}"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{datetime.date.today()}; {name}; torch {torch.__version__}; {command}"


def write_csv(rows: list[dict], path: Path, *about: str, columns: Sequence[str] = ()) -> None:
    """Writes rows as comma-separated values under a header, by default the keys of the first row.

    Comments, `about`, go above it. What a row lacks stays empty.
    """
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in about)
    writer = csv.DictWriter(text, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode())
