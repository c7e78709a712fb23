"""Gives class folders other names, by links: WordNet ids to numbers and back, numbers padded.

Folders are links to those of --data-dir, which stays as it is:
  * n01440764, ... become 00000, ... in sorted order, which is the order of ImageNet's labels;
  * with --names, numbers become the names that the file gives in number order: a class_names.json
    that this script wrote, or a text file with one name (or WordNet id and words) per line;
  * 0, 1, 10, 100, 2, ... become 00000, ... in number order: as text they sort differently, and
    class folders are read in text order.
class_names.json in --out-dir says which folder each link stands for.

python scripts/prepare_links.py --data-dir D --out-dir L [--names class_names.json]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import re

from utils import cli
from utils.cli import UserError
from utils.files import atomic_write, read_json, to_json, whole_folder

_RECORD = "class_names.json"
_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"[0-9]+")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Link class folders under other names: WordNet ids, numbers.")
    parser.add_argument("--data-dir", type=Path, required=True, help="class folders as they are")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder of links to make")
    parser.add_argument(
        "--names", type=Path, metavar="FILE", help="names for numbered folders, in number order"
    )
    return parser.parse_args()


def class_folders(root: Path) -> list[str]:
    """Names of the class folders; raises UserError unless all are WordNet ids or all numbers."""
    if not root.is_dir():
        raise UserError(f"image folder not found: {root}")
    names = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."
    )
    if not names:
        raise UserError(f"{root} is empty: it must hold one sub-folder of images per class")
    if all(_NUMBER.fullmatch(name) for name in names):
        return names
    for name in names:
        if not _WORDNET_ID.fullmatch(name):
            numbers = "a number beside other names" if _NUMBER.fullmatch(name) else "neither"
            raise UserError(
                f"{root}: the folders must be all WordNet ids (n01440764) or all numbers; {name!r} "
                f"is {numbers}"
            )
    return names


def in_number_order(root: Path, names: list[str]) -> list[str]:
    """The folders by number; raises UserError when a number is missing or there twice."""
    ordered = sorted(names, key=int)
    first = int(ordered[0])
    if first > 1:
        raise UserError(f"{root}: the folders' numbers begin at {first}, not at 0 or 1")
    for expected, name in enumerate(ordered, start=first):
        if int(name) < expected:
            raise UserError(f"{root}: the number {int(name)} is there twice ({name!r})")
        if int(name) > expected:
            raise UserError(f"{root}: there is no folder {expected}; is one missing?")
    return ordered


def read_names(path: Path) -> list[str]:
    """Folder names in class order from a JSON or text file.

    Raises:
        UserError: missing or damaged, a name that is there twice or cannot be a folder's, or names
            that are not sorted: class folders are read in text order, so classes would swap.
    """
    if not path.is_file():
        raise UserError(f"file of class names not found: {path}")
    if path.suffix == ".json":
        content = read_json(path)
        if isinstance(content, dict) and all(_NUMBER.fullmatch(key) for key in content):
            content = [content[key] for key in sorted(content, key=int)]
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise UserError(f"{path} must map numbers to names, or be a list of names")
        names = content
    else:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a text file") from None
        words = [line.split() for line in lines if line]
        has_ids = bool(words) and all(_WORDNET_ID.fullmatch(row[0]) for row in words)
        names = [row[0] for row in words] if has_ids else [line for line in lines if line]
    for position, name in enumerate(names):
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"{path}: class {position} is named {name!r}; no folder can be")
        if position and name <= names[position - 1]:
            raise UserError(
                f"{path}: {names[position - 1]!r} comes before {name!r}, but folders are read in "
                "text order, so the classes would be scrambled; names must be sorted and distinct"
            )
    return names


def new_names(root: Path, names_file: Path | None) -> dict[str, str]:
    """The existing folder for each new name."""
    folders = class_folders(root)
    numbered = _NUMBER.fullmatch(folders[0]) is not None
    if numbered:
        folders = in_number_order(root, folders)
    if names_file is None:
        names = [f"{index:05d}" for index in range(len(folders))]
        if names == folders:
            raise UserError(f"{root}: the folders are 00000, ... already; use it as it is")
    elif not numbered:
        raise UserError(f"--names goes with numbered folders; {root} has {folders[0]}, ...")
    else:
        names = read_names(names_file)
        if len(names) != len(folders):
            raise UserError(f"{names_file} has {len(names)} names, {root} {len(folders)} folders")
    return dict(zip(names, folders, strict=True))


def is_made(out: Path, root: Path, folders: dict[str, str]) -> bool:
    """Whether `out` holds exactly these links."""
    if not (out / _RECORD).is_file() or read_json(out / _RECORD) != folders:
        return False
    links = [out / name for name in folders]
    if not all(link.is_symlink() for link in links):
        return False
    return [link.readlink() for link in links] == [root / name for name in folders.values()]


def main() -> None:
    args = parse_arguments()
    root = args.data_dir.resolve()
    folders = new_names(root, args.names)
    if args.out_dir.resolve().is_relative_to(root):
        raise UserError(f"--out-dir {args.out_dir} is inside the source {root}; choose another")
    if is_made(args.out_dir, root, folders):
        print(f"{args.out_dir} is there already: nothing to do")
        return
    with whole_folder(args.out_dir) as out:
        for name, folder in folders.items():
            (out / name).symlink_to(root / folder, target_is_directory=True)
        atomic_write(out / _RECORD, to_json(folders))
    name, folder = next(iter(folders.items()))
    print(f"{args.out_dir}: {len(folders)} class folders linked, {folder} as {name} and so on")


if __name__ == "__main__":
    cli.run(main)
