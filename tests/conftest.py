"""Code of saved models is copied into a cache of the test session, not into the user's."""

import atexit
import os
import shutil
import tempfile

# before anything imports transformers, which reads it once
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mfuser-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


# Markers of Transformers' own tests, which test_common.py runs.
MARKERS = "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test torch_compile_test order".split()


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of Transformers' tests")
