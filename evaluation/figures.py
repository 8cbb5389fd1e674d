"""Figures of a report, drawn by matplotlib: scores by severity, risk and coverage, confusion matrices."""

from typing import Any

import numpy as np

from mfuser.evaluation.corruptions import SEVERITIES
from mfuser.evaluation.reliability_diagram import matplotlib_figure, require_matplotlib

_PLOTS_PER_ROW = 5
_MAX_CLASSES_WITH_NUMBERS = 32
_LARGEST_MATRIX = 20  # inches


def severity_curves(domains: dict[str, dict[str, Any]]):
    """
    Draws mean IoU against severity, one plot per corruption and one line per domain. Severity 0 is no corruption.

    Args:
        domains (`dict[str, dict]`):
            Results of domains by label, each with `corruptions`.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    require_matplotlib("figures of reports")
    names = list(dict.fromkeys(name for each in domains.values() for name in each["corruptions"]["scores"]))
    columns = min(len(names), _PLOTS_PER_ROW)
    rows = -(-len(names) // columns)
    figure = matplotlib_figure.Figure(figsize=(2.3 * columns + 0.6, 1.9 * rows + 0.7), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for name, plot in zip(names, axes, strict=False):
        for label, result in domains.items():
            by_severity = result["corruptions"]["scores"].get(name, {})
            points = {0: result["mean_iou"]} | {int(level): each["mean_iou"] for level, each in by_severity.items()}
            levels = sorted(points)
            plot.plot(levels, [100 * points[level] for level in levels], "o-", markersize=3, label=label)
        plot.set_title(name.replace("_", " "), fontsize=9)
        plot.grid(alpha=0.3)
        plot.set(xticks=range(SEVERITIES[-1] + 1), ylim=(0, None))
    for plot in axes[len(names) :]:
        plot.set_axis_off()
    figure.supxlabel("severity", fontsize=9)
    figure.supylabel("mean IoU, %", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def risk_coverage(confidences: dict[str, dict[str, Any]]):
    """
    Draws the share of wrong pixels among the most confident pixels against how many these are.

    The points of a curve are the borders of the bins of the calibration error, at which both values are exact.

    Args:
        confidences (`dict[str, dict]`):
            Metrics of [`ConfidenceHistogram.compute`] by label.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    require_matplotlib("figures of reports")
    figure = matplotlib_figure.Figure(figsize=(5.2, 3.6), layout="constrained")
    plot = figure.subplots()
    for label, scores in confidences.items():
        bins = sorted(scores["reliability"], key=lambda each: -each["confidence"])
        pixels = np.array([each["pixels"] for each in bins]).cumsum()
        wrong = np.array([each["pixels"] * (1 - each["accuracy"]) for each in bins]).cumsum()
        plot.plot(100 * pixels / pixels[-1], 100 * wrong / pixels, "o-", markersize=3, label=label)
    plot.set(xlabel="coverage: most confident pixels, %", ylabel="risk: wrong among them, %")
    plot.set(xlim=(0, 101), ylim=(0, None))
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    return figure


def confusion_matrix(scores: dict[str, Any]):
    """
    Draws a confusion matrix in percent of the pixels with each label.

    Args:
        scores (`dict`):
            Scores of [`evaluate_domain`], with `per_class_iou` and `confusion_matrix`.

    Returns:
        `matplotlib.figure.Figure`: The figure. Rows of classes that no label has are empty.
    """
    require_matplotlib("figures of reports")
    names = list(scores["per_class_iou"])
    counts = np.array(scores["confusion_matrix"], dtype=float)[:, : len(names)]
    labelled = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100 * counts, labelled, out=np.full_like(counts, np.nan), where=labelled > 0)
    side = 1.8 + min(0.38 * len(names), _LARGEST_MATRIX)
    figure = matplotlib_figure.Figure(figsize=(side + 0.6, side), layout="constrained")
    plot = figure.subplots()
    picture = plot.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    plot.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    plot.set_yticks(range(len(names)), names, fontsize=8)
    plot.set(xlabel="prediction", ylabel="label")
    if len(names) <= _MAX_CLASSES_WITH_NUMBERS:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                colour = "white" if share > 50 else "black"
                plot.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(picture, shrink=0.7, label="% of the label's pixels")
    return figure


def frequent_confusions(scores: dict[str, Any], count: int = 10) -> list[list[str]]:
    """
    The most frequent errors: a table of label, prediction, and their share of all wrong pixels and of the label's.

    Args:
        scores (`dict`):
            Scores of [`evaluate_domain`], with `per_class_iou` and `confusion_matrix`.
        count (`int`, *optional*, defaults to 10):
            How many to list.

    Returns:
        `list[list[str]]`: The table, the header first.
    """
    names = list(scores["per_class_iou"])
    counts = np.array(scores["confusion_matrix"], dtype=np.int64)[:, : len(names)]
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    rows = [["label", "predicted as", "% of all errors", "% of the label's pixels"]]
    for position in np.argsort(-errors, axis=None, kind="stable")[:count]:
        label, prediction = np.unravel_index(position, errors.shape)
        pixels = errors[label, prediction]
        if pixels:
            shares = (100 * pixels / errors.sum(), 100 * pixels / counts[label].sum())
            rows.append([names[label], names[prediction], *(f"{share:.2f}" for share in shares)])
    return rows
