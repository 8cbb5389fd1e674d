"""
Calibration of confidences on the validation split of the source.

A model that is calibrated on undistorted images of its source alone is too confident elsewhere. Its confidences are
therefore fitted to images of the source as they are and to distorted copies: darker, with less contrast, with haze,
noise, blur or another colour of the light. No other domain is used.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.confidence_mfuser import FEATURES, class_entropy, pixel_features
from mfuser.evaluation.domains import EvaluationDomain
from mfuser.evaluation.protocols import EvaluationOptions, ProtocolSamples, sample_loader
from mfuser.evaluation.scoring import segment_batch

UNDISTORTED = "none"


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
        distortion (`str`):
            A key of `DISTORTIONS`, or `UNDISTORTED`.
        scores (`torch.Tensor` of shape `(pixels, num_labels)`):
            Scores of the model.
        labels (`torch.Tensor` of shape `(pixels,)`):
            Train ids.
        entropy (`float`):
            The class entropy of the whole image.
    """

    row: int
    distortion: str
    scores: torch.Tensor
    labels: torch.Tensor
    entropy: float

    @property
    def correct(self) -> torch.Tensor:
        """Whether the best class of each pixel is right."""
        return self.scores.argmax(dim=1) == self.labels

    @property
    def features(self) -> torch.Tensor:
        """The features (pixels, len(FEATURES)) of the calibrated confidence, in float64."""
        log_score, log_margin = pixel_features(self.scores.double())
        return torch.stack([log_score, log_margin, torch.full_like(log_score, self.entropy)], dim=1)


@torch.inference_mode()
def sample_pixels(
    model,
    processor,
    domain: EvaluationDomain,
    options: EvaluationOptions,
    pixels: int = 1000,
    distortions: int = 2,
    progress: bool = True,
    skipped: list[dict[str, str]] | None = None,
) -> Iterator[PixelSample]:
    """
    Segments each labelled image of a domain as it is and distorted, and draws pixels of each view.

    The draws depend only on the position of the image, so that a second run gives the same samples.

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
            Pixels that are drawn from each view, with replacement.
        distortions (`int`, *optional*, defaults to 2):
            Distorted views of each image, each with a random kind and strength.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        skipped (`list[dict]`, *optional*):
            A list to which `name` and `reason` of the images are added that cannot be read or segmented, which are
            then skipped. By default, they are errors.

    Returns:
        `Iterator[PixelSample]`: The samples of one view after the other.

    Raises:
        ValueError: If an image cannot be read or segmented, and `skipped` is `None`.
    """
    dataset = ProtocolSamples(domain, processor, options.evaluation_size(domain))
    loader = sample_loader(dataset, [[row] for row in range(len(domain.rows))], options.workers)
    mean, std = (
        np.resize(np.array(values, dtype=np.float64), (3, 1, 1)) / (255 * processor.rescale_factor)
        for values in ((processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1))
    )
    for (sample,) in tqdm(loader, desc=domain.name, unit="image", disable=not progress):
        known = torch.empty(0) if sample.label is None else (sample.label != IGNORE_INDEX).nonzero()
        if sample.problem is None and not len(known):
            continue
        rng = np.random.default_rng(sample.row)
        samples_of_image = []
        for name in [UNDISTORTED, *rng.choice(list(DISTORTIONS), distortions)]:
            view = sample.pixel_values
            if name != UNDISTORTED:
                image = (view.numpy() * std + mean).clip(0, 1)  # rounding could make a black pixel negative
                image = DISTORTIONS[name](image, rng.uniform(), rng).clip(0, 1)
                view = torch.from_numpy((image - mean) / std).float()
            (prediction,) = segment_batch(model, options, [sample._replace(pixel_values=view)], keep_scores=True)
            scores = prediction.scores
            if scores is None:
                problem = {"name": domain.rows.names[sample.row], "reason": str(prediction.problem)}
                if skipped is None:
                    raise ValueError("{name}: {reason}".format(**problem))
                skipped.append(problem)
                break
            drawn = known[torch.from_numpy(rng.integers(len(known), size=pixels))]
            # The position in the scores of the centre of each pixel of the label.
            sizes = zip(scores.shape[-2:], sample.size, strict=True)
            rows, columns = (
                ((place + 0.5) * (full / size)).long().clamp(max=full - 1)
                for place, (full, size) in zip(drawn.unbind(dim=1), sizes, strict=True)
            )
            samples_of_image.append(
                PixelSample(
                    sample.row,
                    str(name),
                    scores[:, rows, columns].T.cpu(),
                    sample.label[tuple(drawn.unbind(dim=1))].long(),
                    class_entropy(scores[None]).item(),
                )
            )
        else:
            yield from samples_of_image


def fit_logistic(features: torch.Tensor, correct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Fits a logistic regression by L-BFGS in float64.

    Args:
        features (`torch.Tensor` of shape `(pixels, num_features)`):
            What the probability depends on.
        correct (`torch.Tensor` of shape `(pixels,)`):
            Whether the best class of each pixel is right.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The weight of each feature, and the bias.

    Raises:
        ValueError: If all pixels are right or all are wrong.
    """
    if correct.all() or not correct.any():
        raise ValueError(
            f"{'all' if correct.all() else 'none'} of {len(correct)} pixels are classified correctly; fitting "
            "confidences requires both correct and wrong pixels"
        )
    mean, std = features.double().mean(dim=0), features.double().std(dim=0).clamp(min=1e-6)
    inputs, targets = (features - mean) / std, correct.double()
    weights = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(inputs @ weights[:-1] + weights[-1], targets)
        loss = loss + 1e-6 * weights[:-1].square().sum()  # finite weights where classes are separable
        loss.backward()
        return loss

    optimizer.step(closure)
    slopes = weights.detach()[:-1] / std
    return slopes, weights.detach()[-1] - slopes @ mean


def fit_calibration(samples: list[PixelSample]) -> dict[str, float]:
    """Computes the `confidence_calibration` of the configuration from samples, see [`fit_logistic`]."""
    features, correct = (torch.cat([getattr(sample, name) for sample in samples]) for name in ("features", "correct"))
    weights, bias = fit_logistic(features, correct)
    return dict(zip((*FEATURES, "bias"), [*weights.tolist(), bias.item()], strict=True))


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


def calibrated(samples: list[PixelSample], calibration: dict[str, Any]) -> torch.Tensor:
    """The calibrated confidences of all pixels of `samples`, in their order."""
    weights = torch.tensor([calibration[name] for name in FEATURES], dtype=torch.float64)
    return (torch.cat([sample.features for sample in samples]) @ weights + calibration["bias"]).sigmoid()
