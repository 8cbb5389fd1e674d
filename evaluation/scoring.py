"""Scores a model on a domain as the published protocols do: one confusion matrix, never a kept score.

`open_domain` finds the images and labels, wherever they lie; `evaluate_domain` segments and scores them. Images are
resized with OpenCV's bilinear sampling, as mmcv did for the published numbers, segmented by sliding windows, and the
scores are resized to the label before the arg-max. `mfuser evaluate` is the command around these two.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mfuser.class_names_mfuser import IGNORE_INDEX
from mfuser.data.augmentation import ResizedWindow
from mfuser.data.domains import (
    DOMAINS,
    SPLIT_ALIASES,
    Domain,
    EvaluationSize,
    LabelMap,
    Pair,
    available_splits,
    check_sizes,
    find_pairs,
    has_split,
    label_ids,
    load_domain,
    pick_split,
    read_label,
)
from mfuser.evaluation.metrics import MeanIoU

PROTOCOLS = ("P1", "P2")
DEFAULT_SPLIT = "validation"
# What Pillow raises for a file that is no usable image (SyntaxError: broken PNGs), and our own checks.
PAIR_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# The Cityscapes server finds the prediction of an image by these three parts of its name.
_CITYSCAPES_FRAME = re.compile(r"[^/_]+_\d{6}_\d{6}(?=[_.]|$)")


class Row(NamedTuple):
    """`image`: RGB, upright. `label`: train ids (H, W), uint8, or None where there are none."""

    image: Image.Image
    label: np.ndarray | None


@dataclass(frozen=True)
class EvaluationDomain:
    """The images of one split of one domain, and what is known of them. Made by `open_domain`.

    Attributes:
        name (`str`): what results call it: the domain, and the split where one was asked for ("camvid:dusk").
        domain (`Domain` or `None`): the dataset's table; None for a dataset of the user's own.
        source, split (`str`): where it comes from.
        rows (`list[Pair]` or `datasets.Dataset`): pairs of an official download, or rows with train ids.
        id2label (`dict[int, str]`): the name of each train id.
        label_map (`LabelMap`): from the values of the label files to train ids.
        label_map_name (`str` or `None`): which of the domain's maps made the train ids; None if that isn't known.
        skipped (`tuple[dict]`): `name` and `reason` of the pairs left out before now.
    """

    name: str
    domain: Domain | None
    source: str
    split: str
    rows: Any
    id2label: dict[int, str]
    label_map: LabelMap
    label_map_name: str | None
    skipped: tuple[dict[str, str], ...] = ()

    @property
    def expected_images(self) -> int | None:
        """How many images the split officially has, if that is known."""
        known = self.domain.splits.get(self.split) if self.domain else None
        return known.pairs if known else None

    @property
    def scored_classes(self) -> list[int]:
        """The ids that count in the mean IoU: all, but for SYNTHIA its 16."""
        absent = self.domain.absent_classes if self.domain else ()
        return [index for index, name in self.id2label.items() if name not in absent]

    @property
    def labelled(self) -> bool:
        """Whether the first row has a label; benchmarks keep those of their test splits."""
        first = self.rows[0]
        return (first.label if isinstance(first, Pair) else first["label"]) is not None

    @property
    def names(self) -> list[str]:
        """The name of every row, its number where the source has no names."""
        if isinstance(self.rows, list):
            return [pair.name for pair in self.rows]
        if "name" in self.rows.column_names:
            return list(self.rows["name"])
        return [f"{row:08d}" for row in range(len(self.rows))]

    @property
    def row_conditions(self) -> list[str | None]:
        """The condition of every row."""
        if isinstance(self.rows, list):
            return [pair.condition for pair in self.rows]
        return list(self.rows["condition"]) if "condition" in self.rows.column_names else [None] * len(self.rows)

    def read(self, index: int) -> Row:
        """One row, checked. Raises one of `PAIR_ERRORS` if the image or the label can't be used."""
        row = self.rows[index]
        if isinstance(row, Pair):
            with Image.open(row.image) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
            in_red = self.domain.class_in_red_channel
            ids = None if row.label is None else read_label(row.label.read_bytes(), in_red)
        else:
            image = ImageOps.exif_transpose(row["image"]).convert("RGB")
            ids = None if row["label"] is None else label_ids(row["label"])
        if ids is None:
            return Row(image, None)
        check_sizes((image.height, image.width), ids.shape)
        return Row(image, self.label_map(ids))


def open_domain(
    name: str,
    source: str | Path,
    split: str | None = None,
    label_map: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    id2label: dict[int, str] | str | Path | None = None,
) -> EvaluationDomain:
    """Finds the images of a domain.

    Args:
        name (`str`): a domain of `data/domains.py`, or any other name for a dataset of one's own.
        source (`str` or `Path`): the domain's official download, whose labels are then mapped on the fly, or anything
            that `load_domain` opens.
        split (`str`, *optional*): default: "validation" if there is one, else the only one.
        label_map (`str`, *optional*): which of the domain's label maps (Mapillary's "A" or "B"); by default the first,
            or that of the preparation.
        image_column, label_column (`str`): the source's names of the two columns, if it is no download.
        id2label (*optional*): class names of a dataset of one's own, see `load_domain`.

    Raises:
        FileNotFoundError, ValueError: from `find_pairs` and `load_domain`; or an argument does not fit the domain, or
            `source` was prepared as another domain or with another label map.
    """
    domain, source = DOMAINS.get(name), str(source)
    title = name if split is None else f"{name}:{split}"
    if domain and id2label is not None:
        raise ValueError(f"{domain.title} has its own class names; id2label is for datasets of your own")
    if domain and label_map:
        domain.label_map(label_map)  # raises, and lists them, if there is none of that name
    elif label_map:
        raise ValueError(f"{name} is no known domain ({', '.join(DOMAINS)}), so it has no label map {label_map!r}")
    if domain and Path(source).is_dir():
        downloaded = [each for each in domain.splits if has_split(domain, source, each)]
        if downloaded:
            if split is None and DEFAULT_SPLIT in downloaded:
                split = DEFAULT_SPLIT
            split = pick_split(downloaded, split, source)
            return _open_download(title, domain, source, split, label_map)
    if split is None and DEFAULT_SPLIT in (available := available_splits(source)):
        split = DEFAULT_SPLIT
    elif split is None:
        split = pick_split(available, None, source)
    loaded = load_domain(source, split, image_column, label_column, name if domain else id2label)
    split = SPLIT_ALIASES.get(split, split)
    prepared_as = loaded.preparation.get("domain")
    prepared_map = loaded.preparation.get("label_map")
    if domain and prepared_as not in (None, name):
        raise ValueError(f"{source} was prepared as {prepared_as}, not {name}")
    if label_map and label_map != prepared_map:
        made = f"were made with label map {prepared_map}" if prepared_map else "are train ids of an unknown label map"
        raise ValueError(f"{source}: its labels {made}; map {label_map} needs the download, or what was prepared so")
    record = loaded.preparation.get("splits", {}).get(split, {})
    return EvaluationDomain(
        name=title,
        domain=domain,
        source=source,
        split=split,
        rows=loaded.dataset,
        id2label=loaded.id2label,
        label_map=LabelMap.identity(len(loaded.id2label)),
        label_map_name=prepared_map,
        skipped=tuple(record.get("skipped", ())),
    )


def _open_download(title: str, domain: Domain, source: str, split: str, label_map: str | None) -> EvaluationDomain:
    found = find_pairs(domain, source, split)
    unpaired = [{"name": name, "reason": "no label belongs to this image"} for name in found.images_without_label]
    unpaired += [{"name": name, "reason": "no image belongs to this label"} for name in found.labels_without_image]
    unpaired += [{"name": folder, "reason": "the folder is missing"} for folder in found.missing_folders]
    return EvaluationDomain(
        name=title,
        domain=domain,
        source=source,
        split=split,
        rows=found.pairs,
        id2label=domain.id2label,
        label_map=domain.label_map(label_map),
        label_map_name=label_map or next(iter(domain.label_maps)),
        skipped=tuple(unpaired),
    )


def check_classes(model_classes: dict[int, str], domain: EvaluationDomain) -> None:
    """Raises ValueError, saying how they differ, unless a model's classes are those of a domain, id by id."""
    if model_classes == domain.id2label:
        return
    model_names, domain_names = list(model_classes.values()), list(domain.id2label.values())
    differences = []
    for owner, names, others in (
        ("the model", model_names, domain_names),
        (domain.name, domain_names, model_names),
    ):
        alone = [name for name in names if name not in others]
        if alone:
            differences.append(f"only {owner} has {', '.join(alone)}")
    moved = [
        f"{index} is {model_classes[index]} in the model and {name} in {domain.name}"
        for index, name in domain.id2label.items()
        if model_classes.get(index, name) != name
    ]
    if not differences:
        differences = ["the names are the same in another order: " + ", ".join(moved)]
    raise ValueError(
        f"the model's {len(model_names)} classes are not the {len(domain_names)} of {domain.name}: "
        f"{'; '.join(differences)}"
    )


class Sample(NamedTuple):
    """What a loader makes of a row: `pixel_values` (3, h, w), `label` (H, W) uint8 at the `size` (H, W) to score at;
    or why it could not (`problem`)."""

    index: int
    pixel_values: torch.Tensor | None
    label: torch.Tensor | None
    size: tuple[int, int]
    problem: str | None


class _Samples(Dataset):
    def __init__(self, domain: EvaluationDomain, processor, evaluation_size: EvaluationSize):
        self.domain = domain
        self.processor = processor
        self.evaluation_size = evaluation_size

    def __len__(self) -> int:
        return len(self.domain.rows)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, label = self.domain.read(index)
        except PAIR_ERRORS as error:
            return Sample(index, None, None, (0, 0), str(error))
        target = self.evaluation_size.resized(image.height, image.width)
        if self.evaluation_size.halve_first:
            half = (image.width // 2, image.height // 2)
            image = image.resize(half, Image.Resampling.BICUBIC)
            label = (
                None if label is None else np.asarray(Image.fromarray(label).resize(half, Image.Resampling.NEAREST))
            )
        pixels = np.asarray(image)
        size = pixels.shape[:2]
        planes = (
            pixels.transpose(2, 0, 1) if size == target else ResizedWindow(target, 0, 0, *target).crop_bilinear(pixels)
        )
        inputs = self.processor(planes, do_resize=False, input_data_format="channels_first", return_tensors="pt")
        label = None if label is None else torch.from_numpy(np.array(label))
        return Sample(index, inputs["pixel_values"][0], label, size, None)


def label_map_of_scores(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The best class of each pixel (H, W), uint8, of scores (K, h, w) resized bilinearly to `size` = (H, W).

    Class after class, so that a 22-megapixel image of Mapillary takes three maps of its size and not nineteen. The
    first of equal scores wins, as in `argmax`.
    """
    if scores.shape[1:] == size:
        return scores.argmax(dim=0).to(torch.uint8)
    best = classes = None
    for index, plane in enumerate(scores.float()):
        plane = torch.nn.functional.interpolate(plane[None, None], size=size, mode="bilinear", align_corners=False)
        plane = plane[0, 0]
        if best is None:
            best, classes = plane, torch.zeros(size, dtype=torch.uint8, device=scores.device)
            continue
        classes.masked_fill_(plane > best, index)
        torch.maximum(best, plane, out=best)
    return classes


def prediction_files(domain: EvaluationDomain, folder: str | Path) -> list[Path]:
    """Where `evaluate_domain` saves the prediction of each row, below `folder` / the domain's name.

    Cityscapes: `<city>_<sequence>_<frame>.png`, all in one folder. Others: the row's name as a PNG.

    Raises:
        FileExistsError: there are files already; the server accepts exactly one prediction an image.
        ValueError: two rows have the same name, or a name is no Cityscapes frame or leads out of the folder.
    """
    folder = Path(folder) / domain.name.replace(":", "-")
    if folder.is_dir() and next(folder.iterdir(), None) is not None:
        raise FileExistsError(f"{folder} is not empty: name another folder for the predictions")
    files = []
    for name in domain.names:
        path = PurePosixPath(name)
        if _is_cityscapes(domain):
            frame = _CITYSCAPES_FRAME.match(path.name)
            if frame is None:
                raise ValueError(
                    f"{domain.source}: {name!r} is no <city>_<sequence>_<frame>, as the Cityscapes server asks for; "
                    "evaluate the official download, or what `mfuser prepare cityscapes` wrote"
                )
            path = PurePosixPath(frame.group())
        elif path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{domain.source}: the name {name!r} leads out of the folder for predictions")
        if path.suffix.lower() in Image.registered_extensions():
            path = path.with_suffix("")
        files.append(folder / f"{path}.png")
    if len(set(files)) < len(files):
        repeated = next(file for index, file in enumerate(files) if file in files[:index])
        raise ValueError(f"{domain.source}: the predictions of several images would be called {repeated}")
    return files


def _is_cityscapes(domain: EvaluationDomain) -> bool:
    return domain.domain is not None and domain.domain.name == "cityscapes"


def _prediction_ids(domain: EvaluationDomain) -> np.ndarray:
    """The value to save for each class id (256,), uint8: Cityscapes' labelIds; train ids elsewhere."""
    ids = np.arange(256, dtype=np.uint8)
    if _is_cityscapes(domain):
        ids[:] = 0
        for label_id, name in domain.domain.label_maps["labelIds"].items():
            ids[domain.domain.classes.index(name)] = label_id
    return ids


@torch.inference_mode()
def evaluate_domain(
    model,
    processor,
    domain: EvaluationDomain,
    protocol: str = "P2",
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    batch_size: int = 1,
    workers: int = 0,
    save_predictions: str | Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Segments every image of a domain once and scores the result.

    Started in several processes (`accelerate launch`), each takes its share of the batches, and all return the score
    of the whole: batches are cut before they are shared out, and counts are integers, so it is the very score of one
    process. What is held in memory does not depend on the number of images.

    Args:
        model ([`MFuserForSemanticSegmentation`]): on its device; is put in eval mode.
        processor ([`MFuserImageProcessor`]): normalises the images; their size is the protocol's affair.
        domain (`EvaluationDomain`): from `open_domain`.
        protocol (`str`): "P1" or "P2", the size images are segmented at. Datasets of one's own keep theirs.
        flip (`bool`), scales (sequence of `float`): test-time augmentation, see
            [`~MFuserForSemanticSegmentation.augmented_scores`].
        batch_size (`int`): how many neighbouring images go together, where they are of one size.
        workers (`int`): processes that read images, for each process that segments.
        save_predictions (`str` or `Path`, *optional*): a folder, see `prediction_files`. 8-bit PNGs at the size that
            is scored: labelIds for Cityscapes, as its test server takes them, train ids for other domains.
        accelerator (`Accelerator`, *optional*): of a run in several processes.
        progress (`bool`): show a progress bar.

    Returns:
        `dict`, ready for JSON: `mean_iou` (in [0, 1]; None without labels), the mean over conditions where the domain
        has them (ACDC), else that of all pixels; `mean_iou_over`, "conditions" or "pixels"; `pooled`, the scores of
        all pixels together; `conditions`, the scores of each; `images`, `expected_images`, `unlabelled_images`,
        `skipped`, `segmented_at`, `domain`, `source`, `split`, `label_map`. Scores hold `mean_iou`, `mean_accuracy`,
        `overall_accuracy`, `per_class_iou` by name, `classes_averaged` and the `confusion_matrix` (rows: labels;
        columns: predictions, the last for none of the classes).

    Raises:
        ValueError: classes of model and domain differ, an argument is impossible, or there is nothing to score.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"no protocol {protocol!r}; there are {' and '.join(PROTOCOLS)}")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be positive numbers, got {tuple(scales)}")
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}")
    check_classes(model.config.id2label, domain)
    if not domain.labelled and save_predictions is None:
        raise ValueError(
            f"{domain.name}, split {domain.split}, has no labels: its predictions can be saved, not scored"
        )
    files = None if save_predictions is None else prediction_files(domain, save_predictions)
    prediction_ids = _prediction_ids(domain)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # no process may write before all have seen the folder empty
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)

    evaluation_size = domain.domain.evaluation_sizes[protocol] if domain.domain else EvaluationSize()
    row_conditions = domain.row_conditions
    present = set(row_conditions)
    order = list(domain.domain.conditions) if domain.domain else []
    conditions = [name for name in order if name in present] + sorted(present - set(order), key=str)
    metrics = {name: MeanIoU(len(domain.id2label), IGNORE_INDEX, model.device) for name in conditions}
    batches = [
        range(start, min(start + batch_size, len(domain.rows))) for start in range(0, len(domain.rows), batch_size)
    ]
    batches = batches[rank::processes]
    loader = DataLoader(
        _Samples(domain, processor, evaluation_size), batch_sampler=batches, num_workers=workers, collate_fn=list
    )
    model.eval()
    augmented = flip or tuple(scales) != (1.0,)
    counts, skipped = {name: [0, 0] for name in conditions}, []
    share = sum(len(batch) for batch in batches)
    with tqdm(total=share, desc=domain.name, unit="image", disable=not progress or rank > 0) as bar:
        for samples in loader:
            by_size: dict[torch.Size, list[Sample]] = {}
            for sample in samples:
                if sample.problem is None:
                    by_size.setdefault(sample.pixel_values.shape, []).append(sample)
                else:
                    skipped.append((sample.index, sample.problem))
            for group in by_size.values():
                pixel_values = torch.stack([sample.pixel_values for sample in group]).to(model.device, model.dtype)
                if augmented:
                    scores = model.augmented_scores(pixel_values, scales=tuple(scales), flip=flip)
                else:
                    scores = model(pixel_values=pixel_values).logits
                for sample, image_scores in zip(group, scores, strict=True):
                    prediction = label_map_of_scores(image_scores, sample.size)
                    condition = row_conditions[sample.index]
                    counts[condition][sample.label is None] += 1
                    if sample.label is not None:
                        metrics[condition].update(prediction, sample.label)
                    if files is not None:
                        files[sample.index].parent.mkdir(parents=True, exist_ok=True)
                        Image.fromarray(prediction_ids[prediction.cpu().numpy()]).save(files[sample.index])
            bar.update(len(samples))

    if processes > 1:
        metrics = {name: metric.reduce(accelerator) for name, metric in metrics.items()}
        everyone = gather_object([(counts, skipped)])
        counts = {name: np.sum([part[name] for part, _ in everyone], axis=0).tolist() for name in conditions}
        skipped = sorted(item for _, part in everyone for item in part)
    names = domain.names
    skipped = [{"name": names[index], "reason": problem} for index, problem in skipped]
    labelled, unlabelled = (sum(count[kind] for count in counts.values()) for kind in (0, 1))
    pooled = MeanIoU(len(domain.id2label), IGNORE_INDEX, model.device)
    for metric in metrics.values():
        pooled.merge(metric)
    if domain.labelled and not pooled.matrix.any():
        reason = (
            f"; the first of {len(skipped)} skipped: {skipped[0]['name']}: {skipped[0]['reason']}" if skipped else ""
        )
        raise ValueError(f"{domain.name}: no labelled pixel in {labelled} images{reason}")
    result = {
        "mean_iou": None,
        "mean_iou_over": None,
        "domain": domain.domain.title if domain.domain else None,
        "source": domain.source,
        "split": domain.split,
        "label_map": domain.label_map_name,
        "segmented_at": {
            "fit": None if evaluation_size.fit is None else list(evaluation_size.fit),
            "halve_first": evaluation_size.halve_first,
        },
        "images": labelled,
        "expected_images": domain.expected_images,
        "unlabelled_images": unlabelled,
        "skipped": [*domain.skipped, *skipped],
        "pooled": None,
        "conditions": {},
    }
    if pooled.matrix.any():
        result["pooled"] = _scores(pooled, domain, labelled)
        scored = {name: metric for name, metric in metrics.items() if name is not None and metric.matrix.any()}
        result["conditions"] = {name: _scores(metric, domain, counts[name][0]) for name, metric in scored.items()}
        result["mean_iou_over"] = "conditions" if scored else "pixels"
        means = [scores["mean_iou"] for scores in result["conditions"].values()] or [result["pooled"]["mean_iou"]]
        result["mean_iou"] = sum(means) / len(means)
    return result


def _scores(metric: MeanIoU, domain: EvaluationDomain, images: int) -> dict[str, Any]:
    scores = metric.compute(domain.scored_classes)
    iou = scores["per_category_iou"].tolist()
    return {
        "images": images,
        "mean_iou": scores["mean_iou"],
        "mean_accuracy": scores["mean_accuracy"],
        "overall_accuracy": scores["overall_accuracy"],
        "per_class_iou": {
            name: None if np.isnan(iou[index]) else iou[index] for index, name in domain.id2label.items()
        },
        "classes_averaged": [domain.id2label[index] for index in scores["classes_averaged"]],
        "confusion_matrix": metric.matrix.tolist(),
    }


__all__ = [
    "EvaluationDomain",
    "check_classes",
    "evaluate_domain",
    "label_map_of_scores",
    "open_domain",
    "prediction_files",
]
