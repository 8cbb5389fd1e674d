"""The content of a report: sections of paragraphs, tables and figures, from results of `mfuser evaluate`."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from mfuser.evaluation import figures
from mfuser.evaluation.reliability_diagram import reliability_figure
from mfuser.evaluation.report import (
    condition_rows,
    confidence_rows,
    corruption_rows,
    describe,
    score_rows,
    shortfalls,
    skipped_when_corrupted,
)

Results = dict[str, dict[str, Any]]
_STYLES: dict[str, dict[Any, Any]] = {
    "light": {"figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff"},
    "dark": {
        "figure.facecolor": "#16181c",
        "axes.facecolor": "#16181c",
        "legend.facecolor": "#16181c",
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#e4e6ea"),
        "grid.color": "#9aa0a6",
    },
}
_MAX_EXAMPLE_BYTES = 50 * 2**20


@dataclass(frozen=True)
class Paragraph:
    """Text. A `notice` is highlighted."""

    kind: ClassVar[str] = "paragraph"
    text: str
    notice: bool = False


@dataclass(frozen=True)
class Table:
    """Cells, the header first."""

    kind: ClassVar[str] = "table"
    rows: list[list[str]]
    caption: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers, which are aligned to the right. A dash stands for a missing one."""
        header, *rows = self.rows
        columns = zip(*rows, strict=True) if rows else [()] * len(header)
        return [
            any(map(_is_number, column)) and all(_is_number(each) or each == "-" for each in column)
            for column in columns
        ]


@dataclass(frozen=True)
class Figure:
    """A picture as the content of a file of that name, with a version for dark pages if there is one."""

    kind: ClassVar[str] = "figure"
    name: str
    caption: str
    light: bytes
    dark: bytes | None = None


@dataclass(frozen=True)
class Section:
    """A part of a report under one heading."""

    title: str
    blocks: list[Paragraph | Table | Figure] = field(default_factory=list)


def report_sections(results: Results, folders: list[Path], differences: list[str]) -> tuple[list[Section], list[Path]]:
    """
    Makes the sections of a report.

    Args:
        results (`dict[str, dict]`):
            What `read_result` returns, by name.
        folders (`list[Path]`):
            The folder of each result's file, which its example images are relative to.
        differences (`list[str]`):
            The differences between the protocols of the results, if there are any.

    Returns:
        `tuple[list[Section], list[Path]]`: The sections, those without content left out, and the example images that
        do not exist.

    Raises:
        ValueError: If an example image is outside its folder, or is not a PNG.
    """
    groups = _groups(results)
    examples, missing = _examples(results, folders)
    sections = [
        Section("", _notices(results, differences)),
        Section("Scores", [Table(_overview_rows(results))]),
        Section("Classes", [Table(score_rows(group), title) for title, group in groups if _scored(group)]),
        Section("Conditions", _conditions(groups)),
        Section("Corruptions", _corruptions(results, groups)),
        Section("Confidence", _confidence(groups)),
        Section("Confusions", _confusions(results)),
        Section("Examples", examples),
        Section("How it was measured", _protocol(results)),
    ]
    return [section for section in sections if section.blocks], missing


def _groups(results: Results) -> list[tuple[str, Results]]:
    """The content of each table, by caption: the domains of a single result, or the results of a domain."""
    if len(results) == 1:
        return [("", next(iter(results.values()))["domains"])]
    titles = dict.fromkeys(title for result in results.values() for title in result["domains"])
    return [
        (title, {name: each["domains"][title] for name, each in results.items() if title in each["domains"]})
        for title in titles
    ]


def _columns(results: Results) -> list[tuple[str, str, str]]:
    """(label, result, domain) of every domain of every result, grouped by domain."""
    titles = dict.fromkeys(title for result in results.values() for title in result["domains"])
    return [
        (title if len(results) == 1 else f"{title}, {name}", name, title)
        for title in titles
        for name, result in results.items()
        if title in result["domains"]
    ]


def _scored(group: Results) -> bool:
    return any(result["pooled"] is not None for result in group.values())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _notices(results: Results, differences: list[str]) -> list[Paragraph | Table | Figure]:
    notices: list[Paragraph | Table | Figure] = []
    if differences:
        text = "These results have different protocols, so their scores cannot be compared: "
        notices.append(Paragraph(text + "; ".join(differences), notice=True))
    for name, result in results.items():
        if not result["complete"]:
            notices.append(Paragraph(f"{name} is the result of an evaluation that was interrupted", notice=True))
    for label, name, title in _columns(results):
        domain = results[name]["domains"][title]
        notices += [Paragraph(line, notice=True) for line in shortfalls(label, domain)]
        skipped = skipped_when_corrupted(domain)
        if skipped:
            first = f"{skipped[0]['name']}: {skipped[0]['reason']}"
            text = f"{label}: {len(skipped)} images were skipped under corruptions alone, the first: {first}"
            notices.append(Paragraph(text, notice=True))
    return notices


def _overview_rows(results: Results) -> list[list[str]]:
    """One row per domain and result, with the difference from the first result where there are several."""
    domains = [domain for result in results.values() for domain in result["domains"].values()]
    corrupted = any("corruptions" in domain for domain in domains)
    header = ["domain", "mean IoU, %", "accuracy, %", "images"]
    header += ["mean corrupted IoU, %", "of that without, %"] if corrupted else []
    header += ["difference of mean IoU"] if len(results) > 1 else []
    rows = [header]
    first = next(iter(results.values()))
    for label, name, title in _columns(results):
        domain = results[name]["domains"][title]
        accuracy = domain["pooled"]["overall_accuracy"] if domain["pooled"] else None
        row = [label, _percent(domain["mean_iou"]), _percent(accuracy), str(domain["images"])]
        if corrupted:
            under = domain.get("corruptions", {})
            row += [_percent(under.get("mean_iou")), _percent(under.get("relative_mean_iou"))]
        if len(results) > 1:
            base = first["domains"].get(title, {}).get("mean_iou")
            both = base is not None and domain["mean_iou"] is not None
            row.append(f"{100 * (domain['mean_iou'] - base):+.2f}" if both else "-")
        rows.append(row)
    return rows


def _conditions(groups: list[tuple[str, Results]]) -> list[Paragraph | Table | Figure]:
    return [
        Table(condition_rows(group), title)
        for title, group in groups
        if any(result["conditions"] for result in group.values())
    ]


def _corruptions(results: Results, groups: list[tuple[str, Results]]) -> list[Paragraph | Table | Figure]:
    blocks: list[Paragraph | Table | Figure] = []
    for number, (title, group) in enumerate(groups):
        corrupted = {name: result for name, result in group.items() if "corruptions" in result}
        if corrupted:
            caption = f"{title}: " if title else ""
            drawn = _drawn(figures.severity_curves, corrupted)
            blocks.append(
                Figure(f"corruptions-{number}.png", f"{caption}mean IoU by severity; 0 is no corruption", *drawn)
            )
            blocks.append(Table(corruption_rows(corrupted), f"{caption}mean IoU by corruption, %"))
    return blocks


def _confidence(groups: list[tuple[str, Results]]) -> list[Paragraph | Table | Figure]:
    blocks: list[Paragraph | Table | Figure] = []
    for number, (title, group) in enumerate(groups):
        pooled = {
            f"{name}, {kind}": scores["pooled"]
            for name, result in group.items()
            for kind, scores in result.get("confidence", {}).items()
        }
        if not pooled:
            continue
        caption = f"{title}: " if title else ""
        blocks.append(Table(confidence_rows(group), f"{caption}confidences, %"))
        drawn = _drawn(reliability_figure, pooled)
        blocks.append(Figure(f"reliability-{number}.png", f"{caption}reliability", *drawn))
        drawn = _drawn(figures.risk_coverage, pooled)
        blocks.append(Figure(f"risk-coverage-{number}.png", f"{caption}risk and coverage", *drawn))
    return blocks


def _confusions(results: Results) -> list[Paragraph | Table | Figure]:
    blocks: list[Paragraph | Table | Figure] = []
    for number, (label, name, title) in enumerate(_columns(results)):
        scores = results[name]["domains"][title]["pooled"]
        if scores is not None:
            drawn = _drawn(figures.confusion_matrix, scores)
            blocks.append(Figure(f"confusion-{number}.png", f"{label}: confusion matrix", *drawn))
            blocks.append(Table(figures.frequent_confusions(scores), f"{label}: most frequent errors"))
    return blocks


def _examples(results: Results, folders: list[Path]) -> tuple[list[Paragraph | Table | Figure], list[Path]]:
    blocks: list[Paragraph | Table | Figure] = []
    missing = []
    folder_of = dict(zip(results, folders, strict=True))
    for label, name, title in _columns(results):
        for example in results[name]["domains"][title].get("examples", ()):
            scores = f"mean IoU {_percent(example['mean_iou'])} %, accuracy {_percent(example['accuracy'])} %"
            caption = f"{label}, {example['kind']}: {example['name']}, {scores}"
            file = _example_file(folder_of[name], example["file"])
            if file.exists():
                blocks.append(Figure(f"example-{len(blocks)}.jpg", caption, _example_picture(file)))
            else:
                blocks.append(Paragraph(f"{caption}: the picture is missing"))
                missing.append(file)
    return blocks, missing


def _example_file(folder: Path, name: str) -> Path:
    """The file of an example. A result is untrusted input, so it must not refer to files outside of its folder."""
    folder = folder.resolve()
    file = (folder / name).resolve()
    if folder not in file.parents:
        raise ValueError(f"the example {name!r} is outside the folder of its result, {folder}")
    return file


def _example_picture(file: Path) -> bytes:
    """
    An example, re-encoded as JPEG, a fifth of the size of its PNG.

    Raises:
        ValueError: If the file is not a PNG image, or too large for a page.
    """
    if file.stat().st_size > _MAX_EXAMPLE_BYTES:
        raise ValueError(f"{file} has more than {_MAX_EXAMPLE_BYTES >> 20} MiB; an example must have less")
    stream = io.BytesIO()
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.convert("RGB").save(stream, format="JPEG", quality=85)
    except Exception as error:  # Pillow raises errors of almost any type for damaged files
        raise ValueError(f"{file} is not a PNG image: {error}") from None
    return stream.getvalue()


def _drawn(draw: Callable[[Any], Any], content: Any) -> tuple[bytes, bytes]:
    """The figure that `draw` makes of `content` as PNG, in light and in dark."""
    import matplotlib as mpl  # optional, see `require_matplotlib`

    pictures = []
    for style in _STYLES.values():
        # Names are shown as they are, also those that TeX would interpret.
        with mpl.rc_context(style | {"text.parse_math": False}):
            stream = io.BytesIO()
            draw(content).savefig(stream, format="png", dpi=110)
        pictures.append(stream.getvalue())
    return pictures[0], pictures[1]


def _protocol(results: Results) -> list[Paragraph | Table | Figure]:
    header = ["", *results]
    rows = [header]
    for label, get in (
        ("model", lambda result: result["model"]["name"]),
        ("weights (SHA-256)", lambda result: ", ".join(value[:12] for value in result["model"]["sha256"].values())),
        ("started", lambda result: result["run"]["started"]),
        ("device", lambda result: result["run"]["device"]),
        ("precision", _precision),
        ("windows", lambda result: "{crop_size}, {crop_stride} apart".format(**result["protocol"])),
        ("resizing", lambda result: result["protocol"]["resizing"]),
        ("corruptions", _corruption_protocol),
        ("versions", lambda result: ", ".join(f"{name} {value}" for name, value in result["versions"].items())),
    ):
        rows.append([label, *(get(result) for result in results.values())])
    described = [
        [label, describe(results[name]["protocol"], results[name]["domains"][title]).removeprefix(", ")]
        for label, name, title in _columns(results)
    ]
    return [Table(rows), Table([["domain", "protocol"], *described])]


def _precision(result: dict[str, Any]) -> str:
    quantization = result["run"].get("quantization")
    return f"{result['run']['dtype']}{f', {quantization}' if quantization else ''}"


def _corruption_protocol(result: dict[str, Any]) -> str:
    corruptions = result["protocol"].get("corruptions")
    if corruptions is None:
        return "none"
    severities = ", ".join(map(str, corruptions["severities"]))
    return (
        f"{len(corruptions['names'])} of {corruptions['library']} {corruptions['library_version']}, severities "
        f"{severities}, seed {corruptions['seed']}, applied to {corruptions['applied_to']}"
    )
