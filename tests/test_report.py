"""A report is self-contained and escapes all names; results of different protocols are not compared."""

import copy
import json
import re
from html.parser import HTMLParser

import datasets
import numpy as np
import pytest
from colour_scorer import NAMES, Colours, pixels_and_labels, write_dataset
from PIL import Image

from mfuser import MFuserImageProcessor
from mfuser.evaluation import reliability_diagram
from mfuser.evaluation.comparison import protocol_differences
from mfuser.evaluation.domains import open_domain
from mfuser.evaluation.figures import confusion_matrix, frequent_confusions, risk_coverage, severity_curves
from mfuser.evaluation.scoring import evaluate_domain
from mfuser.scripts import cli
from mfuser.scripts import evaluate as evaluate_command
from mfuser.scripts.example_panels import WRONG, panel
from mfuser.scripts.report import markdown_text, result_names

MARKUP = "<script>alert(1)</script>"
HOSTILE = [
    MARKUP,
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }} | [a](javascript:alert(1)) | `x` **y** _z_",
    "$\\frac{1$ \n# heading \u202e http://evil.example",
]


@pytest.fixture(scope="module")
def evaluated(saved_model, tmp_path_factory):
    """The folder of a result with every part: two domains, conditions, corruptions, confidences, examples."""
    folder = tmp_path_factory.mktemp("evaluated")
    sizes = ((40, 56), (48, 36))
    day = write_dataset(folder / "data/validation.parquet", pixels_and_labels(4, sizes=sizes), ["fog", "night"] * 2)
    write_dataset(folder / "data/dusk.parquet", pixels_and_labels(3, seed=1, sizes=sizes))
    arguments = ["--model", saved_model, "--domains", f"mine={day.parent}", f"mine:dusk={day.parent}"]
    arguments += ["--confidence", "--examples", 1, "--corruptions", "contrast", "pixelate", "--severities", 1, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        output = folder / "result.json"
        assert evaluate_command.main([str(each) for each in (*arguments, "--output", output, "--workers", 0)]) == 0
    return folder


@pytest.fixture
def result(evaluated):
    return json.loads((evaluated / "result.json").read_text())


@pytest.fixture
def report(tmp_path, capsys):
    """Runs the command on results, which are written to files first, and returns exit code, folder and stderr."""

    def run(*results, options=(), folder=tmp_path):
        files = []
        for number, each in enumerate(results):
            files.append(folder / f"result-{number}.json" if isinstance(each, dict) else each)
            if isinstance(each, dict):
                files[-1].write_text(json.dumps(each))
        output = tmp_path / "report"
        code = cli.main(["report", *map(str, files), "--output", str(output), *options])
        return code, output, capsys.readouterr().err

    return run


class Page(HTMLParser):
    """The elements of a page with their attributes, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.cells, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.text.append(data)
        if self.elements and self.elements[-1][0] in ("td", "th"):
            self.cells[-1] += data.strip()


def test_the_page_shows_every_score_and_refers_to_nothing_else(evaluated, result, report):
    code, folder, _ = report(evaluated / "result.json")
    assert code == 0 and {path.name for path in folder.iterdir()} == {"report.html", "report.md", "figures"}
    text = (folder / "report.html").read_text()
    page = Page(text)
    for attributes in (attributes for _, attributes in page.elements):
        assert not {"href", "action", "data", "style"} & attributes.keys()
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/").startswith("data:image/")
    assert "url(" not in text and "@import" not in text
    (policy,) = (each["content"] for tag, each in page.elements if each.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")
    shown = set(page.cells)
    for domain in result["domains"].values():
        values = [domain["mean_iou"], domain["corruptions"]["mean_iou"], domain["corruptions"]["relative_mean_iou"]]
        values += [each for each in domain["pooled"]["per_class_iou"].values() if each is not None]
        values += [each["mean_iou"] for each in domain["conditions"].values()]
        values += [each["mean_iou"] for by in domain["corruptions"]["scores"].values() for each in by.values()]
        values += [domain["confidence"]["uncalibrated"]["pooled"][name] for name in ("ece", "auroc", "aupr")]
        assert {f"{100 * value:.2f}" for value in values} <= shown
    pictures = [each for tag, each in page.elements if tag == "img"]
    assert len(pictures) == 1 + 2 + 2 + 6  # severities; reliability, coverage; confusions; examples
    dark = [each for tag, each in page.elements if tag == "source"]
    assert len(dark) == 5 and {each["media"] for each in dark} == {"(prefers-color-scheme: dark)"}


@pytest.mark.slow
def test_markdown_shows_the_same_tables_and_pictures(evaluated, report):
    _, folder, _ = report(evaluated / "result.json")
    text = (folder / "report.md").read_text()
    page = Page((folder / "report.html").read_text())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell.strip().replace("\\", "") for row in rows if "---" not in row for cell in row[1:-1].split("|")]
    assert cells == page.cells
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert named == {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    assert len(named) == 11
    for name in named:
        with Image.open(folder / name) as image:
            image.load()


def test_names_are_shown_as_they_are_and_are_never_markup(evaluated, result, report, tmp_path):
    text = json.dumps(result)
    for name, hostile in zip(NAMES.values(), HOSTILE, strict=True):
        text = text.replace(f'"{name}"', json.dumps(hostile))
    hostile = json.loads(text)
    hostile["domains"] = dict(zip(HOSTILE, hostile["domains"].values(), strict=False))
    hostile["model"]["name"] = hostile["run"]["device"] = MARKUP
    hostile["versions"][MARKUP] = MARKUP
    for domain in hostile["domains"].values():
        domain["skipped"] = [{"name": MARKUP, "reason": MARKUP}]
        domain["conditions"] = dict(zip(HOSTILE, domain["conditions"].values(), strict=False))
        for example in domain["examples"]:
            example["name"] = example["kind"] = MARKUP
            example["file"] = "missing.png"
    code, folder, errors = report(hostile)
    assert code == 0 and "missing.png is missing" in errors
    page = Page((folder / "report.html").read_text())
    assert not {"script", "a", "iframe"} & {tag for tag, _ in page.elements}
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(each["src"].startswith("data:image/") for tag, each in page.elements if tag == "img")
    assert {MARKUP, HOSTILE[1]} <= set(page.cells)
    assert "49" not in "".join(cell for cell in page.cells if "7 * 7" in cell)
    lines = (folder / "report.md").read_text().splitlines()
    markup = [line for line in lines if re.search(r"(?<!\\)([<`*]|://)", line.strip("*"))]
    assert markup == []
    assert [line for line in lines if "heading" in line and line.lstrip().startswith("# heading")] == []
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
    tables = "\n".join(lines).split("\n\n")
    for table in tables:
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")}
        assert len(counts) <= 1
    assert widths


def test_text_is_escaped_for_markdown_in_one_line():
    assert markdown_text("a_b|c\n# <d>\u202e") == "a\\_b\\|c \\# \\<d\\> "
    assert markdown_text("camvid:dusk, https://x") == "camvid:dusk, https\\://x"
    assert markdown_text("www.example.com, a.b") == "www\\.example.com, a.b"


# comparison


def changed(result, path, value):
    result = copy.deepcopy(result)
    *parents, last = path
    place = result
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value(place[last]) if callable(value) else value
    return result


MINE = ("domains", "mine:dusk")
PROTOCOLS = {
    "flip": (("protocol", "flip"), True, "flip is False in result-0, True in result-1"),
    "size of windows": (("protocol", "crop_size"), 512, "crop_size is 64 in result-0, 512"),
    "stride": (("protocol", "crop_stride"), 7, "crop_stride is 42"),
    "scales": (("protocol", "scales"), [0.5, 1.0], "scales is 1.0 in result-0, 0.5, 1.0 in"),
    "sizes": (("protocol", "name"), "P1", "name is P2"),
    "scored classes": (("protocol", "classes"), "all", "classes is domain"),
    "size": ((*MINE, "segmented_at", "fit"), [10, 20], "mine:dusk.segmented_at is {'fit': None"),
    "label map": ((*MINE, "label_map"), "B", "mine:dusk.label_map is none in result-0, B"),
    "label size": ((*MINE, "label_size"), "half", "mine:dusk.label_size is full"),
    "split": ((*MINE, "split"), "train", "mine:dusk.split is dusk"),
    "images": ((*MINE, "images"), 2, "mine:dusk.images is 3 in result-0, 2 in result-1"),
    "ignored pixels": (
        (*MINE, "pooled", "confusion_matrix", 0, 0), lambda count: count + 1, "mine:dusk.pixels of each label is"
    ),
    "a domain": (MINE, None, "domains is mine, mine:dusk in result-0, mine in result-1"),
    "seed": (("protocol", "corruptions", "seed"), 1, "corruptions.seed is 0 in result-0, 1"),
    "library": (("protocol", "corruptions", "library_version"), "9", "corruptions.library_version is"),
    "severities": (
        (*MINE, "corruptions", "scores", "contrast", "3"), None,
        "mine:dusk.corruptions is contrast 1, contrast 3, pixelate 1, pixelate 3 in result-0, contrast 1, pixelate",
    ),
    "no corruptions": (("protocol", "corruptions"), None, "corruptions.names is contrast, pixelate in result-0, none"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), PROTOCOLS.values(), ids=PROTOCOLS)
def test_different_protocols_are_refused_by_name_unless_forced(result, report, path, value, message):
    for domain in result["domains"].values():
        del domain["examples"]
    other = changed(result, path, value)
    code, folder, errors = report(result, other)
    assert code == 2 and message in errors and errors.count("\n") == 1 and "--force" in errors
    assert not folder.exists()


@pytest.mark.slow
def test_a_forced_comparison_says_so_in_both_pages(result, report):
    for domain in result["domains"].values():
        del domain["examples"]
    code, folder, _ = report(result, changed(result, ("protocol", "flip"), True), options=["--force"])
    assert code == 0
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert "These results have different protocols, so their scores cannot be compared: flip is False" in text


@pytest.mark.slow
def test_results_of_one_protocol_are_compared_side_by_side(result, report):
    for domain in result["domains"].values():
        del domain["examples"]
    other = changed(result, ("model", "name"), "another model")
    other["run"]["dtype"], other["domains"]["mine"]["source"] = "bfloat16", "/elsewhere"
    other["domains"]["mine"]["mean_iou"] += 0.0312
    other["domains"]["mine"]["pooled"]["classes_averaged"].pop()  # a class that this model never predicts
    code, folder, _ = report(result, other)
    assert code == 0
    text = (folder / "report.md").read_text()
    assert "different protocols" not in text and "another model" in text
    first, second = (100 * each["domains"]["mine"]["mean_iou"] for each in (result, other))
    lines = [line for line in text.splitlines() if line.startswith("| mine, result-")]
    assert f" {first:.2f} |" in lines[0] and lines[0].endswith("| +0.00 |")
    assert f" {second:.2f} |" in lines[1] and lines[1].endswith("| +3.12 |")
    assert "| class | result-0 | result-1 |" in text


def test_results_are_named_after_their_files(tmp_path):
    names = ["a/evaluation.json", "b/evaluation.json", "b/other.json"]
    assert result_names([tmp_path / name for name in names]) == ["a/evaluation", "b/evaluation", "other"]
    with pytest.raises(ValueError, match="a.json is given more than once"):
        result_names([tmp_path / "a.json", tmp_path / "b/../a.json"])


# invalid files


DAMAGED = {
    "no JSON": ("{", "is not a JSON file"),
    "a list": ("[]", "it must hold a JSON object"),
    "another object": ("{}", "is not a result of `mfuser evaluate`: it has no 'mean_iou'"),
    "no domain": ((("domains",), {}), "it has no domain"),
    "a domain without a score": (((*MINE, "mean_iou"), None), "domains.mine:dusk has no 'mean_iou'"),
    "text for a number": (((*MINE, "mean_iou"), "high"), "domains.mine:dusk.mean_iou is of type str; it must be int"),
    "true for a number": (((*MINE, "images"), True), "domains.mine:dusk.images is of type bool; it must be int"),
    "infinity": (((*MINE, "mean_iou"), float("inf")), "domains.mine:dusk.mean_iou is inf; it must be a finite number"),
    "a ragged matrix": (((*MINE, "pooled", "confusion_matrix", 1), [1]), "a confusion matrix that is not 4 x 5"),
    "a negative count": (((*MINE, "pooled", "confusion_matrix", 1, 1), -1), "with a negative count"),
    "no bins": (((*MINE, "confidence", "uncalibrated", "pooled", "reliability"), []), "no reliability bins"),
    "another coverage": (
        ((*MINE, "confidence", "uncalibrated", "pooled", "coverage"), []), "coverage must be for 1.0, 0.9, 0.8"
    ),
    "severity 9": (((*MINE, "corruptions", "scores", "contrast"), lambda each: {"9": each["1"]}), "severities 1 to 5"),
    "no corruption": (((*MINE, "corruptions", "scores"), {}), "corruptions has no scores"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_no_result_is_one_line_that_names_the_place(result, report, tmp_path, damage, message):
    file = tmp_path / "damaged.json"
    file.write_text(damage if isinstance(damage, str) else json.dumps(changed(result, *damage)))
    code, folder, errors = report(file)
    assert code == 2 and errors.count("\n") == 1 and "damaged.json" in errors and message in errors
    assert not folder.exists()


def test_a_missing_result_and_a_used_folder_are_refused(evaluated, report, tmp_path):
    code, _, errors = report(tmp_path / "nowhere.json")
    assert code == 2 and "nowhere.json" in errors
    (tmp_path / "report").mkdir()
    (tmp_path / "report/notes.txt").write_text("mine")
    code, folder, errors = report(evaluated / "result.json")
    assert code == 2 and "is not empty" in errors
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", ["above", "absolute", "a link"])
def test_an_example_outside_the_folder_of_its_result_is_never_read(result, report, tmp_path, kind):
    secret, inside = tmp_path / "secret.png", tmp_path / "results"
    Image.new("RGB", (8, 8)).save(secret)
    inside.mkdir()
    (inside / "link.png").symlink_to(secret)
    file = {"above": "../secret.png", "absolute": str(secret), "a link": "link.png"}[kind]
    result["domains"]["mine"]["examples"][0]["file"] = file
    code, folder, errors = report(result, folder=inside)
    assert code == 2 and "is outside the folder of its result" in errors and not folder.exists()


def test_an_example_that_is_no_png_is_refused(result, report, tmp_path):
    (tmp_path / "example.png").write_text("root:x:0:0")
    result["domains"]["mine"]["examples"] = result["domains"]["mine"]["examples"][:1]
    result["domains"]["mine"]["examples"][0]["file"] = "example.png"
    code, folder, errors = report(result)
    assert code == 2 and "example.png is not a PNG image" in errors and not folder.exists()


@pytest.mark.slow
def test_an_interrupted_evaluation_is_reported_as_such(result, report):
    del result["domains"]["mine:dusk"]
    domain = result["domains"]["mine"]
    del domain["examples"], domain["corruptions"]["scores"]["pixelate"]["3"]  # interrupted within a corruption
    result["complete"], result["mean_iou"] = False, None
    code, folder, _ = report(result)
    assert code == 0
    text = (folder / "report.md").read_text()
    assert "result-0 is the result of an evaluation that was interrupted" in text
    _, _, table = text.partition("| severity 1 | severity 3 | mean |")
    row = next(line for line in table.splitlines() if "pixelate" in line)
    assert row.split("|")[4].strip() == "-"


def test_a_result_without_labels_or_options_is_reported(result, report):
    domain = result["domains"]["mine:dusk"]
    for name in ("corruptions", "confidence", "examples"):
        del domain[name], result["domains"]["mine"][name]
    domain |= {"mean_iou": None, "mean_iou_over": None, "pooled": None, "images": 0, "unlabelled_images": 3}
    del result["protocol"]["corruptions"]
    code, folder, _ = report(result)
    assert code == 0
    assert "| mine:dusk | - | - | 0 |" in (folder / "report.md").read_text()


def test_missing_matplotlib_is_reported(evaluated, report, monkeypatch):
    monkeypatch.setattr(reliability_diagram, "matplotlib_figure", None)
    code, folder, errors = report(evaluated / "result.json")
    assert code == 2 and 'pip install "mfuser[report]"' in errors and not folder.exists()


# figures


def test_the_curves_hold_the_scores_from_no_corruption_to_the_highest_severity(result):
    figure = severity_curves(result["domains"])
    plots = {plot.get_title(): plot for plot in figure.axes}
    assert list(plots) == ["contrast", "pixelate"]
    for name, plot in plots.items():
        for line, domain in zip(plot.get_lines(), result["domains"].values(), strict=True):
            scores = [domain["corruptions"]["scores"][name][severity]["mean_iou"] for severity in ("1", "3")]
            np.testing.assert_allclose(line.get_ydata(), [100 * each for each in (domain["mean_iou"], *scores)])
            assert list(line.get_xdata()) == [0, 1, 3]


def test_risk_and_coverage_are_those_of_the_most_confident_pixels():
    bins = [
        {"confidence": 0.2, "accuracy": 0.25, "pixels": 40},
        {"confidence": 0.9, "accuracy": 0.9, "pixels": 100},
        {"confidence": 0.5, "accuracy": 0.5, "pixels": 60},
    ]
    (line,) = risk_coverage({"mine": {"reliability": bins}}).axes[0].get_lines()
    np.testing.assert_allclose(line.get_xdata(), [50, 80, 100])
    np.testing.assert_allclose(line.get_ydata(), [10, 100 * 40 / 160, 100 * 70 / 200])


def test_confusions_are_shares_of_each_label_and_are_listed_by_frequency():
    matrix = [[6, 2, 0, 0], [5, 15, 0, 0], [0, 0, 0, 0]]
    scores = {"per_class_iou": dict.fromkeys(("road", "sky", "car")), "confusion_matrix": matrix}
    shown = confusion_matrix(scores).axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(shown[:2], [[75, 25, 0], [25, 75, 0]])
    assert np.isnan(np.asarray(shown.filled(np.nan))[2]).all()
    assert frequent_confusions(scores)[1:] == [["sky", "road", "71.43", "25.00"], ["road", "sky", "28.57", "25.00"]]


@pytest.mark.slow
def test_a_result_without_wrong_pixels_is_reported(result, report):
    for domain in result["domains"].values():
        del domain["examples"]
        matrix = domain["pooled"]["confusion_matrix"]
        matrix[:] = [[sum(row) * (place == index) for place in range(len(row))] for index, row in enumerate(matrix)]
    code, folder, _ = report(result)
    assert code == 0 and "most frequent errors" in (folder / "report.html").read_text()


def test_places_without_a_corruption_show_no_plot(result):
    domain = result["domains"]["mine"]
    each = domain["corruptions"]["scores"]["contrast"]
    domain["corruptions"]["scores"] = dict.fromkeys("abcdef", each)
    shown = [plot.axison for plot in severity_curves({"mine": domain}).axes]
    assert sum(shown) == 6 and len(shown) > 6


def test_titles_of_diagrams_are_no_formulas(result, tmp_path):
    scores = result["domains"]["mine"]["confidence"]["uncalibrated"]["pooled"]
    reliability_diagram.reliability_figure({r"$\frac{1$": scores}).savefig(tmp_path / "diagram.png")


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        ([0.5, 1.0], [0.5, 2.0], "0.5, 1.0 in a, 0.5, 2.0 in b"),  # whole, if they are short
        ([0.125] * 20 + [1.0], [0.125] * 20 + [2.0], "1.0 in a, 2.0 in b"),
        ([0.125] * 20, [0.125] * 20 + [2.0], "None in a, 2.0 in b"),
    ],
)
def test_lists_that_differ_late_are_shown_where_they_differ(result, first, second, shown):
    scales = (changed(result, ("protocol", "scales"), value) for value in (first, second))
    assert protocol_differences(dict(zip("ab", scales, strict=True))) == [f"scales is {shown}"]


# examples


def test_the_examples_are_the_images_of_worst_median_and_best_score(tmp_path, datasets_cache):
    rows = list(pixels_and_labels(9))
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", rows))
    model = Colours()
    result = evaluate_domain(model, MFuserImageProcessor(), domain, progress=False, examples=2)
    assert evaluate_domain(model, MFuserImageProcessor(), domain, progress=False)["pooled"] == result["pooled"]
    alone = []
    for number, row in enumerate(rows):
        single = open_domain("mine", write_dataset(tmp_path / f"single{number}/validation.parquet", [row]))
        scores = evaluate_domain(model, MFuserImageProcessor(), single, progress=False)["pooled"]
        present = [index for index in NAMES if (row[1] == index).any()]
        alone.append(np.mean([scores["per_class_iou"][NAMES[index]] for index in present]))
    order = np.argsort(alone)
    chosen = [(each["kind"], each["row"]) for each in result["examples"]]
    assert [row for kind, row in chosen if kind == "worst"] == order[:2].tolist()
    assert [row for kind, row in chosen if kind == "best"] == order[:-3:-1].tolist()
    assert {row for kind, row in chosen if kind == "median"} <= set(order[3:6].tolist()) and len(chosen) == 6
    for each in result["examples"]:
        assert each["mean_iou"] == pytest.approx(alone[each["row"]]) and each["name"] == f"{each['row']:08d}"


def test_few_images_are_not_shown_twice(tmp_path, datasets_cache):
    domain = open_domain("mine", write_dataset(tmp_path / "validation.parquet", pixels_and_labels(3)))
    result = evaluate_domain(Colours(), MFuserImageProcessor(), domain, progress=False, examples=2)
    assert [each["kind"] for each in result["examples"]] == ["worst", "worst", "best"]
    assert len({each["row"] for each in result["examples"]}) == 3


def test_the_panels_lie_beside_the_result(evaluated, result):
    for title, domain in result["domains"].items():
        for kind, example in zip(("worst", "median", "best"), domain["examples"], strict=True):
            folder, _, name = example["file"].rpartition("/")
            assert folder == f"result_examples/{title.replace(':', '-')}" and name.startswith(f"{kind}-1-")
            with Image.open(evaluated / example["file"]) as image:
                assert image.width > 4 * 36


def test_wrong_pixels_are_red_and_ignored_ones_black():
    label = np.zeros((4, 6), dtype=np.uint8)
    label[0], prediction = 255, np.zeros((4, 6), dtype=np.uint8)
    prediction[:2] = 1
    colours = np.zeros((256, 3), dtype=np.uint8)
    picture = np.asarray(panel(Image.new("RGB", (6, 4), (200, 200, 200)), prediction, label, colours))
    errors = picture[-4:, -6:]
    assert (errors[0] == 0).all() and (errors[1] == WRONG).all() and (errors[2:] == 200).all()


def test_a_protocol_equals_itself(result):
    assert protocol_differences({"a": result, "b": copy.deepcopy(result)}) == []
