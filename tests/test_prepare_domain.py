"""`mfuser prepare` converts every official layout to a dataset with checked labels. The result does not depend on the
number of workers, and a run that was stopped at any point continues."""

import functools
import json
import re
import signal
import subprocess
import sys

import datasets
import fake_downloads as fake
import fault_injection
import filelock
import numpy as np
import pytest
from fault_injection import FINISHED, FULL, fill_disk, full_disk_is_an_exit_code, kill
from PIL import Image

from mfuser.data import preparation
from mfuser.data import rows as data_rows
from mfuser.data.layouts import has_split
from mfuser.data.loading import PREPARATION_FILE, load_domain
from mfuser.data.preparation import prepare
from mfuser.data.tables import CITYSCAPES_LABELS, DOMAINS, MAPILLARY
from mfuser.scripts import prepare_domain
from mfuser.scripts.prepare_domain import main

run = functools.partial(prepare, workers=1, shard_size=2)


pytestmark = pytest.mark.usefixtures("datasets_cache")


def encoded(dataset) -> list[dict]:
    return list(
        dataset.cast_column("image", datasets.Image(decode=False)).cast_column("label", datasets.Image(decode=False))
    )


def shards(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*/data-*.arrow"))}


def contents(folder) -> dict[str, bytes]:
    """Every file of a prepared folder but the lock."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("name", "build", "ids"),
    [
        ("cityscapes", fake.cityscapes, range(34)),
        ("gta5", fake.gta5, range(35)),
        ("synthia", fake.synthia, range(23)),
        ("synthia", functools.partial(fake.synthia, folder="train"), range(23)),
        ("urbansyn", fake.urbansyn, range(20)),
        ("bdd100k", fake.bdd100k, [*range(19), 255]),
        ("bdd100k", functools.partial(fake.bdd100k, labels="colormaps"), [*range(19), 255]),
        ("mapillary", fake.mapillary, range(66)),
        ("mapillary", functools.partial(fake.mapillary, v2=True), range(66)),
        ("acdc", fake.acdc, [*range(19), 255]),
    ],
)
def test_every_layout_becomes_a_dataset_of_original_images_and_train_ids(tmp_path, name, build, ids):
    build(tmp_path / "raw")
    record = run(name, tmp_path / "raw", tmp_path / "out")
    domain = DOMAINS[name]
    expected = domain.label_map().lookup[fake.all_ids(ids)]
    for split in record["splits"]:
        loaded = load_domain(tmp_path / "out", split)
        assert loaded.id2label == domain.id2label
        assert loaded.preparation["domain"] == name
        assert loaded.dataset.column_names == ["image", "label", "name"] + ["condition"] * (name == "acdc")
        for row, item in zip(encoded(loaded.dataset), loaded.dataset, strict=True):
            assert row["image"]["bytes"] == (tmp_path / "raw" / row["name"]).read_bytes()
            assert (item["label"].format, item["label"].mode) == ("PNG", "L")
            np.testing.assert_array_equal(np.array(item["label"]), expected)
    assert list(record["splits"]) == [
        split
        for split in domain.splits
        if has_split(domain, tmp_path / "raw", split) and domain.splits[split].labelled
    ]
    assert not list((tmp_path / "out").rglob("*.png"))


def test_the_record_describes_what_was_prepared_and_how(tmp_path):
    fake.mapillary(tmp_path / "raw")
    record = run("mapillary", tmp_path / "raw", tmp_path / "out", splits=["val"])
    assert record == json.loads((tmp_path / "out" / PREPARATION_FILE).read_text())
    assert (record["domain"], record["label_map"], record["ignore_index"]) == ("mapillary", "A", 255)
    assert record["raw_to_train_id"]["41"] == 0 and record["raw_to_train_id"]["44"] == 255
    assert len(record["raw_to_train_id"]) == 66 and len(record["classes"]) == 19
    split = record["splits"]["validation"]
    assert (split["layout"], split["pairs"], split["rows"], split["expected_pairs"]) == ("v1.2 package", 1, 1, 2000)
    assert split["sizes"] == {"9x8": 1} and split["skipped"] == []
    train_ids = MAPILLARY.label_map("A").lookup[fake.all_ids(range(66))]
    assert split["pixels"]["road"] == (train_ids == 0).sum()
    assert split["ignored_pixels"] == (train_ids == 255).sum()


def test_the_chosen_mapillary_map_is_used_and_recorded(tmp_path):
    fake.mapillary(tmp_path / "raw")
    arguments = ["mapillary", str(tmp_path / "raw"), str(tmp_path / "b"), "--split", "validation", "--workers", "1"]
    assert main([*arguments, "--mapillary-map", "B"]) == 0
    loaded = load_domain(tmp_path / "b")
    expected = MAPILLARY.label_map("B").lookup[fake.all_ids(range(66))]
    np.testing.assert_array_equal(np.array(loaded.dataset[0]["label"]), expected)
    assert loaded.preparation["label_map"] == "B"


@pytest.mark.parametrize(
    ("name", "build"), [("gta5", fake.gta5), ("synthia", fake.synthia), ("cityscapes", fake.cityscapes)]
)
def test_labels_that_another_toolbox_converted_are_kept_as_train_ids(tmp_path, name, build):
    fake.train_ids(build(tmp_path / "raw"))
    record = run(name, tmp_path / "raw", tmp_path / "out", splits=["train"])
    loaded = load_domain(tmp_path / "out", "train")
    assert np.array_equal(np.array(loaded.dataset[0]["label"]), fake.all_ids([*range(19), 255]))
    assert "labelTrainIds" in record["splits"]["train"]["layout"] and not record["splits"]["train"]["skipped"]
    assert record["label_map"] == next(iter(DOMAINS[name].label_maps))


def test_splits_of_different_label_maps_are_not_prepared_into_one_folder(tmp_path):
    fake.half_mapillary(fake.mapillary(tmp_path / "raw"))
    with pytest.raises(ValueError, match="train by A, validation by A, validation_half by B"):
        run("mapillary", tmp_path / "raw", tmp_path / "out")
    assert run("mapillary", tmp_path / "raw", tmp_path / "half", splits=["validation_half"])["label_map"] == "B"


def test_acdc_rows_name_their_condition(tmp_path):
    fake.acdc(tmp_path / "raw")
    run("acdc", tmp_path / "raw", tmp_path / "out", splits=["validation"])
    dataset = load_domain(tmp_path / "out").dataset
    assert dataset["condition"] == ["fog", "night", "rain", "snow"]
    assert all(f"/{row['condition']}/val/" in row["name"] for row in dataset)


def test_a_split_without_public_labels_has_images_and_empty_labels(tmp_path):
    fake.cityscapes(tmp_path / "raw")
    run("cityscapes", tmp_path / "raw", tmp_path / "out", splits=["test"])
    rows = list(load_domain(tmp_path / "out").dataset)
    assert len(rows) == 2 and all(row["label"] is None and row["image"].size == (8, 6) for row in rows)


# bad pairs


def test_bad_pairs_are_skipped_and_listed_with_the_reason(tmp_path, capsys):
    raw = fake.gta5(tmp_path / "raw", count=10)
    Image.fromarray(np.zeros((6, 8), dtype=np.float32)).save(raw / "images/00010.png", "TIFF")
    label = fake.all_ids(range(35))
    fake.write(raw / "images/00002.png", fake.encoded_image(size=(8, 9)))
    fake.write(raw / "labels/00003.png", fake.encoded_label(np.where(label == 3, 99, label)))
    image = (raw / "images/00004.png").read_bytes()
    fake.write(raw / "images/00004.png", image[: len(image) // 2])
    fake.write(raw / "labels/00005.png", fake.encoded_image(size=label.shape))
    fake.write(raw / "labels/00006.png", b"")
    fake.write(raw / "images/00007.png", b"<html>not found</html>")
    (raw / "labels/00008.png").unlink()
    assert main(["gta5", str(raw), str(tmp_path / "out"), "--workers", "1", "--shard-size", "4"]) == 0

    record = json.loads((tmp_path / "out" / PREPARATION_FILE).read_text())["splits"]["train"]
    reasons = {item["name"]: item["reason"] for item in record["skipped"]}
    assert set(reasons) == {f"images/{number:05}.png" for number in (*range(2, 8), 10)}
    assert reasons["images/00002.png"] == "the image has 8x9 pixels, its label 6x8 (height x width)"
    assert reasons["images/00003.png"] == "label values [99] are not among the valid ids 0-34"
    assert "truncated" in reasons["images/00004.png"]
    assert "mode RGB; expected one channel" in reasons["images/00005.png"]
    assert reasons["images/00006.png"] == "label: not an image file"
    assert reasons["images/00007.png"] == "image: not an image file"
    assert record["images_without_label"] == ["images/00008.png"]
    assert reasons["images/00010.png"].startswith("image: the image has mode F, floating-point values")
    assert (record["pairs"], record["rows"]) == (9, 2)
    assert load_domain(tmp_path / "out").dataset["name"] == ["images/00001.png", "images/00009.png"]

    printed = capsys.readouterr().out
    assert "2 of 9 pairs prepared" in printed and "7 bad pairs skipped" in printed
    assert "images/00003.png: label values [99]" in printed
    assert "1 images without a label left out" in printed and "24966 pairs were expected" in printed
    assert "unusual sizes" in printed


def test_labels_without_an_image_and_missing_folders_are_printed_and_recorded(tmp_path, capsys):
    raw = fake.acdc(tmp_path / "raw")
    (raw / "gt/night").rename(tmp_path / "elsewhere")
    (raw / "rgb_anon/fog/val/GOPR0475/GOPR0475_fog_val_rgb_anon.png").unlink()
    record = run("acdc", raw, tmp_path / "out", splits=["validation"])["splits"]["validation"]
    label = "gt/fog/val/GOPR0475/GOPR0475_fog_val_gt_labelTrainIds.png"
    assert (record["labels_without_image"], record["missing_folders"]) == ([label], ["gt/night/val"])
    printed = capsys.readouterr().out
    assert f"1 labels without an image left out:\n    {label}" in printed
    assert "1 folders missing:\n    gt/night/val" in printed


def test_a_split_of_bad_pairs_only_is_an_error_and_not_a_dataset(tmp_path, capsys):
    raw = fake.gta5(tmp_path / "raw", count=2)
    for number in (1, 2):
        fake.write(raw / f"labels/{number:05}.png", fake.encoded_label(fake.all_ids([200])))
    assert main(["gta5", str(raw), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "all 2 pairs are bad; the first: images/00001.png: label values [200]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not completely prepared"):
        load_domain(tmp_path / "out")


def test_an_unreadable_file_stops_the_run_instead_of_counting_as_a_bad_pair(tmp_path, monkeypatch, capsys):
    raw = fake.gta5(tmp_path / "raw", count=4)
    found = preparation.find_pairs(DOMAINS["gta5"], raw, "train")
    monkeypatch.setattr(preparation, "find_pairs", lambda *arguments: found)
    monkeypatch.setattr(data_rows, "_identity", lambda pair: pair.name)
    (raw / "labels").rename(tmp_path / "unplugged")
    arguments = ["gta5", str(raw), str(tmp_path / "out"), "--workers", "1", "--shard-size", "2"]
    assert main(arguments) == 2
    assert "No such file" in capsys.readouterr().err
    assert not list((tmp_path / "out/train").iterdir())
    (tmp_path / "unplugged").rename(raw / "labels")
    assert main(arguments) == 0
    assert len(load_domain(tmp_path / "out").dataset) == 4


# independent of the number of workers


@pytest.mark.slow
def test_workers_do_not_change_a_byte(tmp_path):
    raw = fake.gta5(tmp_path / "raw", count=7)
    fake.write(raw / "labels/00003.png", b"damaged")
    run("gta5", raw, tmp_path / "serial")
    run("gta5", raw, tmp_path / "parallel", workers=2)
    assert contents(tmp_path / "parallel") == contents(tmp_path / "serial")
    assert load_domain(tmp_path / "parallel").dataset["name"] == [f"images/{n:05}.png" for n in (1, 2, 4, 5, 6, 7)]


# interrupted and continued

KILLED = """
import os, signal, sys
from mfuser.data import preparation, shards

original, calls = shards.convert, []

def convert(*arguments):
    calls.append(arguments)
    if len(calls) == 6:  # the second pair of the third shard
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

shards.convert = convert
preparation.prepare("gta5", sys.argv[1], sys.argv[2], shard_size=2)
"""


@pytest.mark.slow
def test_a_killed_run_continues_where_it_stopped(tmp_path, capsys):
    raw, out = fake.gta5(tmp_path / "raw", count=7), tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, raw, out], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(shards(out)) == ["data-00000-of-00004.arrow", "data-00001-of-00004.arrow"]
    assert len(list(out.glob("train/*.tmp"))) == 1
    with pytest.raises(ValueError, match="not completely prepared"):
        load_domain(out)

    kept = {file: file.stat().st_mtime_ns for file in out.glob("train/data-*.arrow")}
    run("gta5", raw, out)
    assert "2 intact shards of an earlier run kept" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    run("gta5", raw, tmp_path / "uninterrupted")
    assert contents(out) == contents(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_a_finished_folder_remains_complete_while_it_is_rewritten(tmp_path):
    out = tmp_path / "out"
    run("gta5", fake.gta5(tmp_path / "raw", count=7), out)
    raw = fake.gta5(tmp_path / "raw", count=8)
    before = load_domain(out).dataset["name"]
    killed = subprocess.run([sys.executable, "-c", KILLED, raw, out], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert load_domain(out).dataset["name"] == datasets.load_from_disk(str(out))["train"]["name"] == before
    assert run("gta5", raw, out)["splits"]["train"]["rows"] == len(load_domain(out).dataset) == 8


@pytest.mark.parametrize("harm", ["cut", "flipped", "gone", "no record", "half a record"])
def test_a_damaged_shard_is_detected_and_rewritten(tmp_path, harm):
    raw, out = fake.gta5(tmp_path / "raw", count=6), tmp_path / "out"
    run("gta5", raw, out)
    good = contents(out)
    file, record = out / "train/data-00001-of-00003.arrow", out / "train/data-00001-of-00003.json"
    data = file.read_bytes()
    if harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "flipped":
        file.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    elif harm == "gone":
        file.unlink()
    elif harm == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:20])
    times = {path: path.stat().st_mtime_ns for path in out.glob("train/data-*") if path not in (file, record)}
    run("gta5", raw, out)
    assert contents(out) == good
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_only_the_shard_of_a_replaced_file_is_rewritten(tmp_path):
    raw, out = fake.gta5(tmp_path / "raw", count=6), tmp_path / "out"
    label = (raw / "labels/00003.png").read_bytes()
    fake.write(raw / "labels/00003.png", label[:40])
    assert run("gta5", raw, out)["splits"]["train"]["rows"] == 5
    before = shards(out)
    fake.write(raw / "labels/00003.png", label)
    record = run("gta5", raw, out)["splits"]["train"]
    assert (record["rows"], record["skipped"]) == (6, [])
    after = shards(out)
    assert len(after) == 3 and after.keys() & before.keys() == {f"data-0000{index}-of-00003.arrow" for index in (0, 2)}
    assert all(after[name] == before[name] for name in after.keys() & before.keys())
    assert len(load_domain(out).dataset) == 6


def test_shards_of_an_earlier_cut_are_removed_when_the_download_has_grown(tmp_path):
    out = tmp_path / "out"
    run("gta5", fake.gta5(tmp_path / "raw", count=3), out)
    run("gta5", fake.gta5(tmp_path / "raw", count=5), out)
    assert sorted(shards(out)) == [f"data-{index:05}-of-00003.arrow" for index in range(3)]
    assert len(load_domain(out).dataset) == 5


FAULTS = [*((fault, number, "new") for fault in (kill, fill_disk) for number in range(0, 25, 6))]
FAULTS += [(fault, number, "grown") for fault in (kill, fill_disk) for number in range(0, 39, 6)]


@pytest.mark.parametrize(("fault", "number", "before"), FAULTS)
def test_a_fault_at_any_file_operation_loses_no_complete_file(tmp_path, fault, number, before):
    check_fault(tmp_path, fault, number, before)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("before", ["new", "grown"])
@pytest.mark.parametrize("fault", [kill, fill_disk])
def test_every_fault_in_turn_loses_no_complete_file(tmp_path, fault, before):
    for number in range(200):
        if check_fault(tmp_path / str(number), fault, number, before):
            assert number > 10
            return
    raise AssertionError("the preparation never finished")


def check_fault(tmp_path, fault, number, before) -> bool:
    """Prepares into a new folder or one that holds fewer rows, with a fault; returns whether it had no effect."""
    out, old = tmp_path / "out", []
    tmp_path.mkdir(exist_ok=True)
    if before == "grown":
        run("gta5", fake.gta5(tmp_path / "raw", count=3), out)
        old = list(load_domain(out).dataset["name"])
    raw = fake.gta5(tmp_path / "raw", count=5)
    prepared = full_disk_is_an_exit_code(lambda: run("gta5", raw, out))
    code, _ = fault_injection.run(prepared, out, fault, number)
    assert code in (FINISHED, FULL if fault is fill_disk else -signal.SIGKILL)
    new = [f"images/{index:05}.png" for index in range(1, 6)]
    if (out / "dataset_dict.json").is_file() and (out / "train" / "state.json").is_file():
        dataset = load_domain(out).dataset
        assert list(dataset["name"]) in (old, new) and all(row["label"].size == row["image"].size for row in dataset)
    else:
        assert not old
    run("gta5", raw, out)  # continues
    assert list(load_domain(out).dataset["name"]) == new
    assert not list(out.rglob("*.tmp"))
    return code == FINISHED


def test_splits_prepared_in_separate_runs_form_one_dataset(tmp_path):
    fake.cityscapes(tmp_path / "raw")
    run("cityscapes", tmp_path / "raw", tmp_path / "out", splits=["val"])
    run("cityscapes", tmp_path / "raw", tmp_path / "out", splits=["train"])
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 5, "validation": 2}
    record = json.loads((tmp_path / "out" / PREPARATION_FILE).read_text())
    assert set(record["splits"]) == {"train", "validation"}


# the format of the folder


def test_the_folder_has_the_format_of_save_to_disk(tmp_path):
    run("gta5", fake.gta5(tmp_path / "raw"), tmp_path / "out")
    dataset = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    dataset.save_to_disk(tmp_path / "saved")
    ours, theirs = (
        json.loads((path / "state.json").read_text()) for path in (tmp_path / "out/train", tmp_path / "saved")
    )
    assert ours.keys() == theirs.keys()
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different <= {"_data_files", "_fingerprint"}
    info = json.loads((tmp_path / "out/train/dataset_info.json").read_text())
    assert info["features"] == json.loads((tmp_path / "saved/dataset_info.json").read_text())["features"]


def test_prepared_rows_stream(tmp_path):
    run("gta5", fake.gta5(tmp_path / "raw", count=5), tmp_path / "out")
    stream = load_domain(tmp_path / "out", streaming=True).dataset
    assert isinstance(stream, datasets.IterableDataset) and stream.n_shards == 3
    assert [row["name"] for row in stream] == [f"images/{number:05}.png" for number in range(1, 6)]


def test_another_map_or_domain_is_refused_in_the_same_folder(tmp_path, capsys):
    fake.mapillary(tmp_path / "raw")
    run("mapillary", tmp_path / "raw", tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="its label_map is A, not B"):
        run("mapillary", tmp_path / "raw", tmp_path / "out", label_map="B")
    with pytest.raises(ValueError, match="its domain is mapillary, not gta5"):
        run("gta5", fake.gta5(tmp_path / "gta"), tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["thesis.tex", "thesis.tmp", ".thesis.tmp"])
def test_a_folder_of_other_files_is_left_unchanged(name, tmp_path):
    fake.write(tmp_path / "out" / name, b"precious")
    with pytest.raises(ValueError, match=f"holds other files, such as {name}"):
        run("gta5", fake.gta5(tmp_path / "raw"), tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"precious"}


def test_temporary_files_of_a_killed_run_are_deleted_and_those_of_others_kept(tmp_path):
    run("gta5", fake.gta5(tmp_path / "raw"), tmp_path / "out")
    (tmp_path / "out/notes.tmp").write_bytes(b"precious")
    (tmp_path / "out/train/.0123456789ab.tmp").write_bytes(b"half a shard")
    (tmp_path / "out/train/.mfuser-ab_3defg.tmp").mkdir()
    run("gta5", fake.gta5(tmp_path / "raw"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*.tmp")] == ["notes.tmp"]


def test_two_runs_cannot_write_to_one_folder(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out/.lock"):
        assert main(["gta5", str(fake.gta5(tmp_path / "raw")), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "another run is writing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gta5", "nowhere", "out"], "none of the known pairs of files"),
        (["gta5", "raw", "out", "--mapillary-map", "A"], "--mapillary-map applies to mapillary"),
        (["gta5", "raw", "out", "--split", "val"], "has no split 'validation'; it has train"),
        (["gta5", "raw", "out", "--id2label", "camvid"], "has its own class names"),
        (["gta5", "raw", "out", "--workers", "0"], "at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    fake.gta5(tmp_path / "raw")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# any other dataset


def parquet(path, ids, name=True, count=3):
    columns = {
        "pixels": [{"bytes": fake.encoded_image(n), "path": None} for n in range(count)],
        "mask": [{"bytes": fake.encoded_label(fake.all_ids(ids)), "path": None} for _ in range(count)],
    }
    features = {"pixels": datasets.Image(), "mask": datasets.Image()}
    if name:
        columns["name"], features["name"] = [f"{n}.png" for n in range(count)], datasets.Value("string")
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)


COLUMNS = ["--image-column", "pixels", "--label-column", "mask", "--workers", "1"]


def test_any_dataset_with_two_columns_and_class_names_is_prepared(tmp_path):
    parquet(tmp_path / "raw/train.parquet", [0, 1, 255])
    parquet(tmp_path / "raw/validation.parquet", [0, 1, 2])
    (tmp_path / "names.json").write_text('{"0": "cat", "1": "dog"}')
    arguments = ["custom", str(tmp_path / "raw"), str(tmp_path / "out"), *COLUMNS]
    assert main([*arguments, "--split", "train", "--id2label", str(tmp_path / "names.json")]) == 0
    loaded = load_domain(tmp_path / "out")
    assert loaded.id2label == {0: "cat", 1: "dog"}
    assert loaded.dataset["name"] == ["0.png", "1.png", "2.png"]
    np.testing.assert_array_equal(np.array(loaded.dataset[2]["label"]), fake.all_ids([0, 1, 255]))
    assert encoded(loaded.dataset)[1]["image"]["bytes"] == fake.encoded_image(1)


def test_pairs_with_values_without_a_class_name_are_bad(tmp_path, capsys):
    parquet(tmp_path / "raw/train.parquet", [0, 1, 2])
    (tmp_path / "names.json").write_text('{"0": "cat", "1": "dog"}')
    arguments = ["custom", str(tmp_path / "raw"), str(tmp_path / "out"), *COLUMNS]
    assert main([*arguments, "--id2label", str(tmp_path / "names.json")]) == 2
    assert "label values [2] are not among the valid ids 0-1, 255" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "does not name its classes" in capsys.readouterr().err


def test_rows_with_an_empty_cell_are_bad_pairs(tmp_path):
    parquet(tmp_path / "raw/train.parquet", range(11))
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "raw/train.parquet"))
    dataset.map(lambda row: row | {"mask": None if row["name"] == "1.png" else row["mask"]}).save_to_disk(
        tmp_path / "saved"
    )
    record = run("camvid", tmp_path / "saved", tmp_path / "out", image_column="pixels", label_column="mask")
    assert record["splits"]["train"]["skipped"] == [{"name": "1.png", "reason": "label: not an image file"}]


@pytest.mark.slow
def test_raw_ids_in_a_column_are_mapped_by_their_domain(tmp_path):
    parquet(tmp_path / "raw/train.parquet", range(34), name=False)
    run("cityscapes", tmp_path / "raw", tmp_path / "out", image_column="pixels", label_column="mask", workers=2)
    dataset = load_domain(tmp_path / "out").dataset
    assert dataset["name"] == ["00000000", "00000001", "00000002"]
    expected = DOMAINS["cityscapes"].label_map().lookup[fake.all_ids(range(34))]
    np.testing.assert_array_equal(np.array(dataset[2]["label"]), expected)


@pytest.mark.parametrize(
    ("domain", "names", "message"),
    [
        ("camvid", {0: "road", 1: "sky"}, "0 is 'road', not 'sky'"),
        ("cityscapes", DOMAINS["cityscapes"].id2label, "0 is 'road'; in the labelIds of Cityscapes, it is no class"),
        ("cityscapes", dict(enumerate(name for _, name, _ in CITYSCAPES_LABELS[:34])), None),
    ],
)
def test_class_names_beside_the_data_that_contradict_its_domain_are_refused(tmp_path, capsys, domain, names, message):
    parquet(tmp_path / "raw/train.parquet", [0, 1])
    (tmp_path / "raw/id2label.json").write_text(json.dumps(names))
    code = main([domain, str(tmp_path / "raw"), str(tmp_path / "out"), *COLUMNS])
    if message is None:
        assert code == 0
    else:
        assert code == 2 and re.search(message, capsys.readouterr().err)


def test_an_interrupted_run_over_columns_continues(tmp_path, capsys):
    parquet(tmp_path / "raw/train.parquet", range(11))
    arguments = {"image_column": "pixels", "label_column": "mask"}
    run("camvid", tmp_path / "raw", tmp_path / "out", **arguments)
    before = contents(tmp_path / "out")
    (tmp_path / "out/train/data-00001-of-00002.arrow").unlink()
    run("camvid", tmp_path / "raw", tmp_path / "out", **arguments)
    assert "1 intact shards of an earlier run kept" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_repeated_names_are_replaced_by_positions(tmp_path, capsys):
    parquet(tmp_path / "raw/train.parquet", range(11))
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "raw/train.parquet"))
    dataset.remove_columns("name").add_column("name", ["same"] * 3).save_to_disk(tmp_path / "saved")
    run("camvid", tmp_path / "saved", tmp_path / "out", image_column="pixels", label_column="mask")
    assert "names repeat" in capsys.readouterr().err
    assert load_domain(tmp_path / "out").dataset["name"] == ["00000000", "00000001", "00000002"]


def test_pushing_uploads_a_private_dataset_and_its_record(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        datasets.DatasetDict, "push_to_hub", lambda self, *arguments, **options: calls.append((arguments, options))
    )
    monkeypatch.setattr(prepare_domain.HfApi, "upload_file", lambda self, **options: calls.append(options))
    raw = fake.gta5(tmp_path / "raw")
    assert main(["gta5", str(raw), str(tmp_path / "out"), "--workers", "1", "--push-to-hub", "someone/gta5"]) == 0
    assert calls[0] == (("someone/gta5",), {"private": True})
    assert (calls[1]["repo_id"], calls[1]["repo_type"]) == ("someone/gta5", "dataset")
    assert calls[1]["path_in_repo"] == PREPARATION_FILE
    assert calls[1]["path_or_fileobj"] == str(tmp_path / "out" / PREPARATION_FILE)
