"""What the models return."""

from dataclasses import dataclass
from itertools import islice

import torch
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)


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
        attentions (`tuple` of `torch.Tensor`, *optional*):
            Attention weights of the layers of both encoders, in the order in which they run.
    """

    vfm_last_hidden_state: torch.Tensor | None = None
    vlm_last_hidden_state: torch.Tensor | None = None
    fused_maps: tuple[torch.Tensor, ...] | None = None
    vfm_hidden_states: tuple[torch.Tensor, ...] | None = None
    vlm_hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class MFuserModelOutput(ModelOutput):
    """
    Output of [`MFuserModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, L, D)`):
            Tokens of the vision-language model after the last MVFuser.
        pooler_output (`torch.Tensor` of shape `(B, E)`):
            `global_embedding`, under the name and with the shape that pipelines expect.
        fused_maps (`tuple` of 4 `torch.Tensor` of shape `(B, Dv + D, h, w)`):
            Patch tokens of both encoders after each tap, concatenated.
        feature_maps (`tuple` of 4 `torch.Tensor` of shape `(B, Dv + D, ., .)`):
            The feature pyramid computed from them, finest first.
        global_embedding (`torch.Tensor` of shape `(B, 1, E)`):
            The image in the vision-language space.
        dense_embedding (`torch.Tensor` of shape `(B, E, h, w)`):
            Its patches in the vision-language space.
        text_embeddings (`torch.Tensor` of shape `(B, K, E)`):
            Class embeddings after the MTEnhancer.
        score_map (`torch.Tensor` of shape `(B, K, h, w)`):
            Cosine similarity of `dense_embedding` and `text_embeddings`.
        class_embeddings (`torch.Tensor` of shape `(K, E)`):
            Class embeddings before the MTEnhancer.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, L, D)`, *optional*):
            Tokens of the vision-language model after the embeddings and after each MVFuser.
        vfm_hidden_states (`tuple` of `torch.Tensor` of shape `(B, Lv, Dv)`, *optional*):
            The same of the vision foundation model.
        attentions (`tuple` of `torch.Tensor` of shape `(B, heads, L, L)`, *optional*):
            Attention weights of each layer of the vision-language model.
        vfm_attentions (`tuple` of `torch.Tensor` of shape `(B, heads, Lv, Lv)`, *optional*):
            The same of the vision foundation model.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    fused_maps: tuple[torch.Tensor, ...] | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    global_embedding: torch.Tensor | None = None
    dense_embedding: torch.Tensor | None = None
    text_embeddings: torch.Tensor | None = None
    score_map: torch.Tensor | None = None
    class_embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    vfm_hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    vfm_attentions: tuple[torch.Tensor, ...] | None = None


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
        hidden_states, vfm_hidden_states, attentions, vfm_attentions (`tuple` of `torch.Tensor`, *optional*):
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
    attentions: tuple[torch.Tensor, ...] | None = None
    vfm_attentions: tuple[torch.Tensor, ...] | None = None
    loss_components: dict[str, torch.Tensor] | None = None
    confidence: torch.Tensor | None = None


def selected_states(states: tuple[torch.Tensor, ...] | None, selection: bool | int | list[int]):
    """
    The hidden states that `output_hidden_states` selects by their indices, as in Transformers.

    Args:
        states (`tuple` of `torch.Tensor`, *optional*):
            All hidden states.
        selection (`bool`, `int` or `list[int]`):
            A flag, or the indices to keep; negative ones count from the end.

    Returns:
        `tuple`: `states`, with `None` in the place of those that are not selected.
    """
    if states is None or isinstance(selection, bool):
        return states
    indices = [selection] if isinstance(selection, int) else selection
    kept = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in kept else None for index, state in enumerate(states))


def attentions_by_encoder(attentions: tuple[torch.Tensor, ...] | None, layer_pairs: list[tuple[int, int]]):
    """
    Splits the attention weights of both encoders, which are in the order in which their layers run.

    Args:
        attentions (`tuple` of `torch.Tensor`, *optional*):
            The attention weights. Empty if the implementation of attention does not return them.
        layer_pairs (`list[tuple[int, int]]`):
            Number of layers of each encoder that have run before each MVFuser.

    Returns:
        `tuple`: Those of the vision foundation model and those of the vision-language model, or `None` twice.
    """
    if attentions is None:
        return None, None
    if not attentions:
        logger.warning(
            "output_attentions needs eager attention, since other implementations do not return their weights: "
            'call model.set_attn_implementation("eager")'
        )
        return (), ()
    remaining, previous = iter(attentions), (0, 0)
    by_encoder: tuple[list, list] = ([], [])
    for pair in layer_pairs:
        for collected, start, end in zip(by_encoder, previous, pair, strict=True):
            collected += islice(remaining, end - start)
        previous = pair
    return tuple(map(tuple, by_encoder))
