"""The codec klt: a basis and class means fitted to the labels, one quantiser step."""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from utils.cli import UserError, bounded
from utils.data.views import Mixture
from utils.labels.codecs.base import BLOCK, Codec, Codes, distortion, flag, labels_to_fit
from utils.labels.codecs.packing import pack_integers, unpack_integers
from utils.labels.codecs.trellis import pack_numbers, quantise, unpack_numbers

# What klt aims at without a target: near-lossless. Settled by the study of accuracy per byte.
DEFAULT_DISTORTION = 0.002
HEADERS = 3 * 256  # bytes of codec.npz beside those of its arrays, nearly
LARGEST = (1 << 15) - 1  # of the absolute values of numbers of 16 bits
# The step of a trellis whose squared error is that of rounding to multiples of 1.
_TRELLIS_STEP = 0.58
# Squared error, in squared steps of the trellis, that a bit is worth.
_BIT_WORTH = 0.4


def _entropy_bits(values: Tensor) -> Tensor:
    """float64 [K]: bits that each column of whole numbers [N, K] needs at its own frequencies."""
    clipped = values.clamp(-2048, 2047).long()
    low = clipped.min()
    width = int(clipped.max() - low) + 1
    columns = torch.arange(clipped.shape[1], device=values.device) * width
    counts = torch.bincount((clipped - low + columns).flatten(), minlength=clipped.shape[1] * width)
    counts = counts.view(-1, width).double()
    nats = len(values) * math.log(max(len(values), 1)) - torch.xlogy(counts, counts).sum(1)
    return nats / math.log(2)


def _principal(centred: Tensor, rank: int = 1024) -> Tensor:
    """float32 [K, C]: orthonormal directions of [N, C], the largest variance first.

    All of them up to 4096 classes, by the eigenvectors of the covariance; above that the `rank`
    leading ones by torch.svd_lowrank, which draws its start: here always the same.
    """
    classes, device = centred.shape[1], centred.device
    if classes <= 4 * rank:
        scatter = torch.zeros(classes, classes, dtype=torch.float64, device=device)
        for chunk in centred.split(BLOCK):
            scatter += chunk.T @ chunk
        return torch.linalg.eigh(scatter.float()).eigenvectors.flip(1).T.contiguous()
    with torch.random.fork_rng(devices=[device] if centred.is_cuda else []):
        torch.manual_seed(0)
        _, _, directions = torch.svd_lowrank(centred, q=min(rank, len(centred)), niter=4)
    return directions.T.contiguous()


def _blend(class_means: Tensor, mixture: Mixture) -> Tensor:
    """[N, K]: lambda-weighted rows of class_means [classes, K]."""
    lam = mixture.lam[:, None]
    return lam * class_means[mixture.own] + (1 - lam) * class_means[mixture.partner]


def _class_means(values: Tensor, mixture: Mixture, num_classes: int) -> Tensor:
    """float32 [num_classes, K]: class means whose blends fit values [N, K] best.

    Least squares by the normal equations, shrunk as if every class had one label more, a label of
    the overall mean.
    """
    normal = torch.eye(num_classes, dtype=torch.float64, device=values.device)
    total = normal.new_zeros(num_classes, values.shape[1])
    shown = ((mixture.own, mixture.lam.double()), (mixture.partner, 1 - mixture.lam.double()))
    # index_put_ adds in a fixed order on a GPU, too, which index_add_ does not.
    for label, share in shown:
        total.index_put_((label,), share[:, None] * values, accumulate=True)
        for other, other_share in shown:
            normal.index_put_((label, other), share * other_share, accumulate=True)
    return torch.cholesky_solve(total, torch.linalg.cholesky(normal)).float()


class Klt(Codec):
    """The label minus what its class mean predicts, in the basis where logits decorrelate.

    Karhunen-Loeve transform: the basis are the principal directions of centred logits, and one
    quantiser step for all components spends bits where they reduce squared error most, which at
    high temperature is KL. What is coded of a coefficient is (coefficient - prediction) / step, as
    a number of a trellis (`trellis.quantise`) and scaled down a little before, which saves more
    bits than it adds error; the prediction is the lambda-weighted mean of the classes in the view,
    in the components where that pays. docs/label-format.md describes payload and codec.npz.
    """

    name = "klt"
    fitted = True
    default: ClassVar = {"distortion": DEFAULT_DISTORTION}
    flags: ClassVar = {
        "bytes_per_label": {
            "type": bounded(float, 0.1),
            "metavar": "N",
            "help": "budget for the logits, basis and class means included",
        },
        "distortion": {
            "type": bounded(float, 1e-6, 1),
            "metavar": "X",
            "help": "share of the label's information lost at temperature 20 "
            f"(default without a budget: {DEFAULT_DISTORTION})",
        },
    }

    def __init__(self, num_classes: int, arrays: dict[str, np.ndarray], **target: float):
        """From the content of codec.npz; `target` is what it was fitted to."""
        super().__init__(num_classes, **target)
        self._arrays = arrays
        scales = torch.from_numpy(arrays["scales"].astype(np.float32))
        components = (len(scales) - 1 - num_classes) // 2
        step, mean, scale, self.shrink = scales.split([1, num_classes, components, components])
        streams = (arrays[name].tobytes() for name in ("basis", "class_means"))
        basis, class_means = (
            torch.from_numpy(unpack_integers(stream, components * num_classes).astype(np.float32))
            for stream in streams
        )
        basis = basis.view(components, num_classes) * scale[:, None]
        self.step, self.mean = step.item(), mean - mean.mean()
        self.basis = basis - basis.mean(1, keepdim=True)
        self.class_means = class_means.view(components, num_classes).T.contiguous() * (step / 2)
        # The rounded basis is not quite orthonormal: least squares, not the transpose, inverts it.
        rows = self.basis.double()
        gram = rows @ rows.T
        gram += 1e-9 * gram.trace() * torch.eye(components)
        inverse = torch.cholesky_solve(rows, torch.linalg.cholesky(gram))
        self.projection = inverse.T.float().contiguous()

    def arrays(self) -> dict[str, np.ndarray]:
        return self._arrays

    def to(self, device: torch.device) -> "Klt":
        """Moves the fitted part to a device."""
        for name in ("basis", "mean", "class_means", "projection", "shrink"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def encode(self, logits: Tensor, mixture: Mixture) -> Codes:
        self.to(logits.device)
        coefficients = (logits - self.mean) @ self.projection
        coefficients = (coefficients - _blend(self.class_means, mixture)) * self.shrink / self.step
        if coefficients.numel() and coefficients.abs().max() > LARGEST - 4:
            reason = "a teacher's logits are thousands of times those that codec klt was fitted on"
            raise UserError(f"{reason}; a coarser --distortion or --codec fp16 can store them")
        return (quantise(coefficients.T.contiguous()).T,)

    def pack_codes(self, codes: Codes) -> bytes:
        numbers = codes[0].short().T.contiguous().cpu().numpy()
        return numbers.shape[1].to_bytes(4, "little") + pack_numbers(numbers)

    def unpack(self, payload: bytes) -> Codes:
        labels = int.from_bytes(payload[:4], "little")
        numbers = unpack_numbers(payload[4:], len(self.basis), labels)
        return (torch.from_numpy(numbers).T.contiguous(),)

    def expand(self, codes: Codes, mixture: Mixture) -> Tensor:
        self.to(codes[0].device)
        coefficients = codes[0].float() * self.step
        return torch.addmm(self.mean, coefficients + _blend(self.class_means, mixture), self.basis)

    @classmethod
    def fit(
        cls,
        samples: list[tuple[Tensor, Mixture]],
        num_classes: int,
        labels: int,
        pass_labels: int | None = None,
        **target: float,
    ) -> "Klt":
        """Fits basis, class means and step to the first labels of a set, on their device.

        `samples` are centred logits float32 [n, C] and their mixtures; `labels` is how many the
        fitted part will serve, as its bytes count pro rata, `pass_labels` how many are packed
        together (default: all). `target` is one of the options. Raises UserError when no step is
        coarse enough for the budget.

        Of a sample of at most 20,000 labels, four fifths give the basis and the means and the
        fifth label each is held back, to find the step that meets the target on labels that were
        not fitted. Where the sample is the whole set, all of it serves both ends.
        """
        count = min(labels, labels_to_fit(num_classes))
        logits = torch.cat([logits for logits, _ in samples])[:count]
        parts = zip(*(mixture for _, mixture in samples), strict=True)
        mixture = Mixture(*(torch.cat(part)[:count] for part in parts))
        fit = _Fit(logits, mixture, num_classes, labels, pass_labels or labels)
        return fit.search(target or cls.default)


class _Fit:
    """The statistics of a sample of labels, and the klt codec for any step."""

    def __init__(self, logits, mixture, num_classes, labels, pass_labels):
        self.num_classes, self.labels = num_classes, labels
        self.pass_labels = min(pass_labels, 8192)
        rows = torch.arange(len(logits), device=logits.device)
        train, probe = rows, rows[:: -(-len(rows) // 8192)]
        if len(logits) < labels and len(logits) >= 5:
            train, probe = rows[rows % 5 != 4], rows[rows % 5 == 4]
        self.probe, self.probe_mixture = logits[probe], mixture.rows(probe)
        self.mean = logits[train].mean(0)
        centred = logits[train] - self.mean
        self.directions = _principal(centred)
        # Of all the labels, but few multiplications: means of projections are projected means.
        class_means = _class_means(centred, mixture.rows(train), num_classes)
        self.class_means = class_means @ self.directions.T
        self.values = (self.probe - self.mean) @ self.directions.T
        self.energy = self.values.double().square().sum(0)
        self.deviation = (self.energy / len(probe)).sqrt().float().clamp(min=1e-6)
        self.unpredicted = self.values - _blend(self.class_means, self.probe_mixture)
        self.unpredicted_energy = self.unpredicted.double().square().sum(0)

    def search(self, target: dict[str, float]) -> Klt:
        """The codec of the coarsest step of a distortion, or of the finest of a budget.

        By secants of what steps cost, and by halves where these lead astray or take long, until it
        is what is wanted or half a percent less. Where cost jumps, the dearest step tried that
        costs less.
        """
        ((name, wanted),) = target.items()
        # How cost goes with the step, and about by which power of it.
        rising, slope = (-1, 1.0) if name == "bytes_per_label" else (1, 1.6)
        # Labels that are all the same need no components: any step will do.
        finest = max(float(self.values.abs().max()), 1e-3) * 8 / LARGEST
        coarsest = max(float(self.deviation.max()) * 16, 2 * finest)
        cheap, dear = sorted(rising * math.log(step) for step in (finest, coarsest))
        position = rising * math.log(self.likely_step(name, wanted) + finest)
        best, last = None, None
        for tried in range(24):
            codec = self.codec(math.exp(rising * position), target)
            excess = math.log(max(getattr(self, name)(codec), 1e-12) / wanted)
            if excess <= 0:
                cheap, best = position, codec
            else:
                dear = position
            if -0.005 <= excess <= 0 or dear - cheap < 0.0005:
                break
            if last is not None:
                slope = min(max((excess - last[1]) / (position - last[0]), 0.3), 5)
            last = position, excess
            position -= (excess + 0.0025) / slope
            if tried >= 12 or not cheap < position < dear:
                position = (cheap + dear) / 2
        if best is None:
            what = f"{flag(name)} {wanted:g} cannot be met for {self.labels} labels"
            raise UserError(f"{what}; give more, or take --codec fp16")
        return best

    def likely_step(self, name: str, wanted: float) -> float:
        """A step that costs about what is wanted, by reverse water-filling.

        For independent normally distributed components, the best code has the same squared error in
        all of them, but for those that are smaller (Cover and Thomas, Elements of Information
        Theory, section 10.3.3). Takes the error to be one of the variances.
        """
        energy, _ = torch.minimum(self.energy, self.unpredicted_energy).clamp(min=1e-30).sort()
        larger = torch.arange(len(energy) - 1, -1, -1, device=energy.device)
        if name == "distortion":
            lost = energy.cumsum(0) + larger * energy
            below = lost < wanted * self.probe.double().square().sum()
        else:
            logs = energy.log2()
            below = (logs.sum() - logs.cumsum(0) - larger * logs) / 2 > 8 * wanted
        error = energy[min(int(below.sum()), len(energy) - 1)] / len(self.probe)
        return _TRELLIS_STEP * math.sqrt(12 * error)

    def bytes_per_label(self, codec: Klt) -> float:
        """Bytes per label of the held-back labels, the fitted part included pro rata."""
        (codes,) = codec.encode(self.probe, self.probe_mixture)
        # Passes may be longer than what was held back, and a stream has a fixed part.
        rows = torch.arange(max(len(codes), self.pass_labels), device=codes.device) % len(codes)
        used = sum(len(codec.pack_codes((codes[part],))) for part in rows.split(self.pass_labels))
        return used / len(rows) + (codec.fitted_bytes() + HEADERS) / self.labels

    def distortion(self, codec: Klt) -> float:
        """Distortion of the held-back labels."""
        decoded = codec.expand(codec.encode(self.probe, self.probe_mixture), self.probe_mixture)
        return distortion(self.probe, decoded)

    def codec(self, step: float, target: dict[str, float]) -> Klt:
        """The codec of one step.

        Components are kept only where they pay, and so are class means in them. Error, and bits as
        the entropy, are estimated by rounding to multiples of the step that has the trellis's
        error. Squared error is weighed against bits at the slope of such a quantiser at high rate,
        d(error) / d(bit) = 2 ln 2 step^2 / 12. The same slope gives the precision of the basis,
        whose bits serve all labels: with rows scaled to a label's deviation, step / sqrt(labels).
        """
        step = float(np.float32(step))
        rounding = step / _TRELLIS_STEP
        price = 2 * math.log(2) * rounding**2 / 12
        share = self.labels / len(self.probe)
        scaled = self.directions * self.deviation[:, None]
        basis_step = max(rounding / math.sqrt(self.labels), float(scaled.abs().max()) / LARGEST)
        basis = (scaled / basis_step).round()
        means = (self.class_means / (step / 2)).round().clamp(-LARGEST, LARGEST)

        def coded(values: Tensor) -> tuple[Tensor, Tensor]:
            """Squared error and bits of each component, in the whole set."""
            codes = (values / rounding).round()
            error = (values - codes * rounding).double().square().sum(0)
            return share * error, share * _entropy_bits(codes)

        error, bits = coded(self.values)
        helped_error, helped_bits = coded(self.unpredicted)
        helped_bits += _entropy_bits(means)
        helped = helped_error + price * helped_bits < error + price * bits
        error = torch.where(helped, helped_error, error)
        bits = torch.where(helped, helped_bits, bits) + _entropy_bits(basis.T)
        energy = torch.where(helped, self.unpredicted_energy, self.energy)
        kept = (error + price * bits < share * self.energy) & basis.any(1)
        # Of normally distributed coefficients, d(bits) / d(coefficient^2) = 1 / (2 ln 2 variance).
        worth = _BIT_WORTH * step**2 / (2 * math.log(2)) * len(self.probe)
        scale, shrink = (basis_step / self.deviation)[kept], (energy / (energy + worth))[kept]
        scales = torch.cat([scale.new_tensor([step]), self.mean, scale, shrink.float()])
        arrays = {"scales": scales.cpu().numpy().astype("<f4")}
        for name, values in (("basis", basis[kept]), ("class_means", (means * helped).T[kept])):
            arrays[name] = np.frombuffer(pack_integers(values.cpu().numpy()), np.uint8)
        return Klt(self.num_classes, arrays, **target)
