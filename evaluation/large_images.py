"""Label maps of large images, window by window, without the scores of the whole image."""

from collections.abc import Callable

import torch

from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.postprocessing_mfuser import label_map_of_scores
from mfuser.windows_mfuser import sliding_windows, windows_per_batch


@torch.inference_mode()
def label_map_by_bands(
    model: MFuserForSemanticSegmentation, pixel_rows: Callable[[slice], torch.Tensor], size: tuple[int, int]
) -> torch.Tensor:
    """
    Segments an image by sliding windows and keeps the scores of one row of windows.

    The model's own forward keeps the scores of all classes at the size of the image. Here, rows of pixels are reduced
    to class ids as soon as no further window covers them, so that the memory grows with the width of the image and the
    crop. The windows, their batches and the order of every sum are the same, so the labels are equal.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, in eval mode.
        pixel_rows (`Callable`):
            Maps a slice of rows to their normalised pixels, of shape `(1, 3, rows, width)`, on the model's device.
        size (`tuple[int, int]`):
            (height, width) of the image.

    Returns:
        `torch.Tensor` of shape `size`: Class ids.

    Raises:
        ValueError: If the image is smaller than a patch, or scores are not finite.
    """
    height, width = size
    config = model.config
    if max(size) <= config.crop_size:
        return label_map_of_scores(model(pixel_values=pixel_rows(slice(0, height))).logits[0])
    config.check_windows()  # fields may be set after loading
    windows = sliding_windows(height, width, config.crop_size, config.crop_stride)
    together = windows_at_once(model, size)
    band = _Band(config.num_labels, size, windows[0][0], model.device)
    rows_read, pixels = windows[0][0], pixel_rows(windows[0][0])
    for start in range(0, len(windows), together):
        crops = []
        for rows, columns in windows[start : start + together]:
            if rows != rows_read:
                rows_read, pixels = rows, pixel_rows(rows)
            crops.append(pixels[..., columns])
        scores = model(pixel_values=torch.cat(crops)).logits
        for (rows, columns), window_scores in zip(windows[start : start + together], scores, strict=True):
            band.finish(rows.start)
            band.add(columns, window_scores)
    band.finish(height)
    return torch.cat(band.finished)


def windows_at_once(model: MFuserForSemanticSegmentation, size: tuple[int, int]) -> int:
    """
    Number of windows of one image that the model's forward segments together.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model.
        size (`tuple[int, int]`):
            (height, width) of the image.
    """
    shape_only = torch.empty(1, 3, 1, 1, device=model.device).expand(1, 3, *size)
    return windows_per_batch(shape_only, model.config, model.dtype)


class _Band:
    """The sums of scores over the windows that cover the rows from `top`, and the labels of the rows above."""

    def __init__(self, num_labels: int, size: tuple[int, int], rows: slice, device: torch.device):
        self.top = rows.start
        self.scores = torch.zeros(num_labels, rows.stop - rows.start, size[1], device=device)
        self.counts = torch.zeros(rows.stop - rows.start, size[1], device=device)
        self.finished: list[torch.Tensor] = []

    def add(self, columns: slice, window_scores: torch.Tensor) -> None:
        self.scores[..., columns] += window_scores
        self.counts[:, columns] += 1

    def finish(self, top: int) -> None:
        """Turns the rows above `top` into labels and moves the band down to it."""
        done = min(top - self.top, len(self.counts))
        if done == 0:
            return
        self.finished.append(label_map_of_scores(self.scores[:, :done] / self.counts[:done]))
        for sums in (self.scores, self.counts):
            sums.copy_(torch.cat([sums[..., done:, :], torch.zeros_like(sums[..., :done, :])], dim=-2))
        self.top = top
