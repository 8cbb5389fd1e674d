"""The example image and its labels are what the script renders."""

from pathlib import Path

import numpy as np
import pytest
import render_street
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def rendered():
    return render_street.render(render_street.WIDTH // 4, render_street.HEIGHT // 4)


@pytest.mark.slow
def test_the_labels_are_those_of_the_rendered_street(rendered):
    labels = np.asarray(Image.open(EXAMPLES / "street_labels.png"))
    assert labels.shape == (render_street.HEIGHT, render_street.WIDTH)
    # The pixels of the small image show the centres of 4 x 4 pixels of the large one.
    agreement = rendered[1] == labels[2::4, 2::4]
    assert agreement.mean() > 0.97
    shown = {render_street.CLASSES[index] for index in np.unique(labels)}
    assert shown == set(render_street.CLASSES) - {"bicyclist"}


@pytest.mark.slow
def test_the_image_is_the_rendered_street(rendered):
    image = np.asarray(Image.open(EXAMPLES / "street.jpg").reduce(4), dtype=float)
    small = np.asarray(render_street.photograph(rendered[0]), dtype=float)
    assert np.abs(image - small).mean() < 6
