"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class MFuserEncoderOutput(ModelOutput):
    """
    Output of both encoders in lock-step.

    Args:
        vfm_last_hidden_state (`torch.Tensor` of shape `(B, Lv, Dv)`):
            Tokens of the vision foundation model after the last MVFuser.
        vlm_last_hidden_state (`torch.Tensor` of shape `(B, L, D)`):
            Tokens of the vision-language model after the last MVFuser.
        fused_maps (`tuple` of 4 `torch.Tensor` of shape `(B, Dv + D, h, w)`):
            Patch tokens of both encoders after each tap, concatenated.
        vfm_hidden_states, vlm_hidden_states (`tuple` of `torch.Tensor`, *optional*):
            Tokens after the embeddings and after each MVFuser.
    """

    vfm_last_hidden_state: torch.Tensor | None = None
    vlm_last_hidden_state: torch.Tensor | None = None
    fused_maps: tuple[torch.Tensor, ...] | None = None
    vfm_hidden_states: tuple[torch.Tensor, ...] | None = None
    vlm_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MFuserModelOutput(ModelOutput):
    """
    Output of [`MFuserModel`].

    Args:
        fused_maps (`tuple` of 4 `torch.Tensor` of shape `(B, Dv + D, h, w)`):
            Patch tokens of both encoders after each tap, concatenated.
        feature_maps (`tuple` of 4 `torch.Tensor` of shape `(B, Dv + D, ., .)`):
            The feature pyramid computed from them, stride 4 first.
        global_embedding (`torch.Tensor` of shape `(B, 1, E)`):
            The image in the vision-language space.
        dense_embedding (`torch.Tensor` of shape `(B, E, h, w)`):
            Its patches in the vision-language space.
        text_embeddings (`torch.Tensor` of shape `(B, K, E)`):
            Class embeddings after the MTEnhancer.
        score_map (`torch.Tensor` of shape `(B, K, h, w)`):
            Cosine similarity of `dense_embedding` and `text_embeddings`.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, L, D)`, *optional*):
            Tokens of the vision-language model after the embeddings and after each MVFuser.
        vfm_hidden_states (`tuple` of `torch.Tensor` of shape `(B, Lv, Dv)`, *optional*):
            The same of the vision foundation model.
    """

    fused_maps: tuple[torch.Tensor, ...] | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    global_embedding: torch.Tensor | None = None
    dense_embedding: torch.Tensor | None = None
    text_embeddings: torch.Tensor | None = None
    score_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    vfm_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MFuserForSemanticSegmentationOutput(ModelOutput):
    """
    Output of [`MFuserForSemanticSegmentation`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*):
            Sum of `loss_components`.
        logits (`torch.Tensor` of shape `(B, K, H, W)`):
            Class scores in [0, K] at the size of the input.
        class_queries_logits (`torch.Tensor` of shape `(B, K, K + 1)`):
            Class logits of the last prediction; `None` for an image segmented by windows.
        masks_queries_logits (`torch.Tensor` of shape `(B, K, h, w)`):
            Mask logits of the last prediction; `None` for an image segmented by windows.
        score_map (`torch.Tensor` of shape `(B, K, h', w')`):
            See [`MFuserModelOutput`]; `None` for an image segmented by windows.
        hidden_states, vfm_hidden_states (`tuple` of `torch.Tensor`, *optional*):
            See [`MFuserModelOutput`].
        loss_components (`dict[str, torch.Tensor]`, *optional*):
            Every weighted loss by name; their mean over windows for an image segmented by windows.
        confidence (`torch.Tensor` of shape `(B, H, W)`, *optional*):
            Estimated probability that the class of the highest score is right, in [0, 1].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    score_map: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    vfm_hidden_states: tuple[torch.Tensor, ...] | None = None
    loss_components: dict[str, torch.Tensor] | None = None
    confidence: torch.Tensor | None = None
