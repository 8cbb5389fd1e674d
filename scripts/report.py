"""
`mfuser report`: turns results of `mfuser evaluate` into a page, and compares them.

    mfuser report evaluation.json --output report
    mfuser report before.json after.json --output comparison

docs/robustness.md shows an example.
"""

import argparse
import base64
import re
import sys
from pathlib import Path

import jinja2
from PIL import Image

from mfuser.evaluation.comparison import protocol_differences, read_result
from mfuser.evaluation.reliability_diagram import require_matplotlib
from mfuser.files import atomic_folder, check_new_folder, write_text
from mfuser.scripts import cli
from mfuser.scripts.report_sections import Figure, Section, report_sections

TEMPLATES = Path(__file__).parent / "templates"
# Characters that Markdown could interpret as markup, including the colon of a URL, so that no name becomes a link.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~$#!&@]|:(?=//)|(?<=www)\.)")

DESCRIPTION = """Turns results of `mfuser evaluate` into a report: tables of domains, classes, conditions, corruptions
and confidences, curves, confusion matrices and examples. Several results are compared side by side.

It writes into the output folder
  report.html   one self-contained file, in light and dark mode
  report.md     the same as Markdown, with its pictures in figures/
Results of different protocols are refused, since their scores have different meanings.
Exit code: 0 if the report was written, 2 if the command could not run."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT.json", help="files that `mfuser evaluate` wrote"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder for the report")
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare results of different protocols nevertheless; the report lists the differences",
    )
    return parser.parse_args(arguments)


def result_names(paths: list[Path]) -> list[str]:
    """A name for each file: the shortest end of its path that no other file has."""
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise ValueError(f"{path} is given more than once; give each result once")
    names = []
    for path in resolved:
        parts = (*path.parts[:-1], path.stem)
        others = [(*other.parts[:-1], other.stem) for other in resolved if other != path]
        length = next(
            (size for size in range(1, len(parts)) if all(other[-size:] != parts[-size:] for other in others)), None
        )
        names.append(path.name if length is None else "/".join(parts[-length:]))
    return names


def readable(value: object) -> str:
    """Text in one line, without characters that cannot be printed or that change the direction of writing."""
    return "".join(character if character.isprintable() else " " for character in str(value))


def markdown_text(value: object) -> str:
    """Text that Markdown shows as it is, also in a table."""
    return _MARKUP.sub(r"\\\1", readable(value))


def data_uri(picture: bytes, name: str) -> str:
    """A picture as a data URI."""
    kind = Image.registered_extensions()[Path(name).suffix]
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture).decode()}"


def html_page(title: str, sections: list[Section]) -> str:
    """The report as a page that contains everything it shows."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"readable": readable, "data_uri": data_uri}
    return environment.get_template("report.html.jinja").render(title=title, sections=sections)


def markdown_page(title: str, sections: list[Section]) -> str:
    """The report as Markdown, with its pictures as files in figures/."""
    environment = jinja2.Environment(  # every value is escaped, for Markdown instead of HTML
        loader=jinja2.FileSystemLoader(TEMPLATES),
        finalize=markdown_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.md.jinja").render(title=title, sections=sections)


def write_report(folder: Path, title: str, sections: list[Section]) -> None:
    """Writes the HTML and the Markdown report, with its pictures, into a new folder, which appears when complete."""
    with atomic_folder(folder) as new:
        (new / "figures").mkdir()
        for section in sections:
            for block in section.blocks:
                if isinstance(block, Figure):
                    (new / "figures" / block.name).write_bytes(block.light)
        write_text(new / "report.html", html_page(title, sections))
        write_text(new / "report.md", markdown_page(title, sections))


@cli.reports_errors("report")
def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    require_matplotlib("reports")
    check_new_folder(parsed.output)
    results = dict(zip(result_names(parsed.results), map(read_result, parsed.results), strict=True))
    differences = protocol_differences(results)
    if differences and not parsed.force:
        raise ValueError(
            f"the results have different protocols: {'; '.join(differences)}; --force compares them nevertheless"
        )
    title = f"Evaluation: {', '.join(results)}" if len(results) == 1 else f"Comparison: {', '.join(results)}"
    folders = [path.parent for path in parsed.results]
    sections, missing = report_sections(results, folders, differences)
    for file in missing:
        print(f"mfuser report: {file} is missing; the report has a note in its place", file=sys.stderr)
    write_report(parsed.output, title, sections)
    print(f"written to {parsed.output / 'report.html'} and {parsed.output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
