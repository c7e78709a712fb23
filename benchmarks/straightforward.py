"""The straightforward pipeline: relabel and train as a user of PyTorch would write them.

Every view is a JPEG decoded, cropped and resized by PIL in DataLoader workers; the teacher labels
one batch per forward pass in fp32; training is eager fp32 with the usual `.item()` in its loop.
What the speed benchmark compares with; nothing else uses it.
"""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional, v2

from benchmarks.bench import Bench
from utils.data.views import Views, draw

SMOOTHING = 0.8  # of hard labels, in both pipelines


def to_input(bench: Bench) -> list:
    """PIL image -> float32 [3, S, S], normalised."""
    return [transforms.ToTensor(), transforms.Normalize(bench.dataset.mean, bench.dataset.std)]


class GivenCrops(Dataset):
    """Item k: the crop of view k, float32 [3, S, S], so that both pipelines see the same."""

    def __init__(self, bench: Bench, views: Views):
        self.folder, self.views = ImageFolder(str(bench.folder.root)), views
        self.size, self.to_input = [bench.args.size] * 2, transforms.Compose(to_input(bench))

    def __len__(self) -> int:
        return len(self.views.index)

    def __getitem__(self, view: int) -> torch.Tensor:
        image, _ = self.folder[int(self.views.index[view])]
        image = functional.resized_crop(image, *self.views.box[view].tolist(), self.size)
        return self.to_input(functional.hflip(image) if self.views.flip[view] else image)


def loader(bench: Bench, dataset: Dataset, shuffle: bool) -> DataLoader:
    """Batches of a data set; its workers live on between passes."""
    return DataLoader(
        dataset,
        batch_size=bench.args.batch_size,
        shuffle=shuffle,
        num_workers=bench.args.workers,
        persistent_workers=bench.args.workers > 0,
        pin_memory=bench.machine.device.type == "cuda",
    )


class Relabelling:
    """Labels the views of our first pass and saves them as the published code does."""

    def __init__(self, bench: Bench):
        self.views = draw(bench.spec, bench.sizes, seed=0)
        self.loader = loader(bench, GivenCrops(bench, self.views), shuffle=False)
        self.teacher = bench.teacher(torch.contiguous_format)
        self.path, self.device = bench.root / "epoch.tar", bench.machine.device

    def run(self, passes: range) -> int:
        """Labels all views, once for each pass; returns their number."""
        return sum(len(self.label()) for _ in passes)

    @torch.no_grad()
    def label(self) -> torch.Tensor:
        """Labels and saves all views batch by batch; returns float32 [N, C] logits."""
        saved, everything = [], []
        for one, crops in zip(self.views, self.loader, strict=True):
            crops, partner = crops.to(self.device), one.mix_index.to(self.device)
            top, left, height, width = one.mix_box[0].tolist()
            box = (..., slice(top, top + height), slice(left, left + width))
            mixed = crops.clone()
            mixed[box] = crops[partner][box]
            logits = self.teacher(mixed).cpu()
            soft = (logits / 20).softmax(1).half()
            saved.append([one.box, one.flip, one.mix_index, one.mix_box, soft])
            everything.append(logits)
        torch.save(saved, self.path)
        return torch.cat(everything)


class Training:
    """Epochs on hard labels with random crops, flips and CutMix."""

    def __init__(self, bench: Bench):
        crop = transforms.RandomResizedCrop(bench.args.size, (0.08, 1))
        steps = [crop, transforms.RandomHorizontalFlip(), *to_input(bench)]
        images = ImageFolder(str(bench.folder.root), transforms.Compose(steps))
        self.loader = loader(bench, images, shuffle=True)
        self.model = bench.network(torch.contiguous_format)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.cutmix, self.device = v2.CutMix(num_classes=bench.args.classes), bench.machine.device

    def run(self, epochs: range) -> int:
        """One view of every image in each epoch; returns the number of views."""
        self.model.train()
        for _ in epochs:
            loss_sum, correct = 0.0, 0
            for images, targets in self.loader:
                images, targets = images.to(self.device), targets.to(self.device)
                mixed, shares = self.cutmix(images, targets)
                logits = self.model(mixed)
                loss = F.cross_entropy(logits, shares, label_smoothing=SMOOTHING)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                loss_sum += loss.item() * len(images)
                correct += (logits.argmax(1) == targets).sum().item()
        return len(epochs) * len(self.loader.dataset)
