"""Is Adam's eps small beside the gradients of an unscaled soft loss?

Adam divides by sqrt(v) + eps with eps = 1e-8: where gradients are not far above it, steps shrink.
Takes the gradients of the soft loss with and without T^2 on stored batches of a run, element by
element, in fp32 and in bf16 autocast, for fresh and for trained weights. Writes OUT.png (their
distribution) and OUT.csv (root mean square over all elements, and the share of the elements that
are, by root mean square over batches, below eps).

python analysis/adam_eps.py --run RUN --out adam_eps [--batches 4]
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import copy
import dataclasses

import torch
from matplotlib.figure import Figure

from analysis.replay import (
    Replay,
    add_arguments,
    gradients,
    soft_plan_of,
    two_losses,
    weights_of,
)
from analysis.tables import this_command
from utils import cli
from utils.cli import bounded
from utils.files import save_png
from utils.results import provenance, write_csv

EPS = 1e-8  # torch.optim.AdamW's default, which training uses


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Gradients of the soft loss beside Adam's eps.")
    add_arguments(parser)
    parser.add_argument(
        "--batches", type=bounded(int, 1), default=4, metavar="N", help="stored batches looked at"
    )
    return parser.parse_args()


def root_mean_squares(replay: Replay, model: torch.nn.Module, batches: int, amp) -> torch.Tensor:
    """float32 [parameters]: per element, over batches, of the soft loss's gradient without T^2."""
    probe = copy.deepcopy(model).train()
    numbers = replay.plan.batch_numbers[:batches]
    views = [replay.epochs.labels.views(number) for number in numbers]
    total = torch.zeros(sum(p.numel() for p in probe.parameters()))
    for number, pixels in zip(numbers, replay.source.render(views), strict=True):
        with amp():
            logits = probe(pixels)
        loss = two_losses(replay.plan, replay.epochs, number, logits.float())[1]
        parts = gradients(loss, probe, keep_graph=False)
        total += torch.cat([part.float().flatten() for part in parts]).cpu().square()
    return (total / len(numbers)).sqrt()


def draw(found: dict[tuple[str, str], torch.Tensor], scale: float, title: str, path: Path) -> None:
    """A panel per precision: histograms of the elements' sizes, with and without T^2."""
    precisions = list(dict.fromkeys(precision for _, precision in found))
    figure = Figure(figsize=(6 * len(precisions), 4.2), layout="constrained")
    bins = torch.linspace(-14, 1, 91)
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        for place, weights in enumerate(dict.fromkeys(name for name, _ in found)):
            logs = found[weights, precision].clamp(min=1e-14).log10()
            for factor, style in ((1.0, "-"), (scale, "--")):
                counts = torch.histogram(logs + torch.tensor(factor).log10(), bins).hist
                label = f"{weights}, {'unscaled' if factor == 1 else 'x T²'}"
                axes.stairs(
                    100 * counts / len(logs), bins, color=f"C{place}", ls=style, label=label
                )
        axes.axvline(torch.tensor(EPS).log10(), color="k", lw=1, label="Adam's eps = 1e-8")
        axes.set_title(precision, fontsize=10)
        axes.set_xlabel("log10 of a gradient element\n(root mean square over batches)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of the elements (%)")
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_png(figure, path)


def main() -> None:
    args = parse_arguments()
    plan = soft_plan_of(args.run)
    replay = Replay(plan, "adam_eps")
    trained = copy.deepcopy(replay.model)
    trained.load_state_dict(weights_of(args.run))
    scale, found, rows = plan.settings["temperature"] ** 2, {}, []
    for name, model in (("fresh weights", replay.model), ("trained weights", trained)):
        for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            machine = dataclasses.replace(plan.machine, dtype=dtype)
            sizes = root_mean_squares(replay, model, args.batches, machine.autocast)
            found[name, precision] = sizes
            for loss, factor in (("none", 1.0), ("T2", scale)):
                rows.append(
                    {
                        **{"network": plan.settings["model"], "weights": name},
                        **{"precision": precision, "soft_loss_scale": loss},
                        "rms": f"{factor * sizes.square().mean().sqrt().item():.3g}",
                        "median": f"{factor * sizes.median().item():.3g}",
                        "below_eps_percent": f"{100 * (factor * sizes < EPS).float().mean():.3g}",
                        "below_100_eps_percent": (
                            f"{100 * (factor * sizes < 100 * EPS).float().mean():.3g}"
                        ),
                    }
                )
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    replay.bar.close()
    write_csv(rows, args.out.with_suffix(".csv"), provenance(this_command()))
    title = (
        f"{plan.settings['model']} on {plan.dataset.num_classes} classes, soft loss at "
        f"T = {plan.settings['temperature']:g}"
    )
    draw(found, scale, title, args.out.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
