"""Mean intersection over union, accumulated in a confusion matrix: neither label maps nor logits are stored."""

import numpy as np
import torch

# Neighbouring pixels mostly increment the same counter, and each increment waits for the previous one to reach memory.
# Distributing the pixels over four histograms in turn halves the time.
_LANES = 4
_CHUNK_PIXELS = 1 << 18


class MeanIoU:
    """
    Streaming mean intersection over union.

    The state is an int64 confusion matrix of shape `(num_classes, num_classes + 1)`. Entry (i, j) is the number of
    pixels with label i and prediction j. The last column is for predictions that are not a class id. They count as
    errors.

    Args:
        num_classes (`int`):
            Number of classes. Labels are 0 to num_classes - 1 or `ignore_index`.
        ignore_index (`int`, *optional*, defaults to 255):
            Label of ignored pixels.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Device of the matrix, on which pixels are counted.

    Raises:
        ValueError: If `num_classes` is less than 1, or `ignore_index` is a class id.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"):
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index is {ignore_index}; it must not be one of the {num_classes} class ids")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

        bins = 256 * (num_classes + 1)
        code_dtype = torch.int16 if _LANES * bins <= 1 << 15 else torch.int32
        self._lane_offsets = (torch.arange(_CHUNK_PIXELS) % _LANES * bins).to(code_dtype)

    def update(self, prediction, label) -> None:
        """
        Counts the pixels of one map or of a batch of maps.

        Args:
            prediction (`torch.Tensor` or `np.ndarray`):
                Predicted class ids as integers, in any shape; usually `(height, width)` or `(batch, height, width)`.
            label (`torch.Tensor` or `np.ndarray`):
                Labels as integers, in the same shape.

        Raises:
            ValueError: If shapes differ, if values are not integers (such as logits), or if a label is neither a class
                id nor `ignore_index`. Nothing is counted then.
        """
        prediction = self._as_integers(prediction, "prediction")
        label = self._as_integers(label, "label")
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)} and label {tuple(label.shape)}; they must be equal: "
                "resize the scores to the label's size before taking the argmax"
            )
        if label.numel() == 0:
            return
        prediction, label = prediction.reshape(-1), label.reshape(-1)
        if self.matrix.device.type == "cpu" and self.num_classes < 255 and 0 <= self.ignore_index <= 255:
            self.matrix += self._count_on_cpu(prediction, label)
        else:
            self.matrix += self._count(prediction, label)

    def merge(self, other: "MeanIoU") -> None:
        """Adds the counts of `other`, which must have the same `num_classes` and `ignore_index`."""
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError(
                f"the other metric has {other.num_classes} classes and ignore_index {other.ignore_index}; to be "
                f"merged, it must have {self.num_classes} classes and ignore_index {self.ignore_index}"
            )
        self.matrix += other.matrix.to(self.matrix.device)

    def reduce(self, accelerator) -> "MeanIoU":
        """
        Sums the counts over all processes.

        The metric itself does not change, so that the method can be called repeatedly. Each image must be counted by
        one process only: data loaders need `even_batches=False`, or images repeated in the last batch count twice.

        Args:
            accelerator (`accelerate.Accelerator`):
                The accelerator of the processes.

        Returns:
            [`MeanIoU`]: A metric with the exact sum, on every process.
        """
        reduced = MeanIoU(self.num_classes, self.ignore_index, self.matrix.device)
        reduced.matrix = accelerator.reduce(self.matrix, reduction="sum")
        return reduced

    def reset(self) -> None:
        self.matrix.zero_()

    def compute(self, classes: list[int] | None = None) -> dict:
        """
        Computes the scores of all pixels counted so far.

        Args:
            classes (`list[int]`, *optional*):
                Class ids to average over, such as the 16 classes of SYNTHIA; by default all. Predictions of other
                classes are still errors, and the per-class arrays contain all classes.

        Returns:
            `dict`: The scores:

            - `mean_iou`: Mean over `classes_averaged`.
            - `mean_accuracy`: Mean recall over the classes that occur in the labels.
            - `overall_accuracy`: Share of correct pixels among the pixels labelled with one of `classes`.
            - `per_category_iou`, `per_category_accuracy`: float64 arrays of shape `(num_classes,)`; NaN if undefined.
            - `classes_averaged`: Ids of those `classes` that occur in the labels or the predictions.

        Raises:
            ValueError: If `classes` are not distinct class ids, or if no labelled pixel was counted.
        """
        if classes is None:
            classes = list(range(self.num_classes))
        elif not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(self.num_classes)):
            raise ValueError(f"classes is {classes}; it must hold distinct ids in 0..{self.num_classes - 1}")
        matrix = self.matrix.cpu().numpy()
        correct = matrix.diagonal()
        labelled = matrix.sum(axis=1)
        union = labelled + matrix[:, : self.num_classes].sum(axis=0) - correct
        if not labelled[classes].any():
            raise ValueError("no labelled pixel was counted; scores need at least one")
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
            # PyTorch supports few operations on unsigned types wider than uint8.
            if values.dtype.kind == "u" and values.dtype.itemsize > 1:
                values = values.astype(np.int64)
            values = torch.from_numpy(values)
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(
                f"{name} has dtype {values.dtype}; it must hold integer class ids: take the argmax over the class "
                "dimension of scores first"
            )
        return values.to(self.matrix.device)

    def _count_on_cpu(self, prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Confusion matrix of flat maps, by histograms over (lane, label, prediction) in uint8."""
        columns = self.num_classes + 1
        lanes = torch.zeros(_LANES * 256 * columns, dtype=torch.int64)
        counts = torch.zeros_like(self.matrix)
        for start in range(0, label.numel(), _CHUNK_PIXELS):
            chunks = [values[start : start + _CHUNK_PIXELS] for values in (prediction, label)]
            small_prediction, small_label = (_to_uint8(chunk) for chunk in chunks)
            if small_prediction is None or small_label is None:
                counts += self._count(*chunks)
                continue
            codes = torch.add(self._lane_offsets[: small_label.numel()], small_label, alpha=columns)
            codes += small_prediction.clamp(max=self.num_classes)
            lanes += torch.bincount(codes, minlength=lanes.numel())
        by_label = lanes.view(_LANES, 256, columns).sum(dim=0)
        by_label[self.ignore_index] = 0
        unknown = by_label[self.num_classes :].any(dim=1).nonzero().flatten() + self.num_classes
        if unknown.numel():
            raise self._unknown_labels(unknown)
        return counts + by_label[: self.num_classes]

    def _count(self, prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Confusion matrix of flat integer maps on any device."""
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
            f"label holds {values[:10].tolist()}, which are neither class ids (0..{self.num_classes - 1}) nor "
            f"ignore_index ({self.ignore_index}); map label ids to train ids first"
        )


def _to_uint8(values: torch.Tensor) -> torch.Tensor | None:
    """The integers as uint8, or `None` if one is out of range."""
    if values.dtype == torch.uint8:
        return values
    low, high = torch.aminmax(values)
    return values.to(torch.uint8) if low >= 0 and high <= 255 else None
