"""The web app of `mfuser app` as a Hugging Face Space; docs/app.md describes how to publish it."""

import os
import sys

from mfuser.scripts.app import main

arguments = ["--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")]
if "MFUSER_MODEL" in os.environ:  # a variable of the Space
    arguments += ["--model", os.environ["MFUSER_MODEL"]]
sys.exit(main(arguments))
