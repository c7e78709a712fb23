"""Exits with 1, naming the first, unless every requirement of the given file is installed.

Uses only what every Python has, so that it runs before anything is installed.
"""

import re
import sys
from importlib import metadata
from pathlib import Path


def release(version: str) -> list[int]:
    """The leading release numbers of a version: "2.15.0+cu132" -> [2, 15, 0]."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]


def unmet(requirements: Path) -> str | None:
    """The first line of a file ("name>=version,<version" or "-r file") that is not met."""
    for line in requirements.read_text().splitlines():
        if line.startswith("-r "):
            if problem := unmet(requirements.parent / line[3:].strip()):
                return problem
        elif requirement := re.match(r"([\w.-]+)(?:>=([\d.]+))?(?:,<([\d.]+))?", line):
            name, minimum, end = requirement.groups()
            try:
                installed = metadata.version(name)
            except metadata.PackageNotFoundError:
                return f"{name} is not installed"
            too_new = end and release(installed) >= release(end)
            if too_new or release(installed) < release(minimum or ""):
                return f"{line} is required, {installed} installed"
    return None


if __name__ == "__main__":
    sys.exit(unmet(Path(sys.argv[1])))
