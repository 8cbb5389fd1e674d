"""Predictions as files, named and coded as the test servers expect."""

import re
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image

from mfuser.data.domain import Domain
from mfuser.evaluation.domains import EvaluationDomain
from mfuser.files import write_image

# The Cityscapes server finds the prediction of an image by these three parts of its name.
_CITYSCAPES_FRAME = re.compile(r"[^/_]+_\d{6}_\d{6}(?=[_.]|$)")


class PredictionWriter:
    """
    Writes the predictions of a domain as 8-bit PNGs, one per image.

    Args:
        domain (`EvaluationDomain`):
            The domain. For Cityscapes the files hold labelIds, as its test server expects; for others, train ids.
        folder (`str` or `Path`):
            The folder, see `prediction_files`.
    """

    def __init__(self, domain: EvaluationDomain, folder: str | Path):
        self.files = prediction_files(domain, folder)
        self.ids = _ids_in_files(domain)

    def write(self, row: int, prediction: torch.Tensor) -> None:
        """Writes the prediction (height, width), uint8, of the row at that position."""
        file = self.files[row]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_image(file, Image.fromarray(self.ids[prediction.cpu().numpy()]))


def prediction_files(domain: EvaluationDomain, folder: str | Path) -> list[Path]:
    """
    The file of each row's prediction, in a subfolder of `folder` that is named after the domain.

    Files are named `<city>_<sequence>_<frame>.png` for Cityscapes, all in one folder, and after the row for others.

    Args:
        domain (`EvaluationDomain`):
            The domain.
        folder (`str` or `Path`):
            The folder for all predictions.

    Returns:
        `list[Path]`: One file per row.

    Raises:
        FileExistsError: If the subfolder is not empty. The server accepts exactly one prediction per image.
        ValueError: If two rows have the same name, or a name is not that of a Cityscapes frame or is a path outside
            the folder.
    """
    folder = Path(folder) / domain.name.replace(":", "-")
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise FileExistsError(f"{folder} is not empty: give another folder for the predictions")
    cityscapes = _cityscapes(domain) is not None
    files = []
    for name in domain.rows.names:
        path = _frame_path(domain, name) if cityscapes else _relative_path(domain, name)
        if path.suffix.lower() in Image.registered_extensions():
            path = path.with_suffix("")
        files.append(folder / f"{path}.png")
    if len(set(files)) < len(files):
        repeated = next(file for index, file in enumerate(files) if file in files[:index])
        raise ValueError(f"{domain.source}: several images would have the prediction file {repeated}")
    return files


def _frame_path(domain: EvaluationDomain, name: str) -> PurePosixPath:
    """`<city>_<sequence>_<frame>` of a row's name."""
    frame = _CITYSCAPES_FRAME.match(PurePosixPath(name).name)
    if frame is None:
        raise ValueError(
            f"{domain.source}: {name!r} is not of the form <city>_<sequence>_<frame>, which the Cityscapes server "
            "requires; evaluate the official download, or the output of `mfuser prepare cityscapes`"
        )
    return PurePosixPath(frame.group())


def _relative_path(domain: EvaluationDomain, name: str) -> PurePosixPath:
    """A row's name as a path, if it stays inside a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{domain.source}: the name {name!r} is a path outside the folder for predictions")
    return path


def _cityscapes(domain: EvaluationDomain) -> Domain | None:
    """The description of Cityscapes, if that is the domain."""
    return domain.domain if domain.domain is not None and domain.domain.name == "cityscapes" else None


def _ids_in_files(domain: EvaluationDomain) -> np.ndarray:
    """The value to write for each class id (256,), uint8: Cityscapes' labelIds; train ids for other domains."""
    cityscapes = _cityscapes(domain)
    if cityscapes is None:
        return np.arange(256, dtype=np.uint8)
    ids = np.zeros(256, dtype=np.uint8)
    for label_id, name in cityscapes.label_maps["labelIds"].items():
        if name is not None:
            ids[cityscapes.classes.index(name)] = label_id
    return ids
