"""Code of saved models is copied into a cache of the test session, not into the user's."""

import atexit
import os
import shutil
import tempfile

# before anything imports transformers, which reads it once
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mfuser-tests-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
