"""The label set on disk: a manifest, and one file of soft labels per pass.

docs/label-format.md describes the folder. `LabelWriter` makes a set, `LabelSet` reads one.
"""

from utils.labels.manifest import first_difference, make_settings
from utils.labels.reader import LabelSet
from utils.labels.writer import LabelWriter, centre

__all__ = ["LabelSet", "LabelWriter", "centre", "first_difference", "make_settings"]
