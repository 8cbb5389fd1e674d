"""The training objective: classification and point-sampled mask losses with fixed matching, and the score map loss."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_mfuser import MFuserConfig


def sample_points(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """
    Samples maps bilinearly, with zeros outside.

    Args:
        maps (`torch.Tensor` of shape `(M, H, W)`):
            Maps to sample.
        points (`torch.Tensor` of shape `(M, P, 2)`):
            x and y in [0, 1].

    Returns:
        `torch.Tensor` of shape `(M, P)`: Values at the points.
    """
    grid = 2 * points[:, None] - 1  # (M, 1, P, 2)
    return F.grid_sample(maps[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0, 0]


def require(valid: torch.Tensor, problem: str) -> bool:
    """
    Whether `valid`, a single boolean, is true. On a GPU, there is no synchronisation: the device raises `problem`
    later, as a failed assertion.
    """
    if valid.device.type in ("cuda", "meta"):
        torch._assert_async(valid, problem)  # it has no public name
        return True
    return bool(valid)


def check_class_mask(class_mask: torch.Tensor, present: torch.Tensor) -> None:
    """Raises `ValueError` unless the labelled classes (B, K) include those present (B, K), and at least one."""
    if class_mask.shape != present.shape or class_mask.dtype != torch.bool:
        raise ValueError(
            f"class_mask has shape {tuple(class_mask.shape)} and dtype {class_mask.dtype}; it "
            f"must be booleans of shape {tuple(present.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    problem = "class_mask leaves an image of the batch without classes; each needs at least one"
    if not require(class_mask.any(dim=1).all(), problem):
        raise ValueError(problem)
    contradictions = present & ~class_mask
    if not require(~contradictions.any(), "labels hold a class that the image's class_mask excludes"):
        image, class_id = contradictions.nonzero()[0].tolist()
        raise ValueError(
            f"the labels of image {image} hold class {class_id}, which its class_mask excludes; pixels of such "
            "classes must be ignored"
        )


class MFuserLoss(nn.Module):
    """
    Losses of every prediction of the decoder and of the score map (section 3.4 of the paper, following Mask2Former).

    The matching is fixed: query k is matched to class k if the image contains it, and to "no object" otherwise. All
    predictions and images are computed in one batch, in which masks of absent classes have weight 0. This avoids
    synchronisation with the device.

    Sources that label different classes can be mixed in a batch. A class that the source of an image does not label
    may still be present in it, so the image does not contribute to the training of this class: its query has no class
    loss and no mask loss, and it is left out of the softmax of the other queries and of the score map. The gradient of
    its logits is exactly zero.
    """

    def __init__(self, config: MFuserConfig):
        super().__init__()
        self.config = config

    def draw_points(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """
        Draws the points of the mask losses: most of them where the prediction is uncertain, the rest uniformly.

        Args:
            mask_logits (`torch.Tensor` of shape `(M, h, w)`):
                Predicted masks.

        Returns:
            `torch.Tensor` of shape `(M, loss_num_points, 2)`: x and y in [0, 1].
        """
        config = self.config
        count = config.loss_num_points
        unsure = int(config.loss_importance_ratio * count)
        drawn = int(config.loss_oversample_ratio * count)
        candidates = torch.rand(mask_logits.shape[0], drawn, 2, device=mask_logits.device)
        certainty = sample_points(mask_logits, candidates).abs()
        chosen = certainty.topk(unsure, dim=1, largest=False, sorted=False).indices
        chosen = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        fresh = torch.rand(mask_logits.shape[0], count - unsure, 2, device=mask_logits.device)
        return torch.cat([chosen, fresh], dim=1)

    def forward(
        self,
        class_logits: torch.Tensor,
        mask_logits: torch.Tensor,
        score_map: torch.Tensor,
        labels: torch.Tensor,
        class_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Computes all losses.

        Args:
            class_logits (`torch.Tensor` of shape `(I, B, K, K + 1)`):
                Class logits of I predictions, with "no object" last.
            mask_logits (`torch.Tensor` of shape `(I, B, K, h, w)`):
                Mask logits of I predictions.
            score_map (`torch.Tensor` of shape `(B, K, h', w')`):
                Cosine similarities between class and patch embeddings.
            labels (`torch.Tensor` of shape `(B, H, W)`):
                Class ids, and `semantic_loss_ignore_index` for ignored pixels.
            class_mask (`torch.Tensor` of shape `(B, K)`, *optional*):
                The classes that the source of each image labels, as booleans. By default all.

        Returns:
            `dict[str, torch.Tensor]`: Weighted scalars `class_i`, `mask_i` and `dice_i` for each prediction i (0 is
            the prediction before the first decoder layer), and `score_map`. Their sum is the loss.

        Raises:
            ValueError: If the labels have a wrong shape or dtype or hold an invalid class id, or `class_mask`
                has a wrong shape or dtype, leaves an image without classes, or excludes a class of its labels.
                On a GPU, values are checked without synchronisation, by an assertion that fails later.
        """
        batch_size, num_classes = class_logits.shape[1:3]
        labels = self.validated(labels, batch_size, num_classes)
        classes = torch.arange(num_classes, device=labels.device)
        targets = (labels[:, None] == classes[:, None, None]).float()  # (B, K, H, W)
        present = targets.flatten(2).any(dim=-1)  # (B, K)
        if class_mask is not None:
            check_class_mask(class_mask, present)
        mask_losses = self.mask_losses(mask_logits.float(), targets, present)
        class_losses = self.class_losses(class_logits.float(), classes, present, class_mask)
        components = {}
        for index, class_loss in enumerate(class_losses):
            components[f"class_{index}"] = class_loss
            components[f"mask_{index}"], components[f"dice_{index}"] = (loss[index] for loss in mask_losses)
        components["score_map"] = self.score_map_loss(score_map.float(), labels, class_mask)
        return components

    def validated(self, labels: torch.Tensor, batch_size: int, num_classes: int) -> torch.Tensor:
        """Returns the labels as int64; raises `ValueError` if they are invalid."""
        if labels.dim() != 3 or labels.shape[0] != batch_size:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; it must be ({batch_size}, height, width)")
        if labels.is_floating_point():
            raise ValueError(f"labels have dtype {labels.dtype}; they must be class ids, that is integers")
        labels = labels.long()
        if not torch.compiler.is_compiling():
            ignored = self.config.semantic_loss_ignore_index
            accepted = f"they must be class ids from 0 to {num_classes - 1}, or {ignored} for ignored pixels"
            invalid = ((labels < 0) | (labels >= num_classes)) & (labels != ignored)
            if not require(~invalid.any(), f"labels hold other values: {accepted}"):
                raise ValueError(f"labels hold {sorted(set(labels[invalid].tolist()))[:5]}; {accepted}")
        return labels

    def class_losses(
        self,
        logits: torch.Tensor,
        classes: torch.Tensor,
        present: torch.Tensor,
        class_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the weighted cross-entropy over the queries of labelled classes of each prediction, shape (I,)."""
        no_object = len(classes)
        matched = torch.where(present, classes, no_object)  # (B, K)
        weight = torch.ones(no_object + 1, device=logits.device)
        weight[no_object] = self.config.loss_no_object_weight
        query_weight = weight[matched]
        if class_mask is not None:
            unlabelled = F.pad(~class_mask, (0, 1))  # "no object" is known in every image
            logits = logits.masked_fill(unlabelled[None, :, None], -math.inf)
            query_weight = query_weight * class_mask
        entropy = F.cross_entropy(
            logits.flatten(0, 2), matched.expand(logits.shape[:3]).flatten(), weight=weight, reduction="none"
        )
        if class_mask is not None:
            entropy = entropy * class_mask.flatten().repeat(len(logits))
        entropy = entropy.view(len(logits), -1).sum(dim=1) / query_weight.sum()
        return self.config.loss_class_weight * entropy

    def mask_losses(
        self, logits: torch.Tensor, targets: torch.Tensor, present: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns binary cross-entropy and dice loss of the masks of present classes, each of shape (I,)."""
        predictions, batch_size, num_classes = logits.shape[:3]
        logits = logits.flatten(0, 2)  # (I * B * K, h, w)
        with torch.no_grad():
            points = self.draw_points(logits)  # (I * B * K, P, 2)
            # all predictions share the target of a mask, so the points of all of them are sampled together
            by_mask = points.view(predictions, batch_size * num_classes, -1, 2).transpose(0, 1)
            truth = sample_points(targets.flatten(0, 1), by_mask.flatten(1, 2))  # (B * K, I * P)
            truth = truth.view(batch_size * num_classes, predictions, -1).transpose(0, 1)  # (I, B * K, P)
        sampled = sample_points(logits, points).view_as(truth)
        present = present.flatten().float()
        num_masks = self.num_masks(present)
        entropy = F.binary_cross_entropy_with_logits(sampled, truth, reduction="none").mean(dim=-1)
        probability = sampled.sigmoid()
        overlap = 2 * (probability * truth).sum(dim=-1) + 1
        dice = 1 - overlap / (probability.sum(dim=-1) + truth.sum(dim=-1) + 1)  # (I, B * K)
        return (
            self.config.loss_mask_weight * (entropy @ present) / num_masks,
            self.config.loss_dice_weight * (dice @ present) / num_masks,
        )

    def num_masks(self, present: torch.Tensor) -> torch.Tensor:
        """Returns the number of masks in the batch, averaged over devices, and at least 1."""
        count = present.sum()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            count = count / torch.distributed.get_world_size()
        return count.clamp(min=1)

    def score_map_loss(
        self, score_map: torch.Tensor, labels: torch.Tensor, class_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the cross-entropy of the resized score map; ignored pixels count as 0 in its mean."""
        config = self.config
        scale, bias = config.loss_logit_scale, config.loss_logit_bias
        if scale is None or bias is None:
            logits = score_map / config.loss_temperature
        else:
            logits = score_map * math.exp(scale) + bias
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        if class_mask is not None:  # after the interpolation, which turns infinities into NaN
            logits = logits.masked_fill(~class_mask[:, :, None, None], -math.inf)
        entropy = F.cross_entropy(logits, labels, ignore_index=config.semantic_loss_ignore_index, reduction="none")
        return config.loss_score_map_weight * entropy.mean()
