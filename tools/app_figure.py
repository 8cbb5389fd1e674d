"""Redraws docs/figures/app.png: a screenshot of `mfuser app` with the example image, in Chromium."""

import base64
import io
import socket
import tempfile
from pathlib import Path

import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from mfuser.loading import load_for_inference
from mfuser.scripts import app
from mfuser.scripts.app_model import Segmenter
from mfuser.scripts.arguments import DEFAULT_MODEL

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "app.png"
WIDTH, HEIGHT, SCALE = 1280, 1120, 0.85


def main():
    segmenter = Segmenter(*load_for_inference(DEFAULT_MODEL, torch.device("cpu")))
    blocks = app.build(segmenter, DEFAULT_MODEL.name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    address = app.launch(blocks, "127.0.0.1", port)
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for argument in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars", f"user-data-dir={profile}"):
            options.add_argument(f"--{argument}")
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        driver.set_window_size(WIDTH, HEIGHT)
        wait = WebDriverWait(driver, 60)
        driver.get(address)
        wait.until(lambda _: driver.find_elements("id", "example"))
        driver.execute_script("document.getElementById('example').click()")  # without the colour of a button in focus
        wait.until(lambda _: driver.find_elements("css selector", "#legend tbody tr"))
        wait.until(lambda _: driver.execute_script("return document.querySelector('#overlay img')?.complete"))
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": SCALE}
        parameters = {"clip": clip, "captureBeyondViewport": True}
        picture = base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", parameters)["data"])
        driver.quit()
    blocks.close()
    Image.open(io.BytesIO(picture)).convert("RGB").save(FIGURE, optimize=True)


if __name__ == "__main__":
    main()
