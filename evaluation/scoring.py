"""
Scoring a model on a domain as the published protocols do.

Images are resized to the protocol's size and segmented by sliding windows; the scores are resized to the label's size
before the argmax, and counted in one confusion matrix per condition. No map of scores is kept.

Reading and segmenting run in threads or processes, beside the counting. On a CPU, a small model segments several
images in parallel, each in a thread on one core, since its operations are too short for several cores. The labels are
the same.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

from mfuser.errors import is_out_of_memory, one_line
from mfuser.evaluation.confidence import DomainConfidence
from mfuser.evaluation.domains import EvaluationDomain, check_classes
from mfuser.evaluation.image_scores import chosen_examples
from mfuser.evaluation.predictions import PredictionWriter
from mfuser.evaluation.protocols import (
    EvaluationOptions,
    ProtocolSamples,
    Sample,
    groups_of_one_size,
    sample_loader,
    share_of_batches,
)
from mfuser.evaluation.results import DomainMetric
from mfuser.overlap import in_order, model_threads, read_ahead
from mfuser.postprocessing_mfuser import label_map_of_scores

BATCHES_AHEAD = 2


class Prediction(NamedTuple):
    """
    A sample that has been segmented, or the reason why it was skipped.

    Args:
        sample (`Sample`):
            The sample, without its pixels.
        label_map (`torch.Tensor` of shape `sample.size`, *optional*):
            Class ids; `None` if the sample was skipped.
        scores (`torch.Tensor` of shape `(num_labels, height, width)`, *optional*):
            The scores, if they are asked for.
        problem (`str`, *optional*):
            The reason why the sample was skipped.
    """

    sample: Sample
    label_map: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    problem: str | None = None


@torch.inference_mode()
def evaluate_domain(
    model,
    processor,
    domain: EvaluationDomain,
    options: EvaluationOptions | None = None,
    save_predictions: str | Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    confidence: bool = False,
    examples: int = 0,
) -> dict[str, Any]:
    """
    Segments every image of a domain once and scores the result.

    In several processes (`accelerate launch`), each process takes its share of the batches, and all return the score
    of the whole domain. Batches are formed before they are distributed and counts are integers, so the score equals
    that of one process. The memory in use does not depend on the number of images.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, on its device. It is set to evaluation mode.
        processor ([`MFuserImageProcessor`]):
            Normalises the images. Its own size is not used.
        domain (`EvaluationDomain`):
            The domain, from `open_domain`.
        options (`EvaluationOptions`, *optional*):
            The protocol, test-time augmentation, scored classes and batch size. By default those of
            `EvaluationOptions()`.
        save_predictions (`str` or `Path`, *optional*):
            A folder for the predictions, see `prediction_files`. 8-bit PNGs at the size that is scored: labelIds for
            Cityscapes, as its test server expects, train ids for other domains.
        accelerator (`Accelerator`, *optional*):
            The accelerator of a run in several processes.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        confidence (`bool`, *optional*, defaults to `False`):
            Whether to add metrics of the confidences, see [`DomainConfidence.result`].
        examples (`int`, *optional*, defaults to 0):
            How many of the worst, the median and the best images to name, see [`chosen_examples`].

    Returns:
        `dict`: The result, ready for JSON. `mean_iou` (in [0, 1]; `None` without labels) is the mean over conditions
        if the domain has them (ACDC), otherwise that of all pixels; `mean_iou_over` is "conditions" or "pixels";
        `pooled` holds the scores of all pixels together and `conditions` those of each condition; `images`,
        `expected_images`, `unlabelled_images`, `skipped`, `segmented_at`, `domain`, `source`, `split`, `label_map` and
        `label_size` ("full" or "half") describe what was scored. Scores hold `mean_iou`, `mean_accuracy`,
        `overall_accuracy`, `per_class_iou` by name, `classes_averaged` and the `confusion_matrix` (rows: labels;
        columns: predictions, the last column for predictions of no class). `confidence` holds the metrics of the
        confidences, if they are requested and there are labels, and `examples` the chosen images.

    Raises:
        ValueError: If the classes of model and domain differ, the options do not fit the domain, there is nothing to
            score, or confidences are requested with test-time augmentation.
        FileExistsError: If the folder for the predictions is not empty.
    """
    options = options or EvaluationOptions()
    if confidence:
        check_scores_are_those_of_the_model(options)
    check_classes(model.config.id2label, domain)
    if not domain.rows.labelled and save_predictions is None:
        raise ValueError(
            f"{domain.name}, split {domain.split}, has no labels: its predictions can be saved, not scored"
        )
    writer = None if save_predictions is None else PredictionWriter(domain, save_predictions)
    if accelerator is not None:
        accelerator.wait_for_everyone()  # no process may write before all have checked that the folder is empty
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)

    evaluation_size, classes = options.evaluation_size(domain), domain.scored_classes(options.classes)
    batches = share_of_batches(len(domain.rows), options.batch_size, rank, processes)
    loader = sample_loader(ProtocolSamples(domain, processor, evaluation_size), batches, options.workers)
    metric = DomainMetric(domain, model.device, image_classes=classes if examples else None)
    confidences = DomainConfidence(domain, model) if confidence else None
    model.eval()
    images = sum(len(batch) for batch in batches)
    segment = partial(segment_batch, model, options, keep_scores=confidence)
    with (
        tqdm(total=images, desc=domain.name, unit="image", disable=not progress or rank > 0) as bar,
        model_threads(model) as threads,
    ):
        # The workers of the loader read ahead themselves.
        batches_of_samples = loader if options.workers else read_ahead(loader, BATCHES_AHEAD)
        for predictions in in_order(segment, batches_of_samples, threads, ahead=threads):
            for prediction in predictions:
                count(prediction, metric, writer, confidences)
            bar.update(len(predictions))
    if processes > 1:
        metric.reduce(accelerator)
    result = metric.result(evaluation_size, classes)
    if confidences is not None and result["pooled"] is not None:
        if processes > 1:
            confidences.reduce(accelerator)
        result["confidence"] = confidences.result(classes)
    if examples:
        result["examples"] = chosen_examples(metric.images, domain.rows.names, examples)
    return result


def check_scores_are_those_of_the_model(options: EvaluationOptions) -> None:
    """Raises `ValueError` if scores are averaged over augmented images, for which confidences are not defined."""
    if options.augmented:
        raise ValueError(
            f"flip is {options.flip} and scales is {options.scales}; confidences are defined for the scores of the "
            "model without test-time augmentation: flip=False, scales=(1.0,)"
        )


@torch.inference_mode()
def segment_batch(
    model, options: EvaluationOptions, samples: list[Sample], keep_scores: bool = False
) -> list[Prediction]:
    """
    Segments the samples of a batch.

    A sample is skipped, with a reason, if it cannot be used, is smaller than a patch, exhausts the memory, or has
    scores that are not finite.

    Args:
        model ([`MFuserForSemanticSegmentation`]):
            The model, in eval mode.
        options (`EvaluationOptions`):
            The protocol.
        samples (`list[Sample]`):
            The samples.
        keep_scores (`bool`, *optional*, defaults to `False`):
            Whether to return the scores.

    Returns:
        `list[Prediction]`: One prediction per sample.
    """
    predictions = [Prediction(sample, problem=sample.problem) for sample in samples if sample.problem is not None]
    for group in groups_of_one_size(samples):
        height, width = group[0].pixel_values.shape[1:]
        smallest = round(min(height, width) * min(options.scales))
        if smallest < model.config.patch_size:
            problem = f"segmented at {height} x {width} pixels, a side has {smallest}; a patch has "
            predictions += [Prediction(sample, problem=f"{problem}{model.config.patch_size}") for sample in group]
            continue
        try:
            pixel_values = torch.stack([sample.pixel_values for sample in group]).to(model.device, model.dtype)
            scores = image_scores(model, pixel_values, options)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            problem = f"{height} x {width} pixels, {len(group)} at once: {one_line(error)}"
            predictions += [Prediction(sample, problem=problem) for sample in group]
            continue
        for sample, each in zip(group, scores, strict=True):
            without_pixels = sample._replace(pixel_values=sample.pixel_values[:, :0, :0].clone())
            try:
                label_map = label_map_of_scores(each, sample.size)
            except (MemoryError, RuntimeError, ValueError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                predictions.append(Prediction(without_pixels, problem=one_line(error)))
                continue
            predictions.append(Prediction(without_pixels, label_map, each if keep_scores else None))
    return predictions


def count(
    prediction: Prediction,
    metric: DomainMetric,
    writer: PredictionWriter | None,
    confidences: DomainConfidence | None = None,
) -> None:
    """Counts a prediction in `metric` and `confidences` and writes it; it is skipped if it cannot be written."""
    sample, label_map, scores, problem = prediction
    if label_map is not None and writer is not None:
        try:
            writer.write(sample.row, label_map)
        except (OSError, ValueError) as error:
            label_map, problem = None, one_line(error)
    if label_map is None:
        metric.skip(sample.row, str(problem))
        return
    metric.update(sample, label_map)
    if confidences is not None and scores is not None:
        confidences.update(sample, scores, label_map)


def image_scores(model, pixel_values: torch.Tensor, options: EvaluationOptions) -> torch.Tensor:
    """The scores (batch_size, num_labels, height, width) of images, with test-time augmentation if there is any."""
    if options.augmented:
        return model.augmented_scores(pixel_values, scales=options.scales, flip=options.flip)
    return model(pixel_values=pixel_values).logits
