"""
MFuser: two frozen encoders fused by Mamba, and a mask decoder whose queries are class names.

In the order of the paper: MVFuser, fusion layer, MTEnhancer, both encoders in lock-step, the segmentation model. The
encoders are in towers_mfuser.py, the scan in selective_scan.py, the feature pyramid in pyramid_mfuser.py, the decoder
in decoder_mfuser.py, the losses in loss_mfuser.py, sliding windows in windows_mfuser.py. This file contains all
contributions of the paper.

Paper: Zhang and Tan, "Mamba as a Bridge: Where Vision Foundation Models Meet Vision Language Models for
Domain-Generalized Semantic Segmentation", CVPR 2025, arXiv 2504.03193.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .base_mfuser import MFuserPreTrainedModel
from .class_names_mfuser import give_classes
from .confidence_mfuser import confidence_map
from .configuration_mfuser import MFuserConfig
from .decoder_mfuser import MFuserDecoder, MFuserPixelDecoder
from .initialization_mfuser import fill_with_decays, fill_with_time_steps, initialised
from .layers_mfuser import MFuserAttention, MFuserDepthwiseConv, MFuserMLP
from .loss_mfuser import MFuserLoss
from .outputs_mfuser import (
    MFuserEncoderOutput,
    MFuserForSemanticSegmentationOutput,
    MFuserModelOutput,
    attentions_by_encoder,
    selected_states,
)
from .pyramid_mfuser import MFuserPyramid
from .selective_scan import selective_scan
from .towers_mfuser import VFM_TOWERS, VLM_TOWERS, NoTower
from .weights_cache_mfuser import WeightsCache
from .windows_mfuser import average_over_augmentations, average_over_windows, sliding_windows, windows_per_batch

# --- MVFuser and the fusion of two encoders --------------------------------------------------------------------------


class MVFuser(nn.Module):
    """
    The fusion block (section 3.2): one Mamba-1 scan over the joint sequence of both encoders, gated by a convolution
    branch. Its cost is linear in the number of tokens.
    """

    def __init__(self, config: MFuserConfig, hidden_size: int):
        super().__init__()
        half = hidden_size // 2
        self.state_size = config.fusion_state_size
        self.time_step_rank = math.ceil(hidden_size / 16)
        bound = self.time_step_rank**-0.5
        self.in_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.conv_x = MFuserDepthwiseConv(half, config.fusion_conv_kernel)
        self.conv_z = MFuserDepthwiseConv(half, config.fusion_conv_kernel)
        self.x_proj = nn.Linear(half, self.time_step_rank + 2 * self.state_size, bias=False)
        self.dt_proj = initialised(
            nn.Linear(self.time_step_rank, half, bias=False), weight=partial(init.uniform_, a=-bound, b=bound)
        )
        self.dt_bias = nn.Parameter(torch.empty(half))
        self.A_log = nn.Parameter(torch.empty(half, self.state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(half))
        self.norm = nn.RMSNorm(half, eps=1e-5)
        self.out_proj = nn.Linear(half, hidden_size, bias=False)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.scale = nn.Parameter(torch.empty(()))
        initialised(
            self,
            dt_bias=fill_with_time_steps,
            A_log=fill_with_decays,
            D=init.ones_,
            scale=partial(init.constant_, val=config.fusion_initial_scale),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) -> (B, L, D)."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, D / 2) each
        x, z = F.silu(self.conv_x(x)), F.silu(self.conv_z(z))
        dt, B, C = self.x_proj(x).split([self.time_step_rank, self.state_size, self.state_size], dim=-1)
        y: torch.Tensor = selective_scan(  # type: ignore[assignment]  # a tuple only with `return_last_state`
            x.transpose(1, 2),
            self.dt_proj(dt).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            delta_bias=2 * self.dt_bias.float(),  # the published code adds it twice: in dt_proj and in the scan
            delta_softplus=True,
        )
        y = self.norm(y.transpose(1, 2)) * F.silu(z)  # z has passed SiLU before: the published gate applies it twice
        return self.dropout(self.out_proj(y)) * self.scale


class MFuserFusionLayer(GradientCheckpointingLayer):
    """
    One step of both encoders, and an MVFuser whose result is added to both streams (equations 2 to 4). With
    `use_fusion=False` there is no MVFuser.
    """

    def __init__(self, config: MFuserConfig):
        super().__init__()
        self.mvfuser: MVFuser | None = None
        if not config.use_fusion:
            return
        vfm_size, vlm_size = config.vfm_config.hidden_size, config.vlm_config.hidden_size
        self.mvfuser = MVFuser(config, vlm_size)
        self.vfm_in_proj = nn.Linear(vfm_size, vlm_size) if config.fusion_project_vfm else nn.Identity()
        self.vfm_out_proj = nn.Linear(vlm_size, vfm_size) if config.fusion_project_vfm else nn.Identity()

    def forward(
        self,
        vfm_states: torch.Tensor,
        vlm_states: torch.Tensor,
        run_vfm: Callable[[torch.Tensor], torch.Tensor],
        run_vlm: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            vfm_states (`torch.Tensor` of shape `(B, Lv, Dv)`):
                Tokens of the vision foundation model.
            vlm_states (`torch.Tensor` of shape `(B, L, D)`):
                Tokens of the vision-language model.
            run_vfm, run_vlm (`Callable`):
                The layers of each frozen encoder before this MVFuser. They are arguments so
                that gradient checkpointing recomputes them together with the MVFuser.

        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: The tokens of both after these layers, each with its share of the
            MVFuser's output added (section 3.2).
        """
        device = vfm_states.device  # the layers of the encoders may be on others
        vfm_states, vlm_states = run_vfm(vfm_states).to(device), run_vlm(vlm_states).to(device)
        if self.mvfuser is None:
            return vfm_states, vlm_states
        fused = self.mvfuser(torch.cat([self.vfm_in_proj(vfm_states), vlm_states], dim=1))  # (B, Lv + L, D)
        for_vfm, for_vlm = fused.split([vfm_states.shape[1], vlm_states.shape[1]], dim=1)
        return vfm_states + self.vfm_out_proj(for_vfm), vlm_states + for_vlm


# --- MTEnhancer ------------------------------------------------------------------------------------------------------


class MTEnhancerLayer(nn.Module):
    """Self-attention over class embeddings, an MVFuser over class embeddings and image, and an MLP; pre-norm."""

    def __init__(self, config: MFuserConfig):
        super().__init__()
        size = config.enhancer_hidden_size
        self.self_attention_norm = nn.LayerNorm(size)
        self.self_attention = MFuserAttention(config, size, config.enhancer_num_heads, qkv_bias=False)
        self.mvfuser_norm = nn.LayerNorm(size)
        self.mvfuser = MVFuser(config, size)
        self.mlp_norm = nn.LayerNorm(size)
        activation = nn.Sequential(nn.GELU(), nn.Dropout(config.enhancer_dropout))
        self.mlp = MFuserMLP([size, size * config.enhancer_mlp_ratio, size], activation)
        self.dropout = nn.Dropout(config.enhancer_dropout)

    def forward(self, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        normed = self.self_attention_norm(text)
        text = text + self.dropout(self.self_attention(normed, normed, normed))
        normed = self.mvfuser_norm(text)
        # The scan is causal: the text is placed before and after the image, so that each conditions the other.
        mixed = self.mvfuser(torch.cat([normed, visual, normed], dim=1))  # (B, K + N + K, C)
        num_classes = text.shape[1]
        text = text + mixed[:, :num_classes] + mixed[:, -num_classes:]
        return text + self.dropout(self.mlp(self.mlp_norm(text)))


class MTEnhancer(nn.Module):
    """Conditions the class embeddings on the image (section 3.3)."""

    def __init__(self, config: MFuserConfig, embedding_size: int):
        super().__init__()
        size = config.enhancer_hidden_size
        self.visual_in_norm = nn.LayerNorm(embedding_size)
        self.visual_proj = nn.Linear(embedding_size, size)
        self.visual_out_norm = nn.LayerNorm(size)
        self.text_norm = nn.LayerNorm(embedding_size)
        self.text_proj = nn.Linear(embedding_size, size)
        self.layers = nn.ModuleList(MTEnhancerLayer(config) for _ in range(config.enhancer_num_layers))
        self.out_norm = nn.LayerNorm(size)
        self.out_proj = nn.Linear(size, embedding_size)
        self.gamma = nn.Parameter(torch.empty(embedding_size))
        initialised(self, gamma=init.trunc_normal_)
        # The published code re-initialises every Linear here, including those of the MVFuser (probably by accident).
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialised(module, weight=partial(init.trunc_normal_, std=0.02), bias=init.zeros_)
            elif isinstance(module, MVFuser):
                initialised(module, dt_bias=init.zeros_)

    def forward(self, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """Class embeddings (B, K, E), global and dense image embeddings (B, 1 + N, E) -> (B, K, E)."""
        visual = self.visual_out_norm(self.visual_proj(self.visual_in_norm(visual)))
        hidden_states = self.text_proj(self.text_norm(text))
        for layer in self.layers:
            hidden_states = layer(hidden_states, visual)
        return text + self.gamma * self.out_proj(self.out_norm(hidden_states))


# --- models ----------------------------------------------------------------------------------------------------------


class MFuserModel(MFuserPreTrainedModel):
    """Both encoders in lock-step with an MVFuser after each layer, class embeddings and MTEnhancer (figure 2)."""

    _can_record_outputs = {
        "attentions": [],  # declared by the encoders
        "vfm_hidden_states": [OutputRecorder(None, class_name="vfm"), OutputRecorder(MFuserFusionLayer, index=0)],
        "vlm_hidden_states": [OutputRecorder(None, class_name="vlm"), OutputRecorder(MFuserFusionLayer, index=1)],
    }

    def __init__(self, config: MFuserConfig):
        super().__init__(config)
        config.check()
        vlm_tower = VLM_TOWERS[config.vlm_config.model_type]
        embedding_size = vlm_tower.embedding_size(config)
        self.vfm: Any = VFM_TOWERS[config.vfm_config.model_type](config) if config.use_vfm else NoTower(config)
        self.vlm = vlm_tower(config)
        self.fusion_layers = nn.ModuleList(MFuserFusionLayer(config) for _ in config.layer_pairs)
        project_vfm = config.use_vfm and config.fusion_project_vfm
        self.merge_proj = nn.Linear(config.vfm_size, config.vlm_config.hidden_size) if project_vfm else nn.Identity()
        self.pyramid = MFuserPyramid(config.pyramid_channels)
        self.enhancer: Any = MTEnhancer(config, embedding_size) if config.use_enhancer else None
        self.prompts: Any = None  # `None` if the class embeddings are stored
        self.stored_class_embeddings: Any = None  # `None` if they are computed
        if config.use_text_encoder:
            self.prompts = nn.Parameter(torch.empty(1, config.text_prompt_length, config.text_config.hidden_size))
            initialised(self, prompts=init.trunc_normal_)
        else:
            self.stored_class_embeddings = nn.Parameter(torch.empty(config.num_labels, embedding_size))
            initialised(self, stored_class_embeddings=init.trunc_normal_)
        self._class_embeddings_cache = WeightsCache()
        self.post_init()
        for encoder in (*self.vfm.children(), *self.vlm.children()):  # Transformers collects only those of children
            self._no_split_modules = [*self._no_split_modules, *getattr(encoder, "_no_split_modules", ())]
        self.freeze_unused_parameters()
        if config.freeze_encoders:
            self.freeze_encoders()

    def train(self, mode: bool = True):
        super().train(mode)
        self._class_embeddings_cache.clear()
        if self.config.freeze_encoders:
            self.vfm.eval()
            self.vlm.eval()
        return self

    def class_embeddings(self) -> torch.Tensor:
        """
        Embeddings of the class names in the vision-language space, before any image -> (K, E).

        They are cached while no gradients are recorded, see [`WeightsCache`]; `train()` and `eval()` clear the cache.
        If weights are offloaded, they are only available as the output `class_embeddings`.
        """
        if self.prompts is None:
            return self.stored_class_embeddings
        sources = (self.prompts, *self.vlm.text_modules().values())
        return self._class_embeddings_cache.get(sources, self._encode_classes, self.config.class_token_ids)

    @torch.no_grad()
    def store_class_embeddings(self):
        """Stores the class embeddings as a parameter and removes the text encoder, for inference."""
        if self.prompts is None:
            return
        embeddings = self._encode_classes()
        self.stored_class_embeddings = nn.Parameter(embeddings, requires_grad=not self.config.freeze_encoders)
        self.prompts = None
        self.vlm.drop_text_encoder()
        self.config.use_text_encoder = False
        initialised(self, stored_class_embeddings=init.trunc_normal_)

    def _encode_classes(self) -> torch.Tensor:
        token_ids = torch.tensor(self.config.class_token_ids, device=self.prompts.device)
        return self.vlm.encode_text(token_ids, self.prompts)

    @capture_outputs
    def encode(self, pixel_values: torch.Tensor, **kwargs) -> MFuserEncoderOutput:
        """
        Runs both encoders in lock-step, with an MVFuser after each pair of layers (equations 2 to 4).

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Normalised with CLIP's mean and standard deviation.
            kwargs:
                `output_vfm_hidden_states`, `output_vlm_hidden_states` and `output_attentions` (`bool`).
        """
        grid = [side // self.config.patch_size for side in pixel_values.shape[-2:]]
        vfm_states, vfm_inputs = self.vfm(pixel_values)
        vlm_states, vlm_inputs = self.vlm(pixel_values)
        if self.training and self.fusion_layers[0].gradient_checkpointing:
            # Reentrant checkpoints need an input with a gradient; embeddings of frozen encoders have none.
            vlm_states.requires_grad_(True)
        drop_path_rates = self.config.vlm_drop_path_rates(self.training)
        fused_maps = []
        vfm_start, vlm_start = 0, 0
        for index, (vfm_end, vlm_end) in enumerate(self.config.layer_pairs):
            run_vfm: Callable = partial(self.vfm.run_layers, range(vfm_start, vfm_end), vfm_inputs)
            run_vlm: Callable = partial(self.vlm.run_layers, range(vlm_start, vlm_end), vlm_inputs, drop_path_rates)
            if not self.config.freeze_encoders:  # gradient checkpointing recomputes each trained layer alone
                vfm_states, vlm_states = run_vfm(vfm_states), run_vlm(vlm_states)
                run_vfm = run_vlm = nn.Identity()
            vfm_states, vlm_states = self.fusion_layers[index](vfm_states, vlm_states, run_vfm, run_vlm)
            vfm_start, vlm_start = vfm_end, vlm_end
            if index + 1 in self.config.fusion_out_layers:
                patches = [states[:, -grid[0] * grid[1] :] for states in (vfm_states, vlm_states)]
                fused_maps.append(torch.cat(patches, dim=-1).transpose(1, 2).unflatten(-1, grid))  # (B, Dv + D, h, w)
        return MFuserEncoderOutput(vfm_states, vlm_states, tuple(fused_maps))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        class_embeddings: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        output_feature_maps: bool = True,
    ) -> MFuserModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Normalised with CLIP's mean and standard deviation. Pixels beyond the last whole patch are ignored.
            class_embeddings (`torch.Tensor` of shape `(K, E)`, *optional*):
                Replaces [`~MFuserModel.class_embeddings`].
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*):
                Whether to return the tokens of both encoders, or the indices of those to return. Defaults to
                `config.output_hidden_states`.
            output_attentions (`bool`, *optional*):
                Whether to return the attention weights of both encoders, which eager attention alone computes.
                Defaults to `config.output_attentions`.
            output_feature_maps (`bool`, *optional*, defaults to `True`):
                Whether to compute the feature pyramid.
        """
        self.check_pixels(pixel_values)
        if class_embeddings is None:
            class_embeddings = self.class_embeddings()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        encoded = self.encode(
            pixel_values,
            output_vfm_hidden_states=output_hidden_states is not False,
            output_vlm_hidden_states=output_hidden_states is not False,
            output_attentions=output_attentions,
            return_dict=True,
        )
        vfm_attentions, vlm_attentions = attentions_by_encoder(encoded.attentions, self.config.layer_pairs)
        global_embedding, dense_embedding = self._merge(encoded.vfm_last_hidden_state, encoded.vlm_last_hidden_state)
        text = class_embeddings.expand(pixel_values.shape[0], -1, -1)
        if self.enhancer is not None:
            text = self.enhancer(text, torch.cat([global_embedding, dense_embedding], dim=1))
        dense_embedding = dense_embedding.to(text.device)
        score_map = F.normalize(text, dim=-1) @ F.normalize(dense_embedding, dim=-1).transpose(1, 2)  # (B, K, h * w)
        grid = encoded.fused_maps[0].shape[-2:]
        feature_maps = None
        if output_feature_maps:
            feature_maps = tuple(level.feature_map() for level in self.pyramid(encoded.fused_maps))
        return MFuserModelOutput(
            last_hidden_state=encoded.vlm_last_hidden_state,
            pooler_output=global_embedding[:, 0],
            fused_maps=encoded.fused_maps,
            feature_maps=feature_maps,
            class_embeddings=class_embeddings,
            global_embedding=global_embedding,
            dense_embedding=dense_embedding.transpose(1, 2).unflatten(-1, grid),
            text_embeddings=text,
            score_map=score_map.unflatten(-1, grid),
            hidden_states=selected_states(encoded.vlm_hidden_states, output_hidden_states),
            vfm_hidden_states=selected_states(encoded.vfm_hidden_states, output_hidden_states),
            attentions=vlm_attentions,
            vfm_attentions=vfm_attentions,
        )

    def _merge(self, vfm_states: torch.Tensor, vlm_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Last tokens of both encoders -> global (B, 1, E) and dense (B, h * w, E) embeddings."""
        if not self.config.use_vfm:
            return self.vlm.merge(vlm_states, torch.zeros_like(vlm_states))
        if self.vlm.merges_normalised_vfm:
            vfm_states = self.vfm.final_norm(vfm_states)
        # Register tokens, and the class token with SigLIP, have no counterpart in the vision-language model.
        num_patches = vlm_states.shape[1] - self.vlm.num_class_tokens
        vfm_states = torch.cat([vfm_states[:, : self.vlm.num_class_tokens], vfm_states[:, -num_patches:]], dim=1)
        return self.vlm.merge(vlm_states, self.merge_proj(vfm_states))


class MFuserForSemanticSegmentation(MFuserPreTrainedModel):
    """MFuser with its text-queried mask decoder: class scores of every pixel, and the training loss."""

    def __init__(self, config: MFuserConfig):
        super().__init__(config)
        self.mfuser = MFuserModel(config)
        embedding_size = VLM_TOWERS[config.vlm_config.model_type].embedding_size(config)
        self.pixel_decoder = MFuserPixelDecoder(config, config.pyramid_channels, embedding_size)
        self.decoder = MFuserDecoder(config, embedding_size)
        self.criterion = MFuserLoss(config)
        self.post_init()
        if config.freeze_encoders:
            self.freeze_encoders()

    def set_class_names(self, class_names: list[str], tokenizer=None, class_token_length: int | None = None):
        """
        Replaces the classes by others, without training; to train them, give `class_names` to `from_pretrained`.

        The queries are computed from the embeddings of the new names. The parameters per class (two position
        embeddings and a row of the class head) are those of the trained class whose name is equal or most similar.
        Each query then contributes only to the score of its own class, since the class head cannot distinguish new
        classes. Names close to trained ones work best; objects that were background in training are not found.

        Args:
            class_names (`list[str]`):
                The new classes, in the order of their labels.
            tokenizer, class_token_length:
                See [`~MFuserPreTrainedModel.from_pretrained`].

        Raises:
            ValueError: If the model has no text encoder, or names or tokenizer cannot be used.
        """
        if self.mfuser.prompts is None:
            raise ValueError(
                "set_class_names needs a text encoder; this model stores its class embeddings instead "
                "(use_text_encoder=False)"
            )
        give_classes(self, class_names, tokenizer, class_token_length, queries_vote_for_own_class=True)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        class_mask: torch.Tensor | None = None,
        output_confidence: bool = False,
    ) -> MFuserForSemanticSegmentationOutput:
        """
        In evaluation mode, an image larger than `config.crop_size` is segmented by sliding windows.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Normalised with CLIP's mean and standard deviation.
            labels (`torch.Tensor` of shape `(B, H, W)`, *optional*):
                Class ids; `config.semantic_loss_ignore_index` where unknown.
            output_hidden_states, output_attentions (*optional*):
                See [`MFuserModel.forward`]; not available for an image segmented by windows.
            class_mask (`torch.Tensor` of shape `(B, num_labels)`, *optional*):
                The classes that the source of each image labels, as booleans; the others do not contribute to the
                loss. By default all.
            output_confidence (`bool`, *optional*, defaults to `False`):
                Whether to return the confidence of every pixel, see [`confidence_map`]. It is calibrated if
                `config.confidence_temperature` is set.

        Returns:
            [`MFuserForSemanticSegmentationOutput`]: Scores `(B, num_labels, H, W)` and, if they are requested, the
            loss and its parts, confidences, hidden states and attentions.

        Raises:
            ValueError: If `pixel_values` or `labels` have another shape or type, `labels` hold other ids, or an output
                is requested that an image of several windows does not have.

        Example:

        ```python
        >>> outputs = model(**processor(image, return_tensors="pt"))
        >>> maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(height, width)])
        ```
        """
        self.check_pixels(pixel_values)
        if labels is not None and labels.shape[-2:] != pixel_values.shape[-2:]:
            raise ValueError(
                f"labels have {tuple(labels.shape[-2:])} pixels and pixel_values {tuple(pixel_values.shape[-2:])}; an "
                "image needs labels of its own size"
            )
        if not self.training and max(pixel_values.shape[-2:]) > self.config.crop_size:
            for name, value in (
                ("output_hidden_states", output_hidden_states),
                ("output_attentions", output_attentions),
            ):
                if (getattr(self.config, name) if value is None else value) is not False:
                    raise ValueError(
                        f"{name} is not available for an image of {pixel_values.shape[-2]} x "
                        f"{pixel_values.shape[-1]}, which is segmented by windows of {self.config.crop_size} with "
                        "outputs of their own: pass it crop by crop"
                    )
            outputs = self._forward_by_windows(pixel_values, labels, class_mask)
        else:
            features = self.mfuser(
                pixel_values,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                output_feature_maps=False,
                return_dict=True,
            )
            outputs = self.decode(features, pixel_values.shape[-2:], labels, class_mask)
        if output_confidence:
            outputs["confidence"] = confidence_map(outputs.logits, self.config.confidence_temperature)
        return outputs

    def decode(
        self,
        features: MFuserModelOutput,
        size: tuple[int, ...],
        labels: torch.Tensor | None = None,
        class_mask: torch.Tensor | None = None,
    ) -> MFuserForSemanticSegmentationOutput:
        """
        The mask decoder (section 3.4): scores of size `size`, and with `labels` the loss.

        Args:
            features ([`MFuserModelOutput`]):
                Output of [`MFuserModel`] for images of at most one window.
            size (`tuple[int, int]`):
                (height, width) of the scores, that of the images.
            labels, class_mask (*optional*):
                See [`forward`].
        """
        levels = self.mfuser.pyramid(features.fused_maps)
        mask_features, memory = self.pixel_decoder(levels, features.text_embeddings)
        predictions = self.decoder(features.text_embeddings, mask_features, memory)
        loss = components = None
        if labels is not None:
            class_logits, mask_logits = (torch.stack(logits) for logits in zip(*predictions, strict=True))
            components = self.criterion(class_logits, mask_logits, features.score_map, labels, class_mask)
            loss = torch.stack(list(components.values())).sum()
        class_logits, mask_logits = predictions[-1]
        return MFuserForSemanticSegmentationOutput(
            loss=loss,
            logits=self.segmentation_scores(class_logits, mask_logits, size),
            class_queries_logits=class_logits,
            masks_queries_logits=mask_logits,
            score_map=features.score_map,
            hidden_states=features.hidden_states,
            vfm_hidden_states=features.vfm_hidden_states,
            attentions=features.attentions,
            vfm_attentions=features.vfm_attentions,
            loss_components=components,
        )

    def _forward_by_windows(self, pixel_values, labels, class_mask):
        height, width = pixel_values.shape[-2:]
        config = self.config
        config.check_windows()  # fields may be set after loading
        together = windows_per_batch(pixel_values, config, self.dtype)

        class_embeddings = None  # computed with the first windows, for all

        def segment(crops, crop_labels):
            nonlocal class_embeddings
            features = self.mfuser(
                crops,
                class_embeddings,
                output_hidden_states=False,
                output_attentions=False,
                output_feature_maps=False,
                return_dict=True,
            )
            class_embeddings = features.class_embeddings
            outputs = self.decode(features, crops.shape[-2:], crop_labels, class_mask)
            logits: torch.Tensor = outputs.logits  # type: ignore[assignment]  # always present
            return logits.to(pixel_values.device), outputs.loss_components

        windows = sliding_windows(height, width, config.crop_size, config.crop_stride)
        scores, components = average_over_windows(segment, pixel_values, labels, windows, config.num_labels, together)
        loss = None if components is None else torch.stack(list(components.values())).sum()
        return MFuserForSemanticSegmentationOutput(loss=loss, logits=scores, loss_components=components)

    def segmentation_scores(self, class_logits: torch.Tensor, mask_logits: torch.Tensor, size) -> torch.Tensor:
        """Sum over queries of class probability times mask probability, resized -> (B, K, *size) in float32."""
        classes, masks = class_logits.float().softmax(dim=-1), mask_logits.float().sigmoid()
        if self.config.queries_vote_for_own_class:
            scores = (1 - classes[..., -1])[..., None, None] * masks
        else:
            scores = torch.einsum("bqk,bqhw->bkhw", classes[..., :-1], masks)
        return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def augmented_scores(
        self, pixel_values: torch.Tensor, scales: tuple[float, ...] = (1.0,), flip: bool = True
    ) -> torch.Tensor:
        """
        Test-time augmentation: the mean over scales and flips of the softmax over classes of the scores.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Normalised with CLIP's mean and standard deviation.
            scales (`tuple[float, ...]`, *optional*, defaults to `(1.0,)`):
                Factors on the size of the image; the paper's are 0.5, 0.75, 1, 1.25, 1.5 and 1.75.
            flip (`bool`, *optional*, defaults to `True`):
                Whether to add the horizontally flipped image.

        Returns:
            `torch.Tensor` of shape `(B, K, H, W)`
        """
        segment = partial(self.__call__, return_dict=True)
        return average_over_augmentations(lambda pixels: segment(pixels).logits, pixel_values, scales, flip)


__all__ = ["MFuserForSemanticSegmentation", "MFuserModel", "MFuserPreTrainedModel"]

MFuserModel.register_for_auto_class("AutoModel")
MFuserForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
