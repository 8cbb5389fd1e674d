"""Miniature downloads, file by file as the official archives unpack, for the tests of domains and preparation."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 6, 8


def encoded_image(seed: int = 0, size=(HEIGHT, WIDTH), file_format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format)
    return stream.getvalue()


def encoded_label(ids: np.ndarray, palette: bool = False) -> bytes:
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:
        image = image.convert("L")
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tolist())
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def encoded_16_bit_rgb(samples: np.ndarray, filters=(0, 1, 2, 3, 4)) -> bytes:
    """A PNG of 16-bit samples (H, W, 3 or 4), its rows filtered in turn by every filter of the standard."""
    height, width, channels = samples.shape
    pixel = 2 * channels
    lines, above = bytearray(), np.zeros(width * pixel, dtype=np.int64)
    for number, row in enumerate(samples.astype(">u2")):
        line = np.frombuffer(row.tobytes(), dtype=np.uint8).astype(np.int64)
        left = np.concatenate([np.zeros(pixel, np.int64), line[:-pixel]])
        above_left = np.concatenate([np.zeros(pixel, np.int64), above[:-pixel]])
        estimate = left + above - above_left
        distance = np.abs(estimate - np.stack([left, above, above_left]))
        paeth = np.choose(distance.argmin(axis=0), [left, above, above_left])
        kind = filters[number % len(filters)]
        predicted = [0, left, above, (left + above) // 2, paeth][kind]
        lines += bytes([kind]) + ((line - predicted) % 256).astype(np.uint8).tobytes()
        above = line
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(lines))), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def all_ids(ids) -> np.ndarray:
    """A label (HEIGHT, WIDTH) or larger that holds each of `ids` at least once."""
    ids = list(ids)
    rows = max(HEIGHT, -(-len(ids) // WIDTH))
    return np.resize(np.array(ids, dtype=np.uint8), (rows, WIDTH))


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_pair(image: Path, label: Path, ids: np.ndarray, seed: int = 0, palette: bool = False) -> None:
    write(image, encoded_image(seed, ids.shape, "JPEG" if image.suffix == ".jpg" else "PNG"))
    write(label, encoded_label(ids, palette))


def cityscapes(root: Path, ids=range(34)) -> Path:
    for split, city, count in (("train", "aachen", 3), ("train", "ulm", 2), ("val", "munster", 2)):
        for number in range(count):
            stem = f"{city}_{number:06}_000019"
            label = root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png"
            write_pair(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", label, all_ids(ids), number)
            for other in ("color.png", "instanceIds.png", "labelTrainIds.png", "polygons.json"):
                write(root / f"gtFine/{split}/{city}/{stem}_gtFine_{other}", b"not read")
    for number in range(2):
        write(root / f"leftImg8bit/test/berlin/berlin_{number:06}_000019_leftImg8bit.png", encoded_image(number))
    return root


def gta5(root: Path, count: int = 3) -> Path:
    for number in range(1, count + 1):
        name = f"{number:05}.png"
        write_pair(root / "images" / name, root / "labels" / name, all_ids(range(35)), number, palette=True)
        write(root / f"labels/{number:05}_labelTrainIds.png", b"left by a converter")
    return root


def train_ids(root: Path) -> Path:
    """Replaces the labels of a download by train ids, as the converters of other toolboxes write them."""
    folders = ("labels", "GT", "gtFine", "training/labels", "validation/labels")
    labels = [path for folder in folders for path in (root / folder).rglob("*.png")]
    for label in labels:
        label.unlink()
    for label in labels:
        stem = label.with_suffix("")
        stem = stem.with_name(stem.name.removesuffix("_labelTrainIds").removesuffix("_labelIds"))
        if not stem.name.endswith(("_color", "_instanceIds")):
            write(stem.with_name(f"{stem.name}_labelTrainIds.png"), encoded_label(all_ids([*range(19), 255])))
    return root


def urbansyn(root: Path, count: int = 2, prefixes=("rgb_", "ss_")) -> Path:
    for number in range(1, count + 1):
        image, label = (
            f"{folder}/{prefix}{number:04}.png" for folder, prefix in zip(("rgb", "ss"), prefixes, strict=True)
        )
        write_pair(root / image, root / label, all_ids(range(20)), number)
    return root


def half_mapillary(root: Path) -> Path:
    """The halved validation images of Rein's converter."""
    write_pair(root / "half/val_img/im0.jpg", root / "half/val_label/im0.png", all_ids([*range(19), 255]))
    return root


def synthia(root: Path, count: int = 2, folder: str = ".") -> Path:
    ids = all_ids(range(23))
    for number in range(count):
        samples = np.zeros((*ids.shape, 3), dtype=np.uint16)
        samples[..., 0] = ids
        samples[..., 1] = 60000 + number
        write(root / "RGB" / folder / f"{number:07}.png", encoded_image(number, ids.shape))
        write(root / "GT/LABELS" / folder / f"{number:07}.png", encoded_16_bit_rgb(samples))
    return root


def bdd100k(root: Path, labels: str = "masks") -> Path:
    ids = all_ids([*range(19), 255])
    for split, count in (("train", 2), ("val", 1)):
        for number in range(count):
            name = f"0a{number}-{split}"
            if labels == "seg":
                image, label = (
                    root / f"seg/images/{split}/{name}.jpg",
                    root / f"seg/labels/{split}/{name}_train_id.png",
                )
            else:
                image = root / f"images/10k/{split}/{name}.jpg"
                label = root / f"labels/sem_seg/{labels}/{split}/{name}.png"
            write_pair(image, label, ids, number, palette=labels == "colormaps")
    return root


def mapillary(root: Path, v2: bool = False) -> Path:
    for split, count in (("training", 2), ("validation", 1)):
        labels = root / split / ("v1.2/labels" if v2 else "labels")
        for number in range(count):
            write_pair(
                root / split / f"images/im{number}.jpg", labels / f"im{number}.png", all_ids(range(66)), number, True
            )
            write(labels / f"im{number}_labelTrainIds.png", b"left by a converter")
            if v2:
                write(root / split / f"v2.0/labels/im{number}.png", b"other classes: must not be read")
    return root


def acdc(root: Path) -> Path:
    ids = all_ids([*range(19), 255])
    for condition in ("fog", "night", "rain", "snow"):
        for split in ("train", "val", "train_ref", "val_ref"):
            stem = f"GOPR0475/GOPR0475_{condition}_{split}"
            label = root / f"gt/{condition}/{split}/{stem}_gt_labelTrainIds.png"
            write_pair(root / f"rgb_anon/{condition}/{split}/{stem}_rgb_anon.png", label, ids)
            write(root / f"gt/{condition}/{split}/{stem}_gt_labelIds.png", b"not read")
    return root
