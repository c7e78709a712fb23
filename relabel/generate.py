"""Labels random views of distilled images with a pretrained teacher and stores the labels.

python relabel/generate.py --data-dir D --label-dir L --dataset imagenet1k --teacher ResNet18
    --slc 150
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import collections
from collections.abc import Iterable, Iterator, Sequence

import torch
from tqdm import tqdm

from relabel.packers import default_packers, pass_writer
from relabel.recipe import choose_views
from relabel.teacher import (
    Ensemble,
    SomeClasses,
    label_views,
    load_teacher,
    training_facts,
    use_batch_statistics,
)
from utils import cli, recipe, runtime
from utils.cli import UserError, bounded
from utils.data import custom, datasets, folders, images
from utils.data.datasets import Dataset
from utils.data.views import MIXES, ORDER, Views, ViewSpec, centre_views, shuffle
from utils.labels import LabelSet, LabelWriter, codecs, make_settings
from utils.metrics import near_chance

_FEWEST_CHECKED, _MOST_CHECKED = 64, 1024  # images that tell whether the class order is right
_MANY_CLASSES = 100  # from which on a fitted codec saves much
ImageSource = images.ResidentImages | images.StreamingImages


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or other arguments."""
    parser = cli.Parser(description="Label random views of distilled images with a teacher.")
    number = {"type": bounded(int, 1), "metavar": "N"}
    optional = {"action": argparse.BooleanOptionalAction}
    parser.add_argument("--data-dir", type=Path, required=True, help="distilled images")
    parser.add_argument("--label-dir", type=Path, required=True, help="the label set to make")
    datasets.add_arguments(parser)

    add = parser.add_argument_group("teacher").add_argument
    about = "a network of models/, a torchvision name, timm:NAME or package.module:factory; "
    about += "several are averaged"
    add("--teacher", nargs="+", required=True, metavar="NAME", help=about)
    about = "a state dict per teacher; default: $Main_Data_Path/<dataset>/NAME.pth, else "
    about += "$Main_Data_Path/NAME.pth, else torchvision's"
    add("--teacher-weights", nargs="+", type=Path, metavar="FILE", help=about)
    about = "take the averaged weights of files that hold both (state_dict_ema, model_ema)"
    add("--teacher-ema", action="store_true", help=about)
    about = "label by those of a teacher's classes that the class folders name: a text file of "
    about += "all of them in the teacher's order, a line each that begins with the WordNet id "
    about += "(default: all; of ImageNet's, those of imagenette and imagewoof)"
    add("--teacher-classes", type=Path, metavar="FILE", help=about)
    about = "weight of each teacher's logits in the mean (default: equal)"
    add("--teacher-shares", nargs="+", type=bounded(float, 0), metavar="W", help=about)
    about = "BatchNorm statistics from the batch itself (default: on, but off for images that "
    about += "scripts/prepare_distilled.py selected)"
    add("--bssl", **optional, help=about)

    group = parser.add_argument_group("labels")
    add, amount = group.add_argument, group.add_mutually_exclusive_group(required=True)
    amount.add_argument("--slc", **number, help="soft labels per class, a multiple of IPC")
    amount.add_argument("--passes", **number, help="soft labels per image, for classes of any size")
    about = "views that are mixed with each other, and that BSSL takes its statistics from; the "
    about += "student's batch size, too"
    add("--batch-size", **number, default=16, help=about)
    about = "gives --mix and --min-scale, each unless it is given; auto: by how often the teacher "
    about += "is right on small crops"
    add("--recipe", choices=recipe.RECIPES, default="published", help=about)
    about = "how views of a batch are mixed (default: the recipe's, cutmix as published)"
    add("--mix", choices=MIXES, help=about)
    about = "smallest crop as a share of the image's area (default: the recipe's, 0.08 as "
    about += "published)"
    add("--min-scale", type=bounded(float, 0.0001, 1), metavar="X", help=about)
    codecs.add_arguments(group, default="fp16")
    add("--seed", type=bounded(int, 0, 2**62), default=42, metavar="N", help="of the views")
    add("--force", action="store_true", help="go on although the class order looks scrambled")

    runtime.add_arguments(parser)
    about = "views that the teacher labels in one forward pass, in whole batches; BSSL's "
    about += "statistics stay those of single batches (default: 256 on a GPU, one batch on a CPU)"
    parser.add_argument("--views-per-forward", **number, help=about)
    about = "on a GPU, label by CUDA graphs, which hold all kernels of a forward pass"
    parser.add_argument("--graph", **optional, default=True, help=about)
    about = "processes that pack labels, as many as keep up (default: up to 8 beside a GPU, "
    about += "as cores and memory allow; 0, the labelling process itself, on a CPU)"
    parser.add_argument("--packers", type=bounded(int, 0), metavar="N", help=about)
    args = parser.parse_args(arguments)
    if args.bssl is None:
        args.bssl = not folders.are_selected(args.data_dir)
    return args


def count_passes(args: argparse.Namespace, folder: folders.ImageFolder) -> tuple[int, int | None]:
    """Number of passes, and IPC (None when --passes is given); checks SLC and the last batch."""
    passes, ipc, made_of = args.passes, None, "this folder"
    if passes is None:
        ipc = folder.ipc()
        made_of = f"IPC {ipc} x {len(folder.classes)} classes"
        passes, rest = divmod(args.slc, ipc)
        if rest:
            raise UserError(f"--slc {args.slc} is not a multiple of IPC, which is {ipc} here")
    count = len(folder.files)
    if args.bssl and (count - 1) % args.batch_size == 0:
        raise UserError(
            f"{made_of} = {count} images in batches of {args.batch_size} leave a last batch of "
            "one image, which BSSL cannot label; choose another --batch-size or --no-bssl"
        )
    return passes, ipc


def tell_of_bssl(args: argparse.Namespace) -> None:
    """Prints a line about BSSL where images are selected ones."""
    if folders.are_selected(args.data_dir):
        print(
            f"{args.data_dir} has selected images, whose labels are usually made without BSSL: it "
            f"is {'on, as --bssl says' if args.bssl else 'off'}"
        )


def views_per_forward(args: argparse.Namespace, device: torch.device) -> int:
    """Views of one forward pass of the teacher, a multiple of the batch size.

    A setting, as it decides how results are rounded, wherever an interrupted set is continued.
    """
    wanted = args.views_per_forward or (256 if device.type == "cuda" else 1)
    return max(wanted // args.batch_size, 1) * args.batch_size


def load_teachers(
    args: argparse.Namespace, dataset: Dataset, classes: list[str], machine: runtime.Runtime
) -> Ensemble:
    """The teachers that the flags name, for these class folders."""
    count = len(args.teacher)
    for flag, values in (("weights", args.teacher_weights), ("shares", args.teacher_shares)):
        if values is not None and len(values) != count:
            raise UserError(
                f"--teacher-{flag}: {len(values)} given for {count} teachers; give one for each"
            )
    if args.teacher_shares is not None and sum(args.teacher_shares) == 0:
        raise UserError("--teacher-shares: at least one must be above 0")
    weights, listing = args.teacher_weights or [None] * count, args.teacher_classes
    teachers = [
        load_teacher(name, file, dataset, machine, args.teacher_ema, classes, listing)
        for name, file in zip(args.teacher, weights, strict=True)
    ]
    return Ensemble(teachers, args.teacher_shares, machine, graph=args.graph)


def check_class_order(
    args: argparse.Namespace,
    writer: LabelWriter,
    teachers: Ensemble,
    source: ImageSource,
    labels: torch.Tensor,
) -> None:
    """Stops when the teacher hardly recognises the images: their classes are in another order.

    Looks at unmixed central views with running statistics: of random images, until a quarter of
    them are recognised and that is no chance, and of a tenth of the labels to be made at most.
    """
    settings, count = writer.settings, len(labels)
    most = min(count, _MOST_CHECKED, max(settings["passes"] * count // 10, _FEWEST_CHECKED))
    chosen = shuffle(0, ORDER, 0, count)[:most]
    views = centre_views(writer.sizes[chosen], settings["views_per_forward"])
    views.index = torch.from_numpy(chosen)[views.index]
    num_classes, labels = int(labels.max()) + 1, labels.to(teachers.runtime.device)
    hits = count = 0
    labelled = label_views(teachers, source, [views])
    bar = cli.progress(labelled, desc="class order", total=len(views), leave=False, delay=2)
    for batch, logits in bar:
        hits += int((logits.argmax(1) == labels[batch.index]).sum())
        count += len(logits)
        doubtful = near_chance(hits, count, num_classes)
        if count >= _FEWEST_CHECKED and hits >= count / 4 and not doubtful:
            break
    top1 = 100 * hits / count
    print(f"teacher top-1 on central views of {count} images: {top1:.1f} %")
    if doubtful and not args.force:
        chance = f"guessing among {num_classes} classes"
        if isinstance(network := teachers.teachers[0].model, SomeClasses):
            chance += f" of its {network.total}"
        raise UserError(
            f"the teacher recognises only {top1:.1f} % of the images in {args.data_dir} ({chance} "
            f"gives {100 / num_classes:.1f} %): the class order is probably scrambled, or the "
            "weights are another data set's; --force goes on"
        )


def label_passes(
    passes: Iterable[int], writer: LabelWriter, teachers: Ensemble, source: ImageSource, bar: tqdm
) -> Iterator[tuple[int, Views, torch.Tensor]]:
    """Draws, renders and labels the views of passes, several batches in a forward pass.

    Yields the index of each pass, its views, and float32 [images, C] logits in main memory. A GPU
    is given the next pass before, so that it labels while one is packed. Raises UserError for
    logits that are not finite.
    """
    device, labelled = teachers.runtime.device, collections.deque()
    ahead = 1 if device.type == "cuda" else 0

    def finished() -> tuple[int, Views, torch.Tensor]:
        pass_index, views, fetched = labelled.popleft()
        logits = fetched()  # where images are resident, the only wait for the GPU
        if not logits.isfinite().all():
            raise UserError(
                f"the teacher gave NaN or infinite logits in pass {pass_index}; try --amp off, "
                "else its weights are broken"
            )
        return pass_index, views, logits

    for pass_index in passes:
        views, parts = writer.draw(pass_index), []
        together = writer.settings["views_per_forward"] // views.batch_size
        for pixels in source.render(views.to(device).groups(together)):
            parts.append(teachers.logits(pixels, views.batch_size))
            bar.update(len(pixels))
        labelled.append((pass_index, views, runtime.fetch(torch.cat(parts))))
        if len(labelled) > ahead:
            yield finished()
    while labelled:
        yield finished()


def fit_codec(
    writer: LabelWriter, teachers: Ensemble, source: ImageSource, hard_labels: torch.Tensor
) -> dict[int, tuple[Views, torch.Tensor]]:
    """Fits the writer's codec to the first passes; returns their views and logits by pass index."""
    needed = writer.passes_to_fit()
    with cli.progress(total=needed * len(hard_labels), desc="fit codec", unit="view") as bar:
        passes = label_passes(range(needed), writer, teachers, source, bar)
        labelled = {pass_index: (views, logits) for pass_index, views, logits in passes}
    writer.fit(labelled.values(), hard_labels, teachers.runtime.device)
    return labelled


def make_passes(
    writer: LabelWriter,
    teachers: Ensemble,
    source: ImageSource,
    hard_labels: torch.Tensor,
    packers: int,
) -> None:
    """Fits the codec where that is needed, and makes the missing passes, shared among ranks."""
    machine, labelled, missing = teachers.runtime, {}, []
    if machine.rank == 0:
        if writer.codec is None:
            labelled = fit_codec(writer, teachers, source, hard_labels)
        passes = range(writer.settings["passes"])
        missing = [pass_index for pass_index in passes if not writer.verified(pass_index)]
        if len(missing) < len(passes):
            done = len(passes) - len(missing)
            print(f"{done} of {len(passes)} passes are there and verified: skipped")
    missing, fitted = machine.from_first((missing, list(labelled)))
    writer.open_codec()
    unlabelled = [each for each in missing if each not in fitted]
    mine = unlabelled[machine.rank :: machine.world]
    done, total = (count * len(hard_labels) for count in (len(labelled), len(mine) + len(labelled)))
    bar = cli.progress(total=total, initial=done, desc="relabel", unit="view")
    with bar, pass_writer(writer, packers) as write_pass:
        for pass_index in missing:
            if pass_index in labelled:  # for the fit, on rank 0
                views, logits = labelled.pop(pass_index)
                write_pass(pass_index, logits, views, hard_labels)
                del logits
        for pass_index, views, logits in label_passes(mine, writer, teachers, source, bar):
            write_pass(pass_index, logits, views, hard_labels)
            del logits  # before the next is there: a pass of a whole training set takes gigabytes
    machine.barrier()


def main() -> None:
    args = parse_arguments()
    dataset = datasets.from_arguments(args, inferred=True)
    machine = runtime.start(args.device, args.amp)
    print(runtime.describe(machine))
    folder = folders.scan(args.data_dir, dataset.num_classes)
    passes, ipc = count_passes(args, folder)
    sizes, fingerprint = images.inspect(folder)
    trained_with = training_facts(args.teacher, args.teacher_weights, dataset)
    dataset = custom.complete(dataset, folder, sizes, trained_with, "the teacher's checkpoint")
    with machine.first_rank_first():  # so that only one downloads
        teachers = load_teachers(args, dataset, folder.classes, machine)
    measured = choose_views(args, teachers, folder, dataset)
    settings = make_settings(
        dataset=dataset,
        folder=folder,
        sizes=sizes,
        images_sha256=fingerprint,
        ipc=ipc,
        passes=passes,
        spec=ViewSpec(dataset.input_size, args.batch_size, args.min_scale, mix=args.mix),
        seed=args.seed,
        origin={
            "teachers": [
                {"name": teacher.name, "weights_sha256": teacher.sha256, "share": share}
                for teacher, share in zip(teachers.teachers, teachers.shares, strict=True)
            ],
            "bssl": args.bssl,
            "precision": machine.precision,
            "views_per_forward": views_per_forward(args, machine.device),
            **measured,
        },
        codec=codecs.from_arguments(args),
    )
    writer = LabelWriter(args.label_dir, settings, sizes)
    if machine.from_first(machine.rank == 0 and writer.complete()):
        print(f"{args.label_dir} is complete and verified: nothing to do")
        return
    source = images.open_images(folder, sizes, dataset, machine.device, args.workers)
    if machine.rank == 0:
        check_class_order(args, writer, teachers, source, folder.labels)
    if args.bssl and not sum(use_batch_statistics(one.model) for one in teachers.teachers):
        print("no teacher has BatchNorm: BSSL changes nothing")
    else:
        tell_of_bssl(args)
    packers = default_packers(machine.device, writer) if args.packers is None else args.packers
    if machine.rank > 0:
        make_passes(writer, teachers, source, folder.labels, packers)
        return
    with writer.begun():
        make_passes(writer, teachers, source, folder.labels, packers)
        manifest = writer.finish()
    total = passes * len(folder.files)
    size = LabelSet.open(args.label_dir).bytes_on_disk()
    print(
        f"{total} soft labels in {args.label_dir}: {size:,} bytes, "
        f"{size / total:.1f} per label; teacher top-1 on the views {manifest['teacher_top1']:.1f} %"
    )
    if args.codec == "fp16" and dataset.num_classes >= _MANY_CLASSES:
        print(
            "--codec klt takes an eighth to a fifth of that with 1000 classes; relabel/compress.py "
            "changes it"
        )


if __name__ == "__main__":
    cli.run(main)
