"""Fixtures of several test files. Code of saved models is copied into a cache of the test session, not the user's."""

import atexit
import os
import shutil
import tempfile

import pytest

# set before transformers is imported, which reads it once
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mfuser-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


# Markers of Transformers' own tests, which test_common.py runs.
MARKERS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test order".split()


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of Transformers' tests")


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
