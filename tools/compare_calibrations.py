"""
Compares methods to calibrate confidences, on the source alone, and prints the tables of docs/confidence.md.

    python tools/compare_calibrations.py --model MODEL --domain camvid:validation=DIR --measure camvid:dusk=DIR

Each method is fitted to one half of the images and measured on the other half, as they are and under the 15 common
corruptions, to which nothing is fitted. The best method is chosen by these columns. The domain of --measure is not
used for the choice. Needs `pip install "mfuser[robustness]"`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mfuser.confidence_mfuser import SMALLEST_SCORE
from mfuser.evaluation.calibration import PixelSample, fit_logistic, halves, sample_pixels
from mfuser.evaluation.confidence import ConfidenceHistogram
from mfuser.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from mfuser.evaluation.domains import EvaluationDomain, open_domain
from mfuser.evaluation.protocols import EvaluationOptions
from mfuser.loading import load_for_inference
from mfuser.scripts.evaluate import domain_argument


def shares(scores: torch.Tensor, power: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Temperature scaling of the logarithms of scores (pixels, num_labels): probabilities of all classes."""
    return (scores.double().clamp(min=SMALLEST_SCORE).log() * power).softmax(dim=1)


class Uncalibrated:
    def fit(self, samples: list[PixelSample]):
        return self

    def confidence(self, sample: PixelSample) -> torch.Tensor:
        return shares(sample.scores).amax(dim=1)


class Temperature(Uncalibrated):
    """One parameter, fitted by the cross-entropy of the label."""

    def fit(self, samples):
        scores, labels = (torch.cat([getattr(sample, name) for sample in samples]) for name in ("scores", "labels"))
        log_power = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_power], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = F.nll_loss(shares(scores, log_power.exp()).clamp(min=1e-12).log(), labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        self.power = log_power.exp().detach()
        return self

    def confidence(self, sample):
        return shares(sample.scores, self.power).amax(dim=1)


class Logistic(Uncalibrated):
    """Logistic regression on the first `count` features."""

    def __init__(self, count: int):
        self.count = count

    def fit(self, samples):
        features = torch.cat([sample.features for sample in samples])[:, : self.count]
        self.weights, self.bias = fit_logistic(features, torch.cat([sample.correct for sample in samples]))
        return self

    def confidence(self, sample):
        return (sample.features[:, : self.count] @ self.weights + self.bias).sigmoid()


def figures(method: Uncalibrated, samples: list[PixelSample]) -> dict[str, float]:
    histogram = ConfidenceHistogram(samples[0].scores.shape[1])
    for sample in samples:
        histogram.update(method.confidence(sample), sample.scores.argmax(dim=1), sample.labels)
    return histogram.compute()


@dataclass(frozen=True)
class AnyCorruption:
    """One of the common corruptions, which and how severe drawn by the image and a seed."""

    seed: int

    def __call__(self, image: Image.Image) -> Image.Image:
        rng = np.random.default_rng([self.seed, int(np.asarray(image).sum(dtype=np.int64))])
        return Corruption(str(rng.choice(CORRUPTIONS)), int(rng.choice(SEVERITIES)))(image)


def held_out_error(
    new_method: Callable[[], Uncalibrated], fitted_to: list[PixelSample], measured_on: list[PixelSample]
) -> float:
    """The mean ECE on each half of the images after a fit to the other half."""
    pairs = zip(halves(fitted_to), halves(measured_on), strict=True)
    errors = [figures(new_method().fit(fitted), measured)["ece"] for (fitted, _), (_, measured) in pairs]
    return sum(errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--domain", required=True, type=domain_argument)
    parser.add_argument("--measure", required=True, type=domain_argument)
    parsed = parser.parse_args()
    model, processor = load_for_inference(parsed.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def samples(domain: EvaluationDomain, copies: int = 0, max_kinds: int = 1) -> list[PixelSample]:
        return sample_pixels(model, processor, domain, EvaluationOptions(), copies=copies, max_kinds=max_kinds)

    source, other = (open_domain(name, folder, split) for _, name, split, folder in (parsed.domain, parsed.measure))
    images, there = samples(source), samples(other)
    corrupted = [each for seed in (0, 1) for each in samples(replace(source, distortion=AnyCorruption(seed)))]
    fitted_to = {"images": images} | {
        f"images and copies, up to {kinds} kinds": samples(source, copies=2, max_kinds=kinds) for kinds in (1, 2, 3)
    }
    print(f"| method | fitted to | ECE % | common corruptions | {parsed.measure[0]} | AUROC there |")
    print("|---|---|---|---|---|---|")
    methods: dict[str, Callable[[], Uncalibrated]] = {
        "best score / sum of scores": Uncalibrated,
        "temperature": Temperature,
        "score and margin": lambda: Logistic(2),
        "score, margin and class entropy": lambda: Logistic(3),
    }
    for method, new_method in methods.items():
        for views, fitted in fitted_to.items() if new_method is not Uncalibrated else [("-", images)]:
            percent = [100 * held_out_error(new_method, fitted, measured) for measured in (images, corrupted)]
            last = figures(new_method().fit(fitted), there)
            cells = [f"{value:.1f}" for value in (*percent, 100 * last["ece"])] + [f"{last['auroc']:.3f}"]
            print(f"| {method} | {views} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
