"""What the speed benchmark and the GPU check share: flags, JPEG files, networks, sources."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import models
from relabel.teacher import use_batch_statistics
from utils import runtime
from utils.cli import UserError, bounded
from utils.data import datasets, folders, images
from utils.data.views import ViewSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the network, the images and the machine's flags."""
    add = parser.add_argument
    add("--model", default="ResNet18", help="teacher and student")
    add("--size", type=bounded(int, 8), default=224, metavar="S", help="in pixels")
    add("--classes", type=bounded(int, 2), default=16, metavar="N")
    add("--ipc", type=bounded(int, 1), default=10, metavar="N", help="per class")
    add("--batch-size", type=bounded(int, 2), default=16, metavar="N")
    runtime.add_arguments(parser)
    parser.set_defaults(workers=min(16, runtime.usable_cores()))


class Bench:
    """What all measurements share: flags, machine, JPEG files and what views are drawn from."""

    def __init__(self, args: argparse.Namespace, root: Path):
        """Prepares this process as the flags ask; `root` is for files that are thrown away."""
        self.args, self.root, self.machine = args, root, runtime.from_arguments(args)
        write_jpegs(root / "images", args.classes, args.ipc, args.size)
        facts = datasets.named("imagenet1k")
        self.dataset = datasets.Dataset("bench", args.classes, args.size, facts.mean, facts.std)
        self.folder = folders.scan(root / "images")
        self.sizes = np.full((len(self.folder.files), 2), args.size)  # heights and widths
        self.spec = ViewSpec(args.size, args.batch_size)

    def begin_stage(self) -> runtime.Runtime:
        """Prepares this process as our stages are: on a CPU they keep what they free."""
        return runtime.start(device=str(self.machine.device), amp=self.machine.precision)

    def resident(self) -> images.ResidentImages:
        """The decoded images, on the device."""
        return images.open_images(self.folder, self.sizes, self.dataset, self.machine.device, 0)

    def network(self, memory_format: torch.memory_format) -> nn.Module:
        """The network with the weights of seed 0; raises UserError when there is none."""
        torch.manual_seed(0)
        try:
            model = models.build(self.args.model, self.args.classes, self.args.size)
        except ValueError as error:
            raise UserError(f"--model: {error}") from None
        return model.to(self.machine.device, memory_format=memory_format)

    def teacher(self, memory_format: torch.memory_format) -> nn.Module:
        """The network as a teacher under BSSL."""
        model = self.network(memory_format).requires_grad_(False).eval()
        use_batch_statistics(model)
        return model


def write_jpegs(root: Path, classes: int, ipc: int, size: int) -> None:
    """Smooth random colours with some noise, as JPEGs of quality 90: classes x ipc files."""
    random = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"{label:05d}"
        folder.mkdir(parents=True)
        for position in range(ipc):
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float)
            noisy = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255)
            picture = Image.fromarray(noisy.astype(np.uint8))
            picture.save(folder / f"{position:03d}.jpg", quality=90)
