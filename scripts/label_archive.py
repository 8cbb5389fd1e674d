"""The label maps of a video in one compressed NumPy file, written incrementally in bounded memory."""

import zipfile
from typing import BinaryIO

import numpy as np

CHUNK_BYTES = 2**22  # of label maps that wait to be written
LEVEL = 3  # of compression: label maps have large areas of one value


class LabelArchive:
    """
    Writes label maps to an `.npz` file.

    The file holds arrays `labels_00000000` of shape `(frames, height, width)` and `times_00000000` of shape
    `(frames,)`, in seconds; the number is that of the first frame in them. A frame of another size starts a new pair.

    Args:
        stream (`BinaryIO`):
            Where to write.
    """

    def __init__(self, stream: BinaryIO):
        self.archive = zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL)
        self.labels: list[np.ndarray] = []
        self.times: list[float] = []
        self.written = 0

    def write(self, labels: np.ndarray, time_shown: float) -> None:
        """Adds the label map of the next frame."""
        if self.labels and (
            labels.shape != self.labels[0].shape or (len(self.labels) + 1) * labels.nbytes > CHUNK_BYTES
        ):
            self._flush()
        self.labels.append(labels)
        self.times.append(time_shown)

    def _flush(self) -> None:
        for kind, array in (("labels", np.stack(self.labels)), ("times", np.array(self.times))):
            with self.archive.open(f"{kind}_{self.written:08d}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        self.written += len(self.labels)
        self.labels, self.times = [], []

    def close(self) -> None:
        """Writes the last part, and the index."""
        if self.labels:
            self._flush()
        self.archive.close()
