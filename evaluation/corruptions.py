"""
The 15 common corruptions of images, by the package imagecorruptions-imaug (`pip install "mfuser[robustness]"`).

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019;
for images of any size: Michaelis et al., "Benchmarking Robustness in Object Detection", 2019.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from PIL import Image

from mfuser.evaluation.domains import EvaluationDomain

LIBRARY = "imagecorruptions-imaug"
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(name for names in GROUPS.values() for name in names)
SEVERITIES = (1, 2, 3, 4, 5)
# The library draws from the generator of its `seed` argument in these, and from NumPy's global one in the others.
_SEEDED = ("impulse_noise", "glass_blur")
_MIN_SIDE = 32  # of the library
_MAX_SEED = 2**32 - 1
_global_generator = threading.Lock()


def corruption_names(words: Sequence[str]) -> tuple[str, ...]:
    """
    Expands names and groups to corruptions, in the order of the paper.

    Args:
        words (`Sequence[str]`):
            Names of `CORRUPTIONS` and groups: "noise", "blur", "weather", "digital". None for all 15.

    Raises:
        ValueError: If a word is neither.
    """
    for word in words:
        if word not in GROUPS and word not in CORRUPTIONS:
            raise ValueError(
                f"{word!r} is not a corruption; they are {', '.join(CORRUPTIONS)}, in the groups {', '.join(GROUPS)}"
            )
    chosen = {name for word in words for name in GROUPS.get(word, (word,))}
    return tuple(name for name in CORRUPTIONS if not words or name in chosen)


@dataclass(frozen=True)
class CorruptionProtocol:
    """
    The corruptions under which domains are scored.

    Args:
        names (`tuple[str]`, *optional*):
            Names of `CORRUPTIONS`. By default all.
        severities (`tuple[int]`, *optional*):
            Severities from 1 to 5. By default all.
        seed (`int`, *optional*, defaults to 0):
            From 0 to 2^32 - 1. Another seed gives other noise, other snow and so on.

    Raises:
        ValueError: If a value is out of range or repeated.
        ImportError: If the library is not installed.
    """

    names: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES
    seed: int = 0

    def __post_init__(self):
        corruption_names(self.names)
        if not self.severities or len(set(self.severities)) < len(self.severities):
            raise ValueError(f"severities is {self.severities}; it must hold at least one number, each of them once")
        if not set(self.severities) <= set(SEVERITIES):
            raise ValueError(f"severities is {self.severities}; they must be from {SEVERITIES[0]} to {SEVERITIES[-1]}")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"the seed of the corruptions is {self.seed}; it must be from 0 to {_MAX_SEED}")
        _library()

    def all(self) -> list["Corruption"]:
        """Every corruption at every severity."""
        return [Corruption(name, severity, self.seed) for name in self.names for severity in self.severities]

    def record(self) -> dict[str, Any]:
        """The settings that the scores depend on, as JSON-serialisable values."""
        return {
            "names": list(self.names),
            "severities": list(self.severities),
            "seed": self.seed,
            "applied_to": "the decoded RGB image, before it is resized",
            "library": LIBRARY,
            "library_version": version(LIBRARY),
        }


@dataclass(frozen=True)
class Corruption:
    """
    One corruption at one severity.

    The random numbers depend only on the pixels of the image, the name and the seed. The result is therefore the same
    in any process and in any order of the images, and all severities of a corruption use the same random numbers.

    Args:
        name (`str`):
            One of `CORRUPTIONS`.
        severity (`int`):
            From 1 to 5.
        seed (`int`, *optional*, defaults to 0):
            See [`CorruptionProtocol`].
    """

    name: str
    severity: int
    seed: int = 0

    def __call__(self, image: Image.Image) -> Image.Image:
        """
        Corrupts an RGB image, which is not changed.

        Raises:
            ValueError: If a side has less than 32 pixels.
        """
        if min(image.size) < _MIN_SIDE:
            raise ValueError(
                f"{image.height} x {image.width} pixels; {LIBRARY} corrupts images of at least "
                f"{_MIN_SIDE} x {_MIN_SIDE}"
            )
        pixels = np.asarray(image)
        seed = self._image_seed(pixels)
        arguments = {"seed": seed} if self.name in _SEEDED else {}
        with _global_generator:
            state = np.random.get_state()  # noqa: NPY002 - the library has no other way
            np.random.seed(seed)  # noqa: NPY002
            try:
                corrupted = _library().corrupt(pixels, self.severity, self.name, **arguments)
            finally:
                np.random.set_state(state)  # noqa: NPY002
        return Image.fromarray(corrupted)

    def _image_seed(self, pixels: np.ndarray) -> int:
        digest = hashlib.sha256(f"{self.name} {self.seed} {pixels.shape} ".encode())
        digest.update(pixels.tobytes())
        return int.from_bytes(digest.digest()[:4], "big")


def corrupted_domain(domain: EvaluationDomain, corruption: Corruption) -> EvaluationDomain:
    """The domain with corrupted images; labels, classes and rows are the same."""
    title = f"{domain.name}, {corruption.name} {corruption.severity}"
    return replace(domain, name=title, distortion=corruption)


def corrupted_result(result: dict[str, Any], clean: dict[str, Any]) -> dict[str, Any]:
    """
    The part of a result on corrupted images that the report of an evaluation keeps.

    Args:
        result (`dict`):
            What `evaluate_domain` returns for the corrupted domain. Its confusion matrices and reliability bins are
            left out, since there would be 75 of each.
        clean (`dict`):
            The result without corruptions. Images that are skipped there as well are left out of `skipped`.
    """
    kept: dict[str, Any] = {name: result[name] for name in ("mean_iou", "images")}
    already = {each["name"] for each in clean["skipped"]}
    kept["skipped"] = [each for each in result["skipped"] if each["name"] not in already]
    kept |= {name: result["pooled"][name] for name in ("overall_accuracy", "per_class_iou")}
    kept["conditions"] = {name: scores["mean_iou"] for name, scores in result["conditions"].items()}
    if "confidence" in result:
        kept["confidence"] = {
            kind: {name: scores["pooled"][name] for name in ("ece", "auroc", "aupr")}
            for kind, scores in result["confidence"].items()
        }
    return kept


def corruption_summary(scores: dict[str, dict[str, dict[str, Any]]], clean: float) -> dict[str, Any]:
    """
    The scores of a domain under corruptions, with their means.

    Args:
        scores (`dict`):
            `corrupted_result` by name and severity.
        clean (`float`):
            The mean IoU of the domain without corruptions.

    Returns:
        `dict`: `scores`; `mean_iou_by_corruption`, the mean over severities; `mean_iou`, the mean over corruptions;
        and `relative_mean_iou`, that divided by the mean IoU without corruptions (`None` if it is 0).
    """
    by_corruption = {
        name: sum(each["mean_iou"] for each in by_severity.values()) / len(by_severity)
        for name, by_severity in scores.items()
    }
    mean = sum(by_corruption.values()) / len(by_corruption)
    return {
        "mean_iou": mean,
        "relative_mean_iou": mean / clean if clean else None,
        "mean_iou_by_corruption": by_corruption,
        "scores": scores,
    }


def _library():
    """The module `imagecorruptions` of the maintained package."""
    try:
        version(LIBRARY)  # an older package, which does not work with NumPy 2, has a module of the same name
        import imagecorruptions
    except (ImportError, PackageNotFoundError) as error:
        raise ImportError(
            f"corruptions need the package {LIBRARY}, which cannot be used here ({error}): pip install "
            '"mfuser[robustness]"'
        ) from error
    return imagecorruptions
