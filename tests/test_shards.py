"""Shards: the conversion of labels, the key of a shard's input, and the worker processes that write shards."""

import os
import subprocess
import sys

import fake_downloads as fake
import numpy as np
import pytest

from mfuser.data.label_maps import LabelMap, read_label
from mfuser.data.layouts import find_pairs
from mfuser.data.rows import DownloadRows, EncodedRow
from mfuser.data.shards import Conversion, convert, cut_into_shards
from mfuser.data.tables import DOMAINS


@pytest.mark.slow
def test_a_worker_does_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, sys\n"
        "from mfuser.data.shards import process_pool\n"
        "pool = process_pool(1)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.kill(int(parent.stdout.readline()), 0)
    parent.kill()
    # The output ends when the worker, which holds it last, has ended; a surviving worker causes a timeout.
    parent.communicate(timeout=20)


def test_a_shard_is_rewritten_when_the_conversion_of_its_labels_changes(tmp_path):
    pairs = find_pairs(DOMAINS["gta5"], fake.gta5(tmp_path), "train").pairs
    conversions = [
        Conversion(LabelMap({7: 0}, range(35)), ("road",)),
        Conversion(LabelMap({8: 0}, range(35)), ("road",)),
        Conversion(LabelMap({7: 0}, range(34)), ("road",)),
        Conversion(LabelMap({7: 0}, range(35)), ("road",), class_in_red_channel=True),
    ]
    rows = DownloadRows(pairs)
    keys = {cut_into_shards(rows, tmp_path, conversion, shard_size=3)[0].key for conversion in conversions}
    assert len(keys) == len(conversions)


def test_labels_are_stored_as_train_ids_and_read_back_exactly():
    ids = np.random.default_rng(0).integers(0, 34, (64, 64)).astype(np.uint8)
    row = EncodedRow("a", fake.encoded_image(size=(64, 64)), fake.encoded_label(ids), None)
    converted = convert(row, Conversion(LabelMap({7: 0}, range(34)), ("road",)))
    np.testing.assert_array_equal(read_label(converted.label), np.where(ids == 7, 0, 255))
    assert converted.pixels[0] == (ids == 7).sum() and converted.pixels.sum() == ids.size
