"""The label set on disk: a manifest, and one file of soft labels per pass.

`LabelWriter` makes a set pass by pass, in any order and from several processes; `LabelSet` reads
one and refuses whatever is incomplete, damaged, of another version or made for something else.
The folder is described in docs/label-format.md; views are drawn again from the seed, see
utils/data/views.py.
"""

from utils.labels.manifest import first_difference, make_settings
from utils.labels.reader import LabelSet
from utils.labels.writer import LabelWriter, centre

__all__ = ["LabelSet", "LabelWriter", "centre", "first_difference", "make_settings"]
