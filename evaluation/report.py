"""The report of an evaluation as text: a table of scores, a line per domain, and what was missing."""

from typing import Any

from mfuser.data.tables import MAPILLARY


def score_table(domains: dict[str, dict[str, Any]]) -> str:
    """
    A table of IoU in percent: one row per class, one column per domain or condition.

    Args:
        domains (`dict[str, dict]`):
            The results of `evaluate_domain` by name.

    Returns:
        `str`: The table, with a dash where a class does not count.
    """
    columns: dict[str, dict[str, Any]] = {}
    for title, result in domains.items():
        if result["pooled"] is None:
            continue
        columns |= {f"{title} {condition}": scores for condition, scores in result["conditions"].items()}
        columns[f"{title} pooled" if result["conditions"] else title] = result["pooled"]
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores["per_class_iou"]))
    rows = [["class", *columns]]
    rows += [[name, *(_class_iou(scores, name) for scores in columns.values())] for name in names]
    rows.append(["mean IoU", *(f"{100 * scores['mean_iou']:.2f}" for scores in columns.values())])
    rows.append(["images", *(str(scores["images"]) for scores in columns.values())])
    return _table(rows)


def confidence_table(domains: dict[str, dict[str, Any]]) -> str:
    """
    A table of the figures about confidences in percent: one row per domain or condition, without and with calibration.

    Args:
        domains (`dict[str, dict]`):
            The results of `evaluate_domain` by name, at least one of them with `confidence`.
    """
    rows: list[list[str]] = []
    for title, result in domains.items():
        for name, scores in result.get("confidence", {}).items():
            figures = {f"{title} {condition}": each for condition, each in scores["conditions"].items()}
            figures[f"{title} pooled" if figures else title] = scores["pooled"]
            for label, each in figures.items():
                shares = [f"mIoU at {100 * at['requested']:g} %" for at in each["coverage"]]
                header = ["confidence", "", "ECE", "AUROC", "AUPR", *shares]
                values = (each["ece"], each["auroc"], each["aupr"], *(at["mean_iou"] for at in each["coverage"]))
                rows.append([label, name, *("-" if value is None else f"{100 * value:.2f}" for value in values)])
    return _table([header, *rows])


def _class_iou(scores: dict[str, Any], name: str) -> str:
    iou = scores["per_class_iou"][name] if name in scores["classes_averaged"] else None
    return "-" if iou is None else f"{100 * iou:.2f}"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_table_line(row, widths) for row in rows)


def _table_line(row: list[str], widths: list[int]) -> str:
    """The first cell aligned to the left, the others to the right."""
    cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
    cells[0] = row[0].ljust(widths[0])
    return "  ".join(cells)


def summary(report: dict[str, Any]) -> str:
    """
    The table of scores, and one line per domain with its score and the conditions under which it was measured.

    Args:
        report (`dict`):
            The report that `mfuser evaluate` writes.
    """
    domains = report["domains"]
    lines = [score_table(domains), ""] if any(result["pooled"] for result in domains.values()) else []
    if any("confidence" in result for result in domains.values()):
        lines += [confidence_table(domains), ""]
    for title, result in domains.items():
        if result["mean_iou"] is None:
            lines.append(f"{title}: {result['unlabelled_images']} images without labels, predicted only")
        else:
            score = f"{100 * result['mean_iou']:.2f} % mean IoU"
            if result["mean_iou_over"] == "conditions":
                score += (
                    f" (mean over {', '.join(result['conditions'])}; "
                    f"all pixels pooled: {100 * result['pooled']['mean_iou']:.2f} %)"
                )
            lines.append(f"{title}: {score}{describe(report['protocol'], result)}")
    if report["mean_iou"] is not None and len(domains) > 1:
        lines.append(f"mean over domains: {100 * report['mean_iou']:.2f} %")
    return "\n".join(lines)


def describe(protocol: dict[str, Any], result: dict[str, Any]) -> str:
    """The conditions under which a score was measured, as text: ', P2, segmented at 1024x2048, ...'."""
    at = result["segmented_at"]
    size = "the images' size" if at["fit"] is None else "x".join(map(str, at["fit"]))
    words = [protocol["name"], f"segmented at {size}{', halved first' if at['halve_first'] else ''}"]
    if result["domain"] == MAPILLARY.title:
        words.append(f"label map {result['label_map'] or 'unknown'}")
        words.append(f"{result['label_size']}-size labels")
    if protocol["classes"] != "domain":
        words.append(f"classes {protocol['classes']}")
    if protocol["flip"]:
        words.append("flip")
    if protocol["scales"] != [1.0]:
        words.append(f"scales {' '.join(f'{scale:g}' for scale in protocol['scales'])}")
    return f", {', '.join(words)}"


def shortfalls(title: str, result: dict[str, Any]) -> list[str]:
    """The reasons why a score is not that of the whole official split, one line each."""
    lines = []
    if result["skipped"]:
        first = result["skipped"][0]
        lines.append(f"{title}: skipped {len(result['skipped'])}, the first: {first['name']}: {first['reason']}")
    images = result["images"] + result["unlabelled_images"]
    if result["expected_images"] not in (None, images):
        lines.append(f"{title}: {images} images; the official {result['split']} split has {result['expected_images']}")
    if result["images"] and result["unlabelled_images"]:
        lines.append(f"{title}: {result['unlabelled_images']} images have no label and were not scored")
    return lines
