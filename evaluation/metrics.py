"""Mean intersection over union, streamed: a confusion matrix is kept, never the maps and never the logits."""

import numpy as np
import torch

# Neighbouring pixels mostly hold the same pair of classes, and a counter cannot be incremented again before its last
# increment has reached memory. Four histograms that take turns, pixel by pixel, halve the time.
_LANES = 4
_CHUNK_PIXELS = 1 << 18


class MeanIoU:
    """Streaming mean intersection over union.

    The state is one (num_classes, num_classes + 1) int64 matrix on `device`: entry (i, j) counts the pixels labelled i
    and predicted j; the last column counts predictions that are no class, which are wrong wherever a label is given.

    Args:
        num_classes: number of classes; labels are 0 to num_classes - 1 or `ignore_index`.
        ignore_index: label of the pixels that do not count, whatever is predicted there.
        device: where the matrix lives and the counting is done.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes; it must not be.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

        bins = 256 * (num_classes + 1)
        code_dtype = torch.int16 if _LANES * bins <= 1 << 15 else torch.int32
        self._lane_offsets = (torch.arange(_CHUNK_PIXELS) % _LANES * bins).to(code_dtype)

    def update(self, prediction, label) -> None:
        """Count one map or a batch of maps.

        Args:
            prediction: predicted class ids, integers of any shape, usually (height, width) or (batch, height, width).
            label: label ids of the same shape.

        Raises:
            ValueError: shapes differ, values are not integers (logits, for instance), or a label is neither a class
                nor `ignore_index`.
        """
        prediction = self._as_integers(prediction, "prediction")
        label = self._as_integers(label, "label")
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)} but label has shape {tuple(label.shape)}; resize the "
                "scores to the label's size before taking the argmax."
            )
        if label.numel() == 0:
            return
        prediction, label = prediction.reshape(-1), label.reshape(-1)
        if self.matrix.device.type == "cpu" and self.num_classes < 255 and 0 <= self.ignore_index <= 255:
            self.matrix += self._count_on_cpu(prediction, label)
        else:
            self.matrix += self._count(prediction, label)

    def merge(self, other: "MeanIoU") -> None:
        """Add what `other` has counted."""
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError(
                f"Cannot merge a metric of {other.num_classes} classes and ignore_index {other.ignore_index} into one "
                f"of {self.num_classes} classes and ignore_index {self.ignore_index}."
            )
        self.matrix += other.matrix.to(self.matrix.device)

    def reduce(self, accelerator) -> "MeanIoU":
        """The metric over all processes of an `accelerate.Accelerator`, exactly, on each of them.

        Every process keeps its own counts: calling this twice counts nothing twice. Each image must have been counted
        by one process only; shard with `even_batches=False`, or the images that fill up the last batch count twice.
        """
        reduced = MeanIoU(self.num_classes, self.ignore_index, self.matrix.device)
        reduced.matrix = accelerator.reduce(self.matrix, reduction="sum")
        return reduced

    def reset(self) -> None:
        self.matrix.zero_()

    def compute(self, classes: list[int] | None = None) -> dict:
        """Scores from everything counted so far.

        Args:
            classes: ids to average over, such as the 16 classes of SYNTHIA; all by default. Predictions of the other
                classes still count as wrong, and the per-class arrays always hold every class.

        Returns:
            `mean_iou`: mean over `classes_averaged`, the classes that occur in a label or a prediction.
            `mean_accuracy`: mean recall over the classes that occur in a label.
            `overall_accuracy`: share of the labelled pixels (of `classes`) that are right.
            `per_category_iou`, `per_category_accuracy`: float64 arrays (num_classes,), NaN where undefined.
            `classes_averaged`: the class ids that `mean_iou` is the mean of.
        """
        if classes is None:
            classes = list(range(self.num_classes))
        elif not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(self.num_classes)):
            raise ValueError(f"classes must be distinct ids in 0..{self.num_classes - 1}, got {classes}.")
        matrix = self.matrix.cpu().numpy()
        correct = matrix.diagonal()
        labelled = matrix.sum(axis=1)
        union = labelled + matrix[:, : self.num_classes].sum(axis=0) - correct
        if not labelled[classes].any():
            raise ValueError("No labelled pixel has been counted: nothing to compute a score from.")
        iou = np.divide(correct, union, out=np.full(self.num_classes, np.nan), where=union > 0)
        accuracy = np.divide(correct, labelled, out=np.full(self.num_classes, np.nan), where=labelled > 0)
        return {
            "mean_iou": float(np.nanmean(iou[classes])),
            "mean_accuracy": float(np.nanmean(accuracy[classes])),
            "overall_accuracy": float(correct[classes].sum() / labelled[classes].sum()),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
            "classes_averaged": [class_id for class_id in classes if union[class_id] > 0],
        }

    def _as_integers(self, values, name: str) -> torch.Tensor:
        if not isinstance(values, torch.Tensor):
            values = np.require(values, requirements=["C_CONTIGUOUS", "WRITEABLE"])
            if (
                values.dtype.kind == "u" and values.dtype.itemsize > 1
            ):  # torch computes little with wide unsigned types
                values = values.astype(np.int64)
            values = torch.from_numpy(values)
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(
                f"{name} must hold integer class ids, got {values.dtype}; take the argmax over the class dimension of "
                "scores first."
            )
        return values.to(self.matrix.device)

    def _count_on_cpu(self, prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Confusion counts of flat maps, by histograms over (lane, label, prediction) in uint8."""
        columns = self.num_classes + 1
        lanes = torch.zeros(_LANES * 256 * columns, dtype=torch.int64)
        counts = torch.zeros_like(self.matrix)
        for start in range(0, label.numel(), _CHUNK_PIXELS):
            chunks = [values[start : start + _CHUNK_PIXELS] for values in (prediction, label)]
            small = [_to_uint8(chunk) for chunk in chunks]
            if any(chunk is None for chunk in small):
                counts += self._count(*chunks)
                continue
            codes = torch.add(self._lane_offsets[: small[1].numel()], small[1], alpha=columns)
            codes += small[0].clamp(max=self.num_classes)
            lanes += torch.bincount(codes, minlength=lanes.numel())
        by_label = lanes.view(_LANES, 256, columns).sum(dim=0)
        by_label[self.ignore_index] = 0
        unknown = by_label[self.num_classes :].any(dim=1).nonzero().flatten() + self.num_classes
        if unknown.numel():
            raise self._unknown_labels(unknown)
        return counts + by_label[: self.num_classes]

    def _count(self, prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Confusion counts of flat integer maps on any device."""
        columns = self.num_classes + 1
        ignored = label == self.ignore_index
        unknown = ((label < 0) | (label >= self.num_classes)) & ~ignored
        if unknown.any():
            raise self._unknown_labels(label[unknown].unique())
        rows = torch.where(ignored, self.num_classes, label.long())
        no_class = (prediction < 0) | (prediction >= self.num_classes)
        codes = rows * columns + torch.where(no_class, self.num_classes, prediction.long())
        return torch.bincount(codes, minlength=columns * columns).view(columns, columns)[: self.num_classes]

    def _unknown_labels(self, values: torch.Tensor) -> ValueError:
        return ValueError(
            f"label holds {values[:10].tolist()}, which are neither classes (0..{self.num_classes - 1}) nor the "
            f"ignore_index {self.ignore_index}; map label ids to train ids first."
        )


def _to_uint8(values: torch.Tensor) -> torch.Tensor | None:
    """The same integers as uint8, or None where one of them does not fit."""
    if values.dtype == torch.uint8:
        return values
    low, high = torch.aminmax(values)
    return values.to(torch.uint8) if low >= 0 and high <= 255 else None
