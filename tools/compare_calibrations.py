"""
Compares methods to calibrate confidences, on the source alone, and prints the tables of docs/confidence.md.

    python tools/compare_calibrations.py --model MODEL --domain camvid:validation=DIR --measure camvid:dusk=DIR

Each method is fitted to one half of the images and measured on the other half, as they are and under the 15 common
corruptions, to which nothing is fitted. The method is chosen by the error under corruptions; the domain of --measure
is not used for the choice. Needs `pip install -e ".[dev]"`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from mfuser.confidence_mfuser import SMALLEST_SCORE, confidence_map
from mfuser.evaluation.calibration import PixelSample, confidence_metrics, fit_temperature, halves, sample_pixels
from mfuser.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from mfuser.evaluation.domains import EvaluationDomain, open_domain
from mfuser.evaluation.protocols import EvaluationOptions
from mfuser.loading import load_for_inference
from mfuser.scripts.evaluate import domain_argument


class Uncalibrated:
    """The share of the best class in the sum of the scores."""

    temperature = 1.0

    def fit(self, samples: list[PixelSample]):
        return self

    def confidence(self, sample: PixelSample) -> torch.Tensor:
        return confidence_map(sample.scores, self.temperature)


class Temperature(Uncalibrated):
    """What `mfuser calibrate` fits."""

    def fit(self, samples):
        self.temperature = fit_temperature(samples)
        return self


class Logistic(Uncalibrated):
    """Logistic regression on the logarithm of the best score and that of its ratio to the second best."""

    def features(self, samples: list[PixelSample]) -> np.ndarray:
        scores = torch.cat([sample.scores for sample in samples]).double().clamp(min=SMALLEST_SCORE)
        best, second = scores.log().topk(2, dim=1).values.unbind(dim=1)
        return torch.stack([best, best - second], dim=1).numpy()

    def fit(self, samples):
        right = torch.cat([sample.scores.argmax(dim=1) == sample.labels for sample in samples])
        self.regression = LogisticRegression(C=np.inf).fit(self.features(samples), right)
        return self

    def confidence(self, sample):
        return torch.from_numpy(self.regression.predict_proba(self.features([sample]))[:, 1])


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
    errors = [
        confidence_metrics(measured, new_method().fit(fitted).confidence)["ece"]
        for (fitted, _), (_, measured) in pairs
    ]
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
        f"images and copies, {name}": samples(source, copies=2, max_kinds=kinds)
        for kinds, name in ((1, "one kind"), (2, "up to two kinds"), (3, "up to three kinds"))
    }
    print(f"| method | fitted to | ECE % | common corruptions | {parsed.measure[0]} | AUROC there |")
    print("|---|---|---|---|---|---|")
    methods: dict[str, Callable[[], Uncalibrated]] = {
        "best score / sum of scores": Uncalibrated,
        "temperature": Temperature,
        "logistic regression on score and margin": Logistic,
    }
    for method, new_method in methods.items():
        for views, fitted in fitted_to.items() if new_method is not Uncalibrated else [("-", images)]:
            percent = [100 * held_out_error(new_method, fitted, measured) for measured in (images, corrupted)]
            last = confidence_metrics(there, new_method().fit(fitted).confidence)
            cells = [f"{value:.1f}" for value in (*percent, 100 * last["ece"])] + [f"{last['auroc']:.3f}"]
            print(f"| {method} | {views} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
