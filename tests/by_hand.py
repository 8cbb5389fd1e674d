"""Definitions written out slowly, so that expected values do not come from the code under test."""

import torch


def bilinear(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps (..., H, W) resized bilinearly: cells have their values at their centres, borders are repeated."""

    def weights(old: int, new: int) -> torch.Tensor:
        matrix = torch.zeros(new, old)
        for index in range(new):
            position = min(max((index + 0.5) * old / new - 0.5, 0), old - 1)
            below = int(position)
            matrix[index, below] += 1 - (position - below)
            matrix[index, min(below + 1, old - 1)] += position - below
        return matrix

    return weights(maps.shape[-2], size[0]) @ maps @ weights(maps.shape[-1], size[1]).T


def segmentation_scores(class_logits: torch.Tensor, mask_logits: torch.Tensor, own_class: bool) -> torch.Tensor:
    """Class logits (B, K, K + 1) and mask logits (B, K, h, w) -> scores (B, K, h, w), one query at a time."""
    scores = torch.zeros_like(mask_logits)
    num_classes = mask_logits.shape[1]
    for image, (logits, masks) in enumerate(zip(class_logits, mask_logits, strict=True)):
        for query in range(num_classes):
            probability = logits[query].exp() / logits[query].exp().sum()
            mask = 1 / (1 + (-masks[query]).exp())
            for label in range(num_classes):
                if not own_class:
                    scores[image, label] += probability[label] * mask
                elif label == query:
                    scores[image, label] += probability[:num_classes].sum() * mask
    return scores
