"""
The results of an evaluation as text: tables, a line per domain, and what was missing.

Functions whose name ends in `_rows` return the cells of a table, the header first. `score_table` and `summary` align
them for a terminal; `mfuser report` makes pages of them.
"""

from typing import Any

from mfuser.data.tables import MAPILLARY


def score_table(domains: dict[str, dict[str, Any]]) -> str:
    """The table of [`score_rows`], aligned."""
    return _table(score_rows(domains))


def score_rows(domains: dict[str, dict[str, Any]]) -> list[list[str]]:
    """
    A table of IoU in percent: one row per class, one column per domain or condition.

    Args:
        domains (`dict[str, dict]`):
            The results of `evaluate_domain` by name.

    Returns:
        `list[list[str]]`: The table, with a dash where a class does not count.
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
    return rows


def confidence_rows(domains: dict[str, dict[str, Any]]) -> list[list[str]]:
    """
    A table of the metrics of confidences in percent: one row per domain or condition, without and with calibration.

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
    return [header, *rows]


def corruption_rows(domains: dict[str, dict[str, Any]]) -> list[list[str]]:
    """
    A table of mean IoU in percent: one row per domain and corruption, one column per severity.

    Args:
        domains (`dict[str, dict]`):
            The results of `mfuser evaluate` by name, at least one of them with `corruptions`.
    """
    scores = {title: result["corruptions"] for title, result in domains.items() if "corruptions" in result}
    # Severities may be missing in a result that was interrupted.
    severities = sorted({level for each in scores.values() for by in each["scores"].values() for level in by})
    rows = [["corruption", "", *(f"severity {severity}" for severity in severities), "mean"]]
    for title, corruptions in scores.items():
        for name, by_severity in corruptions["scores"].items():
            values = [by_severity[level]["mean_iou"] if level in by_severity else None for level in severities]
            values.append(corruptions["mean_iou_by_corruption"][name])
            rows.append([title, name, *("-" if value is None else f"{100 * value:.2f}" for value in values)])
    return rows


def condition_rows(domains: dict[str, dict[str, Any]]) -> list[list[str]]:
    """
    A table of mean IoU in percent: one row per domain, and per corruption of it; one column per condition.

    Args:
        domains (`dict[str, dict]`):
            The results of `mfuser evaluate` by name, at least one of them with conditions.
    """
    conditions = list(dict.fromkeys(name for result in domains.values() for name in result["conditions"]))
    rows = [["mean IoU", "", *conditions]]
    for title, result in domains.items():
        if not result["conditions"]:
            continue
        scores = {"": {name: each["mean_iou"] for name, each in result["conditions"].items()}}
        for corruption, by_severity in result.get("corruptions", {}).get("scores", {}).items():
            scores[corruption] = _mean_by_condition([each["conditions"] for each in by_severity.values()])
        for label, by_condition in scores.items():
            values = (by_condition.get(name) for name in conditions)
            rows.append([title, label, *("-" if value is None else f"{100 * value:.2f}" for value in values)])
    return rows


def _mean_by_condition(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean over severities of each condition that has a score at all of them."""
    names = [name for name in scores[0] if all(name in each for each in scores)]
    return {name: sum(each[name] for each in scores) / len(scores) for name in names}


def skipped_when_corrupted(result: dict[str, Any]) -> list[dict[str, str]]:
    """`name` and `reason` of the images of a domain that were skipped under a corruption alone, once each."""
    scores = result.get("corruptions", {}).get("scores", {})
    skipped = [skip for by_severity in scores.values() for each in by_severity.values() for skip in each["skipped"]]
    return list({each["name"]: each for each in skipped}.values())


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
        lines += [_table(confidence_rows(domains)), ""]
    if any("corruptions" in result for result in domains.values()):
        lines += [_table(corruption_rows(domains)), ""]
        if any(result["conditions"] for result in domains.values()):
            lines += [_table(condition_rows(domains)), ""]
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
        if "corruptions" in result:
            lines.append(f"{title}, corrupted: {_corrupted(report['protocol'], result)}")
        skipped = skipped_when_corrupted(result)
        if skipped:
            first = f"{skipped[0]['name']}: {skipped[0]['reason']}"
            lines.append(f"{title}: skipped {len(skipped)} under corruptions alone, the first: {first}")
    if report["mean_iou"] is not None and len(domains) > 1:
        lines.append(f"mean over domains: {100 * report['mean_iou']:.2f} %")
    return "\n".join(lines)


def _corrupted(protocol: dict[str, Any], result: dict[str, Any]) -> str:
    """The score of a domain under corruptions, with the list of corruptions."""
    score, corruptions = result["corruptions"], protocol["corruptions"]
    relative = score["relative_mean_iou"]
    share = "" if relative is None else f", {100 * relative:.1f} % of that without corruptions"
    severities = ", ".join(map(str, corruptions["severities"]))
    return (
        f"{100 * score['mean_iou']:.2f} % mean IoU{share} ({len(corruptions['names'])} corruptions, "
        f"severities {severities}, seed {corruptions['seed']})"
    )


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
