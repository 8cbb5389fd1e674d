"""
Segments an image with an exported MFuser model.

    python run.py IMAGE [OUTPUT]

It needs numpy, pillow and the runtime: torch or onnxruntime. An image larger than the crop is segmented by sliding
windows whose scores are averaged; they are part of an artefact of whole images. Images are rotated upright, resized
and normalised by the settings of the model's image processor; labels have the size of the upright image. OUTPUT is a
palette PNG whose indices are the class ids (default: labels.png). `mfuser export` copies this file into the folder of
the model as run.py.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DESCRIPTION_FILE = "artefact.json"
INPUT, OUTPUT = "pixel_values", "output"


def describe(folder):
    return json.loads(Path(folder, DESCRIPTION_FILE).read_text(encoding="utf-8"))


def load(folder):
    """Returns a function that maps pixels (B, 3, H, W), float32, to scores (B, K, H, W) or labels (B, H, W)."""
    artefact = describe(folder)
    file = str(Path(folder, artefact["file"]))
    if artefact["format"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=onnxruntime.get_available_providers())
        return lambda pixels: session.run([OUTPUT], {INPUT: pixels})[0]
    import torch

    compiled = artefact["format"] == "aoti"
    module = torch._inductor.aoti_load_package(file) if compiled else torch.export.load(file).module()

    def run(pixels):
        with torch.no_grad():
            return module(torch.from_numpy(pixels)).numpy()

    return run


def model_size(width, height, limits):
    """(width, height) to which an image is resized: the largest within the limits that keeps the aspect ratio."""
    if not limits:
        return width, height
    if "height" in limits:
        return limits["width"], limits["height"]
    sides = {"shortest_edge": min(width, height), "longest_edge": max(width, height)}
    sides |= {"max_height": height, "max_width": width}
    scales = [limit / sides[name] for name, limit in limits.items()]
    return tuple(max(int(length * min(scales) + 0.5), 1) for length in (width, height))


def read_image(path):
    """An image file as 8-bit RGB, rotated as its EXIF orientation says; 16-bit values are scaled to 8 bits."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        image.load()
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{path} has pixels of an unknown range; save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    return image.convert("RGB")


def prepare(image, artefact):
    """RGB image -> resized and normalised pixels (1, 3, H, W), float32."""
    width, height = image.size
    resized = image.resize(model_size(width, height, artefact["size"]), artefact["resample"])
    pixels = np.asarray(resized, dtype=np.float32) * np.float32(artefact["scale"])
    pixels = (pixels - np.float32(artefact["mean"])) / np.float32(artefact["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)


def starts(length, crop, stride):
    """First pixels of the windows along a side; the last window is shifted back inside."""
    count = max(math.ceil((length - crop) / stride), 0) + 1
    return [max(min(index * stride, length - crop), 0) for index in range(count)]


def segment(pixels, run, artefact):
    """Pixels (1, 3, H, W) -> labels (H, W)."""
    height, width = pixels.shape[-2:]
    crop, stride = artefact["crop_size"], artefact["crop_stride"]
    if min(height, width) < artefact["minimum_side"]:
        raise ValueError(
            f"the image has {width} x {height} pixels; both sides must have at least {artefact['minimum_side']}"
        )
    if artefact["whole_image"] or artefact["output"] == "labels":
        result = run(pixels)[0]
        return result if artefact["output"] == "labels" else result.argmax(axis=0)
    scores = np.zeros((len(artefact["classes"]), height, width), np.float32)
    counts = np.zeros((height, width), np.float32)
    for top in starts(height, crop, stride):
        for left in starts(width, crop, stride):
            window = (..., slice(top, top + crop), slice(left, left + crop))
            scores[window] += run(np.ascontiguousarray(pixels[window]))[0]
            counts[window] += 1
    return (scores / counts).argmax(axis=0)


def segment_file(image_path, output, folder):
    """Segments an image file, and prints the share of each class."""
    artefact = describe(folder)
    classes = artefact["classes"]
    if len(classes) > 256:
        raise ValueError(f"the model has {len(classes)} classes; a palette PNG holds at most 256: call load() instead")
    image = read_image(image_path)
    labels = segment(prepare(image, artefact), load(folder), artefact)
    picture = Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    labels = np.asarray(picture)
    picture.putpalette(np.uint8(artefact["colours"]).tobytes())
    picture.save(f"{output}.part", format="PNG")
    os.replace(f"{output}.part", output)
    for index, count in enumerate(np.bincount(labels.ravel(), minlength=len(classes))):
        if count:
            print(f"{classes[index]:<20} {100 * count / labels.size:6.2f} %")


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        segment_file(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "labels.png", Path(__file__).resolve().parent)
    except (OSError, ValueError, ImportError) as error:  # of the files, the size of the image, a missing runtime
        print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
