"""
Calibration of confidences on the validation split of the source.

A model that is calibrated on undistorted images of its source alone is too confident elsewhere. Its confidences are
therefore fitted to images of the source as they are and to distorted copies: darker, with less contrast, with haze,
noise, blur or another colour of the light, or several of these. No other domain is used.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.confidence_mfuser import SMALLEST_SCORE
from mfuser.evaluation.confidence import ConfidenceHistogram
from mfuser.evaluation.domains import EvaluationDomain
from mfuser.evaluation.protocols import EvaluationOptions, ProtocolSamples, Sample, sample_loader
from mfuser.evaluation.scoring import segment_batch
from mfuser.overlap import in_order, model_threads

MAX_SCORES = 100_000_000  # of all samples; the fit takes about 40 bytes for each
MAX_KINDS = 3  # of distortion in one copy; docs/confidence.md compares one to three


def _darker(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return pixels ** (1 + 2.5 * strength)


def _less_contrast(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return pixels.mean() + (1 - 0.85 * strength) * (pixels - pixels.mean())


def _haze(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return pixels + 0.7 * strength * (0.85 - pixels)


def _noise(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return pixels + rng.normal(0, 0.2 * strength, pixels.shape)


def _blur(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    sigma = 0.01 * strength * min(pixels.shape[1:])
    radius = min(int(3 * sigma) + 1, min(pixels.shape[1:]) - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2).double()
    padded = F.pad(torch.from_numpy(pixels)[:, None].double(), [radius] * 4, mode="reflect")
    rows = F.conv2d(padded, (kernel / kernel.sum()).view(1, 1, -1, 1))
    return F.conv2d(rows, (kernel / kernel.sum()).view(1, 1, 1, -1))[:, 0].numpy()


def _other_light(pixels: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return pixels * np.exp(rng.uniform(-0.5 * strength, 0.5 * strength, (3, 1, 1)))


# Each maps planar RGB in [0, 1], a strength in [0, 1] and a random generator to pixels, which are clipped afterwards.
DISTORTIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "darker": _darker,
    "less contrast": _less_contrast,
    "haze": _haze,
    "noise": _noise,
    "blur": _blur,
    "other light": _other_light,
}


class PixelSample(NamedTuple):
    """
    Labelled pixels of one view of an image.

    Args:
        row (`int`):
            The position of the image.
        distortions (`tuple[str, ...]`):
            The keys of `DISTORTIONS` by which the view is distorted, in their order; empty for the image as it is.
        scores (`torch.Tensor` of shape `(pixels, num_labels)`):
            Scores of the model.
        labels (`torch.Tensor` of shape `(pixels,)`):
            Train ids.
    """

    row: int
    distortions: tuple[str, ...]
    scores: torch.Tensor
    labels: torch.Tensor


def distort(pixels: np.ndarray, max_kinds: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[str, ...]]:
    """
    Distorts an image by one or several kinds of distortion, in random order and each with a random strength.

    Args:
        pixels (`np.ndarray` of shape `(3, height, width)`):
            RGB in [0, 1].
        max_kinds (`int`):
            The number of kinds is drawn uniformly from 1 to this.
        rng (`np.random.Generator`):
            The generator of all draws.

    Returns:
        `tuple[np.ndarray, tuple[str, ...]]`: The distorted image, in [0, 1], and the kinds.
    """
    kinds = tuple(map(str, rng.choice(list(DISTORTIONS), rng.integers(1, max_kinds + 1), replace=False)))
    for kind in kinds:
        pixels = DISTORTIONS[kind](pixels, rng.uniform(), rng).clip(0, 1)
    return pixels, kinds


def sample_pixels(
    model,
    processor,
    domain: EvaluationDomain,
    options: EvaluationOptions,
    pixels: int = 1000,
    copies: int = 2,
    max_kinds: int = MAX_KINDS,
    progress: bool = True,
    skipped: list[dict[str, str]] | None = None,
) -> list[PixelSample]:
    """
    Segments each labelled image of a domain as it is and distorted, and draws pixels of each view.

    The draws depend only on their number and the position of the image, so that a second run gives the same samples.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, on its device and in eval mode.
        processor ([`MFuserImageProcessor`]):
            Normalises the images.
        domain (`EvaluationDomain`):
            The domain.
        options (`EvaluationOptions`):
            The protocol, by which images are resized.
        pixels (`int`, *optional*, defaults to 1000):
            Pixels that are drawn from each view, with replacement; fewer if there would be more than `MAX_SCORES`
            scores in all.
        copies (`int`, *optional*, defaults to 2):
            Distorted copies of each image, see [`distort`].
        max_kinds (`int`, *optional*, defaults to `MAX_KINDS`):
            The largest number of kinds of distortion in one copy.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        skipped (`list[dict]`, *optional*):
            A list to which `name` and `reason` of the images are added that cannot be read or segmented, which are
            then skipped. By default, they are errors.

    Returns:
        `list[PixelSample]`: The samples of one view after the other, in the order of the images.

    Raises:
        ValueError: If an image cannot be read or segmented, and `skipped` is `None`.
    """
    dataset = ProtocolSamples(domain, processor, options.evaluation_size(domain))
    scores_per_pixel = len(dataset) * (1 + copies) * model.config.num_labels
    pixels = max(1, min(pixels, MAX_SCORES // max(1, scores_per_pixel)))
    loader = sample_loader(dataset, [[row] for row in range(len(domain.rows))], options.workers)
    mean, std = (
        np.resize(np.array(values, dtype=np.float64), (3, 1, 1)) / (255 * processor.rescale_factor)
        for values in ((processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1))
    )

    def views(sample: Sample, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, tuple[str, ...]]]:
        yield sample.pixel_values, ()
        image = (sample.pixel_values.numpy() * std + mean).clip(0, 1)  # rounding could make a black pixel negative
        for _ in range(copies):
            distorted, kinds = distort(image, max_kinds, rng)
            yield torch.from_numpy((distorted - mean) / std).float(), kinds

    def samples_of_image(batch: list[Sample]) -> tuple[int, list[PixelSample], str | None]:
        (sample,) = batch
        if sample.problem is not None:
            return sample.row, [], sample.problem
        if sample.label is None or not len(known := (sample.label != IGNORE_INDEX).nonzero()):
            return sample.row, [], None
        rng = np.random.default_rng(sample.row)
        samples = []
        for view, kinds in views(sample, rng):
            (prediction,) = segment_batch(model, options, [sample._replace(pixel_values=view)], keep_scores=True)
            if prediction.scores is None:
                return sample.row, [], str(prediction.problem)
            places = known[torch.from_numpy(rng.integers(len(known), size=pixels))]
            labels = sample.label[tuple(places.unbind(dim=1))].long()
            scores = _scores_at(places, sample.size, prediction.scores)
            samples.append(PixelSample(sample.row, kinds, scores, labels))
        return sample.row, samples, None

    samples: list[PixelSample] = []
    with (
        tqdm(total=len(dataset), desc=domain.name, unit="image", disable=not progress) as bar,
        model_threads(model) as threads,
    ):
        for row, of_image, problem in in_order(samples_of_image, loader, threads, ahead=threads):
            samples += of_image
            bar.update()
            if problem is None:
                continue
            name = domain.rows.names[row]
            if skipped is None:
                raise ValueError(f"{name}: {problem}")
            skipped.append({"name": name, "reason": problem})
    return samples


def _scores_at(places: torch.Tensor, size: tuple[int, int], scores: torch.Tensor) -> torch.Tensor:
    """The scores (pixels, num_labels) at the centres of pixels (pixels, 2) of a label of `size`."""
    rows, columns = (
        ((place + 0.5) * (full / label_side)).long().clamp(max=full - 1)
        for place, full, label_side in zip(places.unbind(dim=1), scores.shape[-2:], size, strict=True)
    )
    return scores[:, rows, columns].T.cpu()


def fit_temperature(samples: list[PixelSample]) -> float:
    """
    Fits the temperature of [`confidence_map`] to the labels of pixels, by their cross-entropy, with L-BFGS in float64.

    Args:
        samples (`list[PixelSample]`):
            Scores and labels.

    Returns:
        `float`: `confidence_temperature` of the configuration.

    Raises:
        ValueError: If all pixels are right, or if the labelled classes have no higher scores than the others: the
            cross-entropy has no minimum then.
    """
    scores, labels = (torch.cat([getattr(sample, name) for sample in samples]) for name in ("scores", "labels"))
    log_scores = scores.double().clamp(min=SMALLEST_SCORE).log()
    of_label = log_scores.gather(1, labels[:, None])[:, 0]
    if of_label.equal(log_scores.amax(dim=1)):
        raise ValueError(
            f"all of {len(labels)} pixels are classified correctly; fitting a temperature requires wrong pixels too"
        )
    if of_label.mean() <= log_scores.mean():
        raise ValueError(
            f"the labelled classes of {len(labels)} pixels have no higher scores than the other classes on average; "
            "no temperature makes such scores probabilities"
        )
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(log_scores / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.exp().item()


def halves(samples: list[PixelSample]) -> list[tuple[list[PixelSample], list[PixelSample]]]:
    """
    Two pairs of samples to fit and samples to measure: the first and the second half of the images, and reversed.

    The images are divided into contiguous halves, because neighbouring frames of a sequence are nearly equal.
    """
    rows = sorted({sample.row for sample in samples})
    middle = rows[len(rows) // 2]
    first = [sample for sample in samples if sample.row < middle]
    second = [sample for sample in samples if sample.row >= middle]
    return [(first, second), (second, first)]


def confidence_metrics(
    samples: list[PixelSample], confidence: Callable[[PixelSample], torch.Tensor]
) -> dict[str, Any]:
    """The metrics of [`ConfidenceHistogram.compute`] for the confidences that a function gives to each sample."""
    histogram = ConfidenceHistogram(samples[0].scores.shape[1])
    for sample in samples:
        histogram.update(confidence(sample), sample.scores.argmax(dim=1), sample.labels)
    return histogram.compute()
