"""Reliability diagrams: accuracy against confidence, drawn by matplotlib (`pip install "mfuser[report]"`)."""

from pathlib import Path
from typing import Any

from mfuser.evaluation.confidence import CALIBRATION_BINS
from mfuser.files import atomic_writer

try:
    from matplotlib import figure as matplotlib_figure
except ImportError:
    matplotlib_figure = None  # type: ignore[assignment]


def require_matplotlib(what: str = "reliability diagrams") -> None:
    """Raises `ImportError`, with `what` needs it, if matplotlib is not installed."""
    if matplotlib_figure is None:
        raise ImportError(f'{what} need the package matplotlib: pip install "mfuser[report]"')


def reliability_figure(panels: dict[str, dict[str, Any]]):
    """
    Draws reliability diagrams side by side.

    Each bar is a bin of confidence: its height is the accuracy of the pixels in it, and the dot at its mean confidence
    lies on the diagonal if the model is calibrated. Below it is the share of the pixels in the bin.

    Args:
        panels (`dict[str, dict]`):
            The metrics of [`ConfidenceHistogram.compute`] by title.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    require_matplotlib()
    width = 1 / CALIBRATION_BINS
    figure = matplotlib_figure.Figure(figsize=(3.4 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for (title, scores), accuracy, share in zip(panels.items(), *axes, strict=True):
        bins = scores["reliability"]
        confidences = [each["confidence"] for each in bins]
        accuracies = [each["accuracy"] for each in bins]
        centres = [(int(confidence / width) + 0.5) * width for confidence in confidences]
        total = sum(each["pixels"] for each in bins)
        accuracy.bar(centres, accuracies, width=width, color="#90a4ae", edgecolor="white")
        accuracy.plot([0, 1], [0, 1], color="#616161", linestyle="--", linewidth=1)
        accuracy.plot(confidences, accuracies, "o", color="#c62828", markersize=4)
        accuracy.set_title(f"{title}\nECE {100 * scores['ece']:.1f} %", fontsize=10, parse_math=False)
        accuracy.set(xlim=(0, 1), ylim=(0, 1))
        share.bar(centres, [each["pixels"] / total for each in bins], width=width, color="#cfd8dc", edgecolor="white")
        share.set_xlabel("confidence")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of pixels")
    return figure


def write_reliability_diagram(folder: str | Path, title: str, confidence: dict[str, Any]) -> Path:
    """
    Writes the reliability diagram of a domain, without and with calibration.

    Args:
        folder (`str` or `Path`):
            The folder, which is created if it does not exist.
        title (`str`):
            The name of the domain. The file is named after it.
        confidence (`dict`):
            What `DomainConfidence.result` returns.

    Returns:
        `Path`: The PNG file.
    """
    path = Path(folder) / f"{title.replace(':', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = reliability_figure({f"{title}, {name}": scores["pooled"] for name, scores in confidence.items()})
    with atomic_writer(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
    return path
