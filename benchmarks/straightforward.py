"""The straightforward pipeline: relabel and train as a user of PyTorch would write them.

Every view is a JPEG decoded, cropped and resized by PIL in DataLoader workers; the teacher labels
one batch per forward pass in fp32; training is eager fp32 with the usual `.item()` in its loop.
What the speed benchmark compares with; nothing else uses it.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

from utils.data import datasets
from utils.data.views import Views


class GivenCrops(Dataset):
    """Item k: the crop of view k, float32 [3, S, S]; the boxes are given, so that they can agree
    with those of another pipeline."""

    def __init__(self, root: Path, views: Views, facts: datasets.Dataset):
        self.folder = ImageFolder(str(root))
        self.index, self.box = views.index.tolist(), views.box.tolist()
        self.flip, self.size = views.flip.tolist(), facts.input_size
        normalise = transforms.Normalize(facts.mean, facts.std)
        self.finish = transforms.Compose([transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, view: int) -> torch.Tensor:
        image, _ = self.folder[self.index[view]]
        image = functional.resized_crop(image, *self.box[view], [self.size, self.size])
        return self.finish(functional.hflip(image) if self.flip[view] else image)


def crops_loader(
    root: Path, views: Views, facts: datasets.Dataset, workers: int, device: torch.device
) -> DataLoader:
    """Batches of GivenCrops in the order of the views; its workers live on between passes."""
    return DataLoader(
        GivenCrops(root, views, facts),
        batch_size=views.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


@torch.no_grad()
def relabel(
    teacher: nn.Module, loader: DataLoader, views: Views, path: Path, device: torch.device
) -> torch.Tensor:
    """Labels one pass batch by batch and saves it as the published code does.

    Args:
        teacher: fp32, its BatchNorm layers set to use the statistics of the batch.
        loader: see crops_loader.
        views: CutMix views.
        path: the file to write.

    Returns:
        float32 [N, C] logits.
    """
    saved, everything = [], []
    for one, crops in zip(views, loader, strict=True):
        crops = crops.to(device)
        top, left, height, width = one.mix_box[0].tolist()
        rows, columns = slice(top, top + height), slice(left, left + width)
        mixed = crops.clone()
        mixed[:, :, rows, columns] = crops[one.mix_index.to(device)][:, :, rows, columns]
        logits = teacher(mixed).cpu()
        soft = (logits / 20).softmax(1).half()
        saved.append([one.box, one.flip, one.mix_index, one.mix_box, soft])
        everything.append(logits)
    torch.save(saved, path)
    return torch.cat(everything)


def training_loader(
    root: Path, facts: datasets.Dataset, batch_size: int, workers: int, device: torch.device
) -> DataLoader:
    """RandomResizedCrop and flip of every image, shuffled; its workers live on between epochs."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(facts.input_size, (0.08, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(facts.mean, facts.std),
        ]
    )
    return DataLoader(
        ImageFolder(str(root), transform),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    smoothing: float,
    device: torch.device,
) -> tuple[float, float]:
    """One epoch on hard labels with CutMix; returns mean loss and top-1 in percent."""
    model.train()
    loss_sum, correct, seen = 0.0, 0, 0
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        size, lam = images.shape[-1], np.random.beta(1, 1)
        side = int(size * (1 - lam) ** 0.5)
        row, column = np.random.randint(size), np.random.randint(size)
        top, left = max(row - side // 2, 0), max(column - side // 2, 0)
        bottom, right = min(row + side // 2, size), min(column + side // 2, size)
        order = torch.randperm(len(images), device=device)
        images[:, :, top:bottom, left:right] = images[order][:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / size**2
        logits = model(images)
        own = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        partner = F.cross_entropy(logits, targets[order], label_smoothing=smoothing)
        loss = lam * own + (1 - lam) * partner
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(images)
        correct += (logits.argmax(1) == targets).sum().item()
        seen += len(images)
    return loss_sum / seen, 100 * correct / seen
