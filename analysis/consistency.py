"""Does a student say the same of two crops of an image?

Two random crops of every validation image: the Jensen-Shannon divergence of the student's two
predictions (0: the same, 1 bit: disjoint) and the cosine of the two vectors of probabilities. A
student that learned local drift contradicts itself between crops. Writes OUT.png and OUT.csv.

python analysis/consistency.py --out consistency "hard=runs/hard_*" "HALD=runs/hald_*"
    [--val-dir V] [--images 1000] [--min-scale 0.25]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
import shlex

import torch
from matplotlib.figure import Figure
from torch import nn

from analysis.compare import add_groups, finished_runs
from analysis.tables import column, grouped, mean_and_std, mean_std
from utils import cli, runlog
from utils.cli import bounded
from utils.data import folders, images
from utils.data.datasets import Dataset
from utils.data.views import Views, ViewSpec, draw
from utils.files import save_figure
from utils.results import provenance, write_csv
from validate.evaluate import load_student
from validate.settings import Settings

_BATCH = 128


def jensen_shannon(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence in bits, float [N], of probabilities [N, C]; 0 to 1."""
    entropy = torch.special.entr
    nats = entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2
    return nats.sum(1) / math.log(2)


@torch.inference_mode()
def predictions(model: nn.Module, source: images.StreamingImages, views: Views) -> torch.Tensor:
    """Probabilities float32 [N, C] for views, in the order of the images."""
    parts = [model(pixels).softmax(1) for pixels in source.render(list(views))]
    return torch.cat(parts)[views.index.argsort()]


def measure(run: Path, val_dir: Path, count: int, min_scale: float) -> dict[str, float]:
    """Means over images for one run: divergence in bits, cosine, share with the same top class."""
    model, saved = load_student(run / runlog.CHECKPOINT)
    dataset = Dataset(**saved["dataset"])
    folder = folders.scan(val_dir)
    folders.check_same_classes(folder, saved["classes"], str(run))
    sample = folder.sample(count)
    source = images.StreamingImages(sample.files, dataset, torch.device("cpu"), 0)
    sizes, _ = images.inspect(sample)
    spec = ViewSpec(dataset.input_size, _BATCH, min_scale, mix="none")
    one, other = (predictions(model.eval(), source, draw(spec, sizes, seed)) for seed in (0, 1))
    return {
        "jsd_bits": jensen_shannon(one, other).mean().item(),
        "cosine": torch.nn.functional.cosine_similarity(one, other).mean().item(),
        "same_class": 100 * (one.argmax(1) == other.argmax(1)).float().mean().item(),
    }


def draw_bars(rows: list[dict]) -> Figure:
    """A bar per group in three panels; error bars are standard deviations over runs."""
    panels = {
        "jsd_bits": "Jensen–Shannon divergence (bits)",
        "cosine": "cosine of the predictions",
        "same_class": "same top class (%)",
    }
    groups = grouped(rows, "group")
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (field, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for position, of_group in enumerate(groups.values()):
            mean, spread = mean_and_std(column(of_group, field))
            axes.bar(position, mean, yerr=spread, capsize=5, color=f"C{position}")
        names = [name for (name,) in groups]
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    most = max(map(len, groups.values()))
    figure.suptitle(f"two random crops of each image; mean ± std over {most} runs", fontsize=10)
    return figure


def main() -> None:
    parser = cli.Parser(description="Agreement of students with themselves between two crops.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="PNG to write, and a CSV beside it")
    add_groups(parser)
    add("--val-dir", type=Path, help="images (default: those of the runs)")
    add("--images", type=bounded(int, 1), default=1000, metavar="N", help="how many of them")
    about = "smallest crop as a share of the image's area"
    add("--min-scale", type=bounded(float, 0.0001, 1), default=0.25, metavar="X", help=about)
    args = parser.parse_args()
    rows = []
    for name, pattern in args.groups:
        for run in finished_runs(pattern):
            val_dir = args.val_dir or Path(Settings.from_record(run.settings(), run.path).val_dir)
            measured = measure(run.path, val_dir, args.images, args.min_scale)
            rows.append({"group": name, "run": run.path.name, **measured})
    command = shlex.join(["python", "analysis/consistency.py", *sys.argv[1:]])
    stem = args.out.name.removesuffix(".png")  # not with_suffix: it may have a dot of its own
    write_csv(rows, args.out.with_name(f"{stem}.csv"), provenance(command))
    save_figure(draw_bars(rows), args.out.with_name(f"{stem}.png"))
    for (name,), of_group in grouped(rows, "group").items():
        divergence, _ = mean_and_std(column(of_group, "jsd_bits"))
        cosine, _ = mean_and_std(column(of_group, "cosine"))
        same = f"same top class {mean_std(column(of_group, 'same_class'))} %"
        print(f"{name}: divergence {divergence:.3f} bits, cosine {cosine:.3f}, {same}")


if __name__ == "__main__":
    cli.run(main)
