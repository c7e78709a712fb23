"""Makes an image data set from typefaces: 200 characters that look different, 32x32 pixels.

mkdir debs && cd debs && apt-get download $(cat ../benchmarks/glyphs_packages.txt) && cd ..
for package in debs/*.deb; do dpkg -x "$package" fonts; done
python benchmarks/glyphs.py --fonts fonts --out-dir D

An image is one character in one typeface family. Families that share a folder are related, so they
are all in train/, all in val/ or all in test/, and at most three of them are taken.
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from utils import cli
from utils.cli import UserError
from utils.files import atomic_write, to_json, whole_folder

SIZE, BASELINE, CENTRE = 32, 23, 16
POINTS = 24  # font size in pixels; the size also tells c from C
CLASSES = 200
SHARES = {"test": 0.25, "val": 0.15}  # of the families; the rest is train
RELATED = 3
COMMON = 0.6  # a character must be in so many of the training families
PLAIN = ("regular", "book", "roman", "medium", "normal", "text")
# Latin with accents, Greek and Cyrillic.
CANDIDATES = [*range(0x21, 0x7F), *range(0xA1, 0x180), *range(0x386, 0x3CF), *range(0x400, 0x460)]


def find_families(root: Path) -> dict[str, tuple[Path, set[int]]]:
    """One upright, regular face per family, by name: its file and the characters it has.

    Of related families, those with the most characters.
    """
    best: dict[str, tuple[bool, str, Path, set[int]]] = {}
    for path in sorted([*root.rglob("*.ttf"), *root.rglob("*.otf")]):
        try:
            face = FT2Font(str(path))
        except RuntimeError:
            continue
        style, has = face.style_name.lower(), set(face.get_charmap())
        slanted = "italic" in style or "oblique" in style
        if not slanted and has.issuperset(map(ord, "AaZz09")):
            candidate = style not in PLAIN, path.name, path, has
            best[face.family_name] = min(best.get(face.family_name, candidate), candidate)
    related: dict[Path, list[tuple[int, str, Path, set[int]]]] = {}
    for name, (_, _, path, has) in best.items():
        related.setdefault(path.parent, []).append((-len(has), name, path, has))
    chosen = [face for group in related.values() for face in sorted(group)[:RELATED]]
    return {name: (path, has) for _, name, path, has in sorted(chosen, key=lambda face: face[1])}


def split_families(families: dict[str, tuple[Path, set[int]]]) -> dict[str, list[str]]:
    """Names of the families of test/, val/ and train/; those of one folder stay together."""
    folders = sorted({path.parent for path, _ in families.values()})
    order = np.argsort(np.random.Philox(0).random_raw(len(folders)))
    splits, split_of, start = {"test": [], "val": [], "train": []}, {}, 0
    for split, share in SHARES.items():
        end = start + round(share * len(folders))
        split_of.update({folders[index]: split for index in order[start:end]})
        start = end
    for name, (path, _) in families.items():
        splits[split_of.get(path.parent, "train")].append(name)
    return splits


def draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """uint8 [32, 32], white on black on a common baseline."""
    image = Image.new("L", (SIZE, SIZE))
    left, _, right, _ = font.getbbox(character, anchor="ls")
    start = (CENTRE - (left + right) / 2, BASELINE)
    ImageDraw.Draw(image).text(start, character, fill=255, font=font, anchor="ls")
    return np.asarray(image)


def render_family(path: Path, has: set[int]) -> dict[str, np.ndarray]:
    """The images of all candidates that a face has and shows."""
    font = ImageFont.truetype(str(path), POINTS)
    # A face without a glyph of its own for a character often shows the same box for all of them.
    missing = draw(font, "\ufffe")
    images = {}
    for code in has.intersection(CANDIDATES):
        pixels = draw(font, chr(code))
        if pixels.max() > 128 and not np.array_equal(pixels, missing):
            images[chr(code)] = pixels
    return images


def choose_characters(families: list[dict[str, np.ndarray]]) -> list[str]:
    """200 characters, one by one the one that differs most from its nearest among those chosen.

    The difference of two characters is that of their mean images, each scaled to length 1.
    """
    common, means = [], []
    for character in map(chr, CANDIDATES):
        shown = [images[character] for images in families if character in images]
        if len(shown) >= COMMON * len(families):
            common.append(character)
            means.append(np.mean(shown, axis=0).ravel())
    if len(common) < CLASSES:
        raise UserError(f"only {len(common)} characters are in most typefaces; {CLASSES} needed")
    directions = np.stack(means) / np.linalg.norm(means, axis=1, keepdims=True)
    distance = 1 - directions @ directions.T
    chosen = [0]
    while len(chosen) < CLASSES:
        chosen.append(int(distance[chosen].min(axis=0).argmax()))
    return sorted(common[index] for index in chosen)


def main() -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--fonts", type=Path, required=True, help="folder, searched recursively")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder to make")
    args = parser.parse_args()
    families = find_families(args.fonts)
    if len(families) < 20:
        raise UserError(f"{args.fonts} holds {len(families)} usable typeface families; 20 needed")
    images = {name: render_family(*face) for name, face in families.items()}
    splits = split_families(families)
    characters = choose_characters([images[name] for name in splits["train"]])
    with whole_folder(args.out_dir) as partial:
        for split, names in splits.items():
            for label, character in enumerate(characters):
                folder = partial / split / f"{label:05d}"
                folder.mkdir(parents=True)
                for position, name in enumerate(names):
                    if character in images[name]:
                        picture = Image.fromarray(images[name][character]).convert("RGB")
                        picture.save(folder / f"{position:03d}.png")
            print(f"{split}: {len(names)} families")
        record = {"characters": characters, "families": splits}
        atomic_write(partial / "glyphs.json", to_json(record))


if __name__ == "__main__":
    cli.run(main)
