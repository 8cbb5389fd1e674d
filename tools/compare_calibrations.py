"""
Compares methods to calibrate confidences, on the source alone, and prints the tables of docs/confidence.md.

    python tools/compare_calibrations.py --model MODEL --domain camvid:validation=DIR --measure camvid:dusk=DIR

Each method is fitted to one half of the images and measured on the other half, with kinds of distortion that it was
not fitted to. The best method is chosen by these columns. The domain of --measure is not used for the choice.
"""

import argparse

import torch
from torch.nn import functional as F

from mfuser.confidence_mfuser import SMALLEST_SCORE
from mfuser.evaluation.calibration import DISTORTIONS, UNDISTORTED, PixelSample, fit_logistic, halves, sample_pixels
from mfuser.evaluation.confidence import ConfidenceHistogram
from mfuser.evaluation.domains import open_domain
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


def table_row(new_method, distorted: bool, source: list[PixelSample], other: list[PixelSample]) -> str:
    """The cells of one method: source undistorted, distorted by other kinds, and the other domain."""
    undistorted, held_out = [], []
    for fitted, measured in halves(source):
        for kind in DISTORTIONS:
            method = new_method().fit(
                [each for each in fitted if each.distortion == UNDISTORTED or (distorted and each.distortion != kind)]
            )
            undistorted.append(figures(method, [each for each in measured if each.distortion == UNDISTORTED])["ece"])
            held_out.append(figures(method, [each for each in measured if each.distortion == kind])["ece"])
    method = new_method().fit([each for each in source if distorted or each.distortion == UNDISTORTED])
    there = figures(method, other)
    percent = [100 * sum(values) / len(values) for values in (undistorted, held_out)] + [100 * there["ece"]]
    return " | ".join([*(f"{value:.1f}" for value in percent), f"{there['auroc']:.3f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--domain", required=True, type=domain_argument)
    parser.add_argument("--measure", required=True, type=domain_argument)
    parsed = parser.parse_args()
    model, processor = load_for_inference(parsed.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    source, other = (
        list(sample_pixels(model, processor, open_domain(name, folder, split), EvaluationOptions(), distortions=views))
        for (_, name, split, folder), views in ((parsed.domain, 2), (parsed.measure, 0))
    )
    print(f"| way | fitted to | ECE % | distorted by another kind | {parsed.measure[0]} | AUROC there |")
    print("|---|---|---|---|---|---|")
    for name, new_method in {
        "best score / sum of scores": Uncalibrated,
        "temperature": Temperature,
        "score and margin": lambda: Logistic(2),
        "score, margin and class entropy": lambda: Logistic(3),
    }.items():
        for fitted_to in ("images", "images and distorted copies") if new_method is not Uncalibrated else ("-",):
            row = table_row(new_method, fitted_to.endswith("copies"), source, other)
            print(f"| {name} | {fitted_to} | {row} |", flush=True)


if __name__ == "__main__":
    main()
