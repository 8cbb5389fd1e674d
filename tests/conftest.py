"""
Fixtures of several test files. Code of saved models is copied into a cache of the test session, not the user's.

Tests and the processes that they start compute with one thread, unless they set another number: their models are too
small for several, `pytest -n auto` runs one process per core, and sums are rounded by the number of threads.
"""

import atexit
import os
import shutil
import tempfile

import pytest

# set before torch and transformers are imported, which read them once
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mfuser-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


# Markers of Transformers' own tests, which test_common.py runs.
MARKERS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test order".split()


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of Transformers' tests")


# A test that is parametrised by `pair` runs with these pairs of encoders by default; the other pairs are slow tests.
DEFAULT_PAIRS = "dinov2+clip", "dinov3+siglip2"


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items):
    from tiny_models import PAIRS

    other_pairs = [pair for pair in PAIRS if pair not in DEFAULT_PAIRS]
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("pair") in other_pairs:
            item.add_marker("slow")


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """Puts the cache of `datasets` into the folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """The folder of a tiny model with its image processor. Tests must not change it."""
    from tiny_models import tiny_model

    from mfuser import MFuserImageProcessor

    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    MFuserImageProcessor().save_pretrained(folder)
    return folder
