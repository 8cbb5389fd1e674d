"""Results of `mfuser evaluate` read from their files, and the settings in which they differ."""

import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mfuser.evaluation.confidence import COVERAGES
from mfuser.evaluation.corruptions import SEVERITIES
from mfuser.files import read_json

# What a result must hold: a type, several types, a list of one kind of element, a dictionary with given keys, or, with
# the key `str`, a dictionary with any keys. A key that ends with "?" may be missing.
_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))
_OPTIONAL_TEXT = (str, type(None))
_SKIPPED = [{"name": str, "reason": str}]
_SCORES = {
    "images": int,
    "mean_iou": _NUMBER,
    "overall_accuracy": _NUMBER,
    "per_class_iou": {str: _OPTIONAL_NUMBER},
    "classes_averaged": [str],
    "confusion_matrix": [[int]],
}
_CONFIDENCE = {
    "ece": _NUMBER,
    "auroc": _OPTIONAL_NUMBER,
    "aupr": _OPTIONAL_NUMBER,
    "coverage": [{"requested": _NUMBER, "mean_iou": _OPTIONAL_NUMBER}],
    "reliability": [{"confidence": _NUMBER, "accuracy": _NUMBER, "pixels": int}],
}
_CORRUPTED = {
    "mean_iou": _NUMBER,
    "overall_accuracy": _NUMBER,
    "images": int,
    "skipped": _SKIPPED,
    "conditions": {str: _NUMBER},
}
_DOMAIN = {
    "mean_iou": _OPTIONAL_NUMBER,
    "mean_iou_over": _OPTIONAL_TEXT,
    "domain": _OPTIONAL_TEXT,
    "split": str,
    "label_map": _OPTIONAL_TEXT,
    "label_size": str,
    "segmented_at": {"fit": (list, type(None)), "halve_first": bool},
    "images": int,
    "expected_images": (int, type(None)),
    "unlabelled_images": int,
    "skipped": _SKIPPED,
    "pooled": (dict, type(None)),
    "conditions": {str: _SCORES},
    "confidence?": {str: {"pooled": _CONFIDENCE, "conditions": {str: _CONFIDENCE}}},
    "corruptions?": {
        "mean_iou": _NUMBER,
        "relative_mean_iou": _OPTIONAL_NUMBER,
        "mean_iou_by_corruption": {str: _NUMBER},
        "scores": {str: {str: _CORRUPTED}},
    },
    "examples?": [{"kind": str, "name": str, "mean_iou": _NUMBER, "accuracy": _NUMBER, "file": str}],
}
_RESULT = {
    "mean_iou": _OPTIONAL_NUMBER,
    "complete": bool,
    "domains": {str: _DOMAIN},
    "model": {"name": str, "sha256": {str: str}},
    "protocol": {
        "name": str,
        "crop_size": int,
        "crop_stride": int,
        "resizing": str,
        "flip": bool,
        "scales": [_NUMBER],
        "classes": str,
        "corruptions?": {
            "names": [str],
            "severities": [int],
            "seed": int,
            "applied_to": str,
            "library": str,
            "library_version": str,
        },
    },
    "run": {"started": str, "device": str, "dtype": str},
    "versions": {str: str},
}
# The settings of a domain that change the meaning of its score. Paths do not.
_DOMAIN_SETTINGS = ("domain", "split", "label_map", "label_size", "segmented_at", "images", "mean_iou_over")


def read_result(path: str | Path) -> dict[str, Any]:
    """
    Reads a result of `mfuser evaluate` and checks that it has the form that reports rely on.

    Args:
        path (`str` or `Path`):
            The JSON file.

    Returns:
        `dict`: The result.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a result of `mfuser evaluate`, with the first place that differs.
    """
    result = read_json(Path(path))
    try:
        _check(result, _RESULT, "")
        if not result["domains"]:
            raise ValueError("it has no domain")
        for title, domain in result["domains"].items():
            _check_domain(domain, f"domains.{title}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a result of `mfuser evaluate`: {error}") from None
    return result


def _check(value: Any, form: Any, where: str) -> None:
    """Raises `ValueError` unless `value` has the form."""
    if isinstance(form, list):
        _check_type(value, list, where)
        for number, each in enumerate(value):
            _check(each, form[0], f"{where}[{number}]")
    elif isinstance(form, dict):
        _check_type(value, dict, where)
        if str in form:
            for name, each in value.items():
                _check(each, form[str], f"{where}.{name}")
            return
        for key, inner in form.items():
            name = key.removesuffix("?")
            if name in value:
                _check(value[name], inner, f"{where}.{name}".lstrip("."))
            elif name == key:
                raise ValueError(f"{where or 'it'} has no {name!r}")
    else:
        _check_type(value, form, where)


def _check_type(value: Any, kinds: Any, where: str) -> None:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{where or 'it'} is of type {type(value).__name__}; it must be {names}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; it must be a finite number")


def _check_domain(domain: dict[str, Any], where: str) -> None:
    """Raises `ValueError` if parts of a domain, each of the right form, do not fit together."""
    if domain["pooled"] is not None:
        _check(domain["pooled"], _SCORES, f"{where}.pooled")
        _check_matrix(domain["pooled"], f"{where}.pooled")
    for name, scores in domain["conditions"].items():
        _check_matrix(scores, f"{where}.conditions.{name}")
    for kind, scores in domain.get("confidence", {}).items():
        figures = scores["pooled"]
        if not figures["reliability"] or any(each["pixels"] < 1 for each in figures["reliability"]):
            raise ValueError(f"{where}.confidence.{kind} has no reliability bins, or empty ones")
        if [each["requested"] for each in figures["coverage"]] != list(COVERAGES):
            raise ValueError(f"{where}.confidence.{kind}.coverage must be for {', '.join(map(str, COVERAGES))}")
    if "corruptions" in domain:
        scores, means = domain["corruptions"]["scores"], domain["corruptions"]["mean_iou_by_corruption"]
        if not scores or not all(scores.values()) or list(scores) != list(means):
            raise ValueError(f"{where}.corruptions has no scores, or not a mean for each corruption")
        severities = {severity for by_severity in scores.values() for severity in by_severity}
        if not severities <= set(map(str, SEVERITIES)) or domain["mean_iou"] is None:
            raise ValueError(
                f"{where}.corruptions must have scores for severities {SEVERITIES[0]} to {SEVERITIES[-1]}"
            )


def _check_matrix(scores: dict[str, Any], where: str) -> None:
    """Raises `ValueError` if a confusion matrix does not fit the classes."""
    classes, matrix = len(scores["per_class_iou"]), scores["confusion_matrix"]
    if not classes or len(matrix) != classes or any(len(row) != classes + 1 for row in matrix):
        raise ValueError(
            f"{where} has a confusion matrix that is not {classes} x {classes + 1}, for {classes} classes"
        )
    if any(count < 0 for row in matrix for count in row):
        raise ValueError(f"{where} has a confusion matrix with a negative count")
    unknown = [name for name in scores["classes_averaged"] if name not in scores["per_class_iou"]]
    if unknown:
        raise ValueError(f"{where} averages over {unknown[0]!r}, which is not one of its classes")


def protocol_settings(result: dict[str, Any]) -> dict[str, Any]:
    """
    Everything that changes the meaning of the scores of a result, by name.

    Besides the recorded settings these are the number of pixels with each label, which differ if the images, the label
    map or the size of the labels do, and the corruptions that were scored, which may be fewer than were requested.

    Args:
        result (`dict`):
            What `read_result` returns.
    """
    settings: dict[str, Any] = {"domains": list(result["domains"])}
    for name, value in result["protocol"].items():
        if isinstance(value, dict):
            settings |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            settings[name] = value
    for title, domain in result["domains"].items():
        settings |= {f"{title}.{name}": domain[name] for name in _DOMAIN_SETTINGS}
        if domain["pooled"] is not None:
            settings[f"{title}.classes"] = list(domain["pooled"]["per_class_iou"])
            pixels = [sum(row) for row in domain["pooled"]["confusion_matrix"]]
            settings[f"{title}.pixels of each label"] = pixels
        settings[f"{title}.conditions"] = list(domain["conditions"])
        if "corruptions" in domain:
            scores = domain["corruptions"]["scores"]
            settings[f"{title}.corruptions"] = [f"{name} {severity}" for name in scores for severity in scores[name]]
    return settings


def protocol_differences(results: dict[str, dict[str, Any]]) -> list[str]:
    """
    The settings in which results differ, one line each.

    Args:
        results (`dict[str, dict]`):
            Results by name.

    Returns:
        `list[str]`: The setting with the value of each result, "none" where it has no such setting.
    """
    settings = {name: protocol_settings(result) for name, result in results.items()}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    differences = []
    for key in keys:
        values = [each.get(key) for each in settings.values()]
        if any(value != values[0] for value in values):
            shown = [_short(value) for value in values]
            lists = [value for value in values if isinstance(value, list)]
            if len(set(shown)) == 1 and len(lists) == len(values):  # cut before they differ
                differing = [each for each in zip_longest(*lists) if any(one != each[0] for one in each)]
                shown = [_short(list(each)) for each in zip(*differing, strict=True)]
            texts = (f"{text} in {name}" for name, text in zip(settings, shown, strict=True))
            differences.append(f"{key} is {', '.join(texts)}")
    return differences


def _short(value: Any) -> str:
    """A value as text of a readable length."""
    if value is None:
        return "none"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
