"""The user's own kinds of epoch and codecs: every file in extensions/ at the repository root.

Such a file defines a class that registers itself by its base class; nothing else names it. The
folder is code like the rest of the repository, and no data file can add to it.
"""

import importlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "extensions"


def load() -> None:
    """Imports the files of the folder, in the order of their names; entry scripts call it first."""
    for path in sorted(FOLDER.glob("*.py")):
        importlib.import_module(f"{FOLDER.name}.{path.stem}")
