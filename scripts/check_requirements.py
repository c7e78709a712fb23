"""Exits with 1, naming the first, unless every requirement of the given file is installed.

Uses only what every Python has, so that it runs before anything is installed.
"""

import re
import sys
from importlib import metadata
from pathlib import Path


def release(version: str) -> tuple[int, ...]:
    """The leading release numbers of a version: "2.15.0+cu132" -> (2, 15, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d|", version)[0].split(".") if part)


def unmet(requirements: Path) -> str | None:
    """The first requirement of a file ("name>=version" lines, "-r file") that is not met."""
    for line in requirements.read_text().splitlines():
        if line.startswith("-r "):
            problem = unmet(requirements.parent / line[3:].strip())
            if problem:
                return problem
        elif requirement := re.match(r"([\w.-]+)(?:>=([\d.]+))?(?:,<([\d.]+))?", line):
            name, minimum, end = requirement.groups()
            try:
                installed = metadata.version(name)
            except metadata.PackageNotFoundError:
                return f"{name} is not installed"
            if release(installed) < release(minimum or ""):
                return f"{name} {installed} is older than {minimum}"
            if end and release(installed) >= release(end):
                return f"{name} {installed} is not below {end}"
    return None


if __name__ == "__main__":
    problem = unmet(Path(sys.argv[1]))
    if problem:
        print(problem)
        sys.exit(1)
