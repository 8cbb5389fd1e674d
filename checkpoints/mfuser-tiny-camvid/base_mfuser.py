"""What both models share as Transformers models: loading, saving, two pretrained encoders, and which parts train."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.utils import logging

from .class_names_mfuser import CITYSCAPES_CLASSES, checked_class_names, requested_classes
from .configuration_mfuser import MFuserConfig
from .frozen_encoders_mfuser import ModelWithFrozenEncoders
from .pretrained_mfuser import check_finite, load_pretrained_encoders, load_towers

logger = logging.get_logger(__name__)


class MFuserPreTrainedModel(ModelWithFrozenEncoders):
    config: MFuserConfig
    base_model_prefix = "mfuser"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer would divide the loss by the number of pixels
    _no_split_modules = [
        "MFuserDinov2Embeddings",
        "MFuserDinov2WithRegistersEmbeddings",
        "MFuserCLIPVisionEmbeddings",
        "MFuserSiglipVisionEmbeddings",
        "MFuserSiglip2VisionEmbeddings",
        "MFuserFusionLayer",
        "MFuserPyramid",
        "MTEnhancer",
        "MFuserPixelDecoder",
        "MFuserDecoder",
    ]
    _keep_in_fp32_modules_strict = ["A_log"]
    _supports_sdpa = True
    _supports_flash_attn = False  # the decoder's masks differ between queries; encoders alone can use it
    _supports_attention_backend = True
    _can_record_outputs: dict[str, list] = {"attentions": []}  # declared by the encoders

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, class_names=None, tokenizer=None, class_token_length=None, **kwargs
    ):
        """
        See [`ModelWithFrozenEncoders.from_pretrained`]. Frozen encoders are frozen again; loading unfreezes them.
        Weights that are not finite are an error.

        Other classes are given by `class_names`, or by `id2label` or `config` with `ignore_mismatched_sizes=True`. A
        warning names the origin of each, see `replace_classes`. The model is then meant to be fine-tuned; with
        `queries_vote_for_own_class=True` it scores as after `set_class_names`, without training.

        Args:
            class_names (`list[str]`, *optional*):
                The classes, in the order of the labels. Defaults to the saved ones.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*):
                Tokenizer of the text encoder, or its folder or Hub id. Defaults to that in the folder of the model.
            class_token_length (`int`, *optional*):
                Token positions per class name. Defaults to the saved number.
        """
        path, new = pretrained_model_name_or_path, (class_names, tokenizer, class_token_length)
        requested = requested_classes(cls.config_class, path, kwargs, *new)
        loaded = super().from_pretrained(path, *args, **kwargs)
        model, report = loaded if isinstance(loaded, tuple) else (loaded, None)
        check_finite(model.state_dict(), "the checkpoint" if path is None else str(path))
        model.freeze_unused_parameters()
        if model.config.freeze_encoders:
            model.freeze_encoders()
        if requested is not None:
            requested.give_to(model, report)
        return loaded

    def save_pretrained(self, *args, **kwargs):
        """See [`ModelWithFrozenEncoders.save_pretrained`]. The folder of either class loads with `AutoModel`."""
        self.config.auto_map = {"AutoModel": "modeling_mfuser.MFuserModel"}
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_vfm_vlm_pretrained(
        cls,
        vfm: str,
        vlm: str,
        class_names: Sequence[str] = CITYSCAPES_CLASSES,
        tokenizer=None,
        vfm_revision: str | None = None,
        vlm_revision: str | None = None,
        **kwargs,
    ) -> "MFuserPreTrainedModel":
        """
        Builds a model of two pretrained encoders; its fusion and decoder have initial values and need training.

        Position embeddings and patch kernels are resampled once, as in the published code. A warning lists them.

        Args:
            vfm (`str`):
                Folder or Hub id of a DINOv2 (with or without registers) or DINOv3 ViT of any size.
            vlm (`str`):
                Folder or Hub id of a CLIP, SigLIP, SigLIP 2 or EVA02-CLIP model.
            class_names (`list[str]`, *optional*):
                Class names in the order of the labels. Defaults to the 19 classes of Cityscapes.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*):
                Tokenizer of the vision-language model, or its folder or Hub id. Defaults to that of `vlm`.
            vfm_revision, vlm_revision (`str`, *optional*):
                Branch, tag or commit of `vfm` and `vlm` on the Hub. Only a commit never changes.
            crop_size (`int`, *optional*, defaults to 512):
                Side of the training crops and of the sliding windows, in pixels.
            patch_size (`int`, *optional*):
                Side of the patches, in pixels. Defaults to 16, with EVA02-CLIP to that of `vlm`.
            class_token_length (`int`, *optional*, defaults to 5):
                Token positions per class name, start and end included.
            kwargs:
                Other fields of [`MFuserConfig`].

        Raises:
            ValueError: If the encoders cannot be paired, weights are missing, or class names repeat, are empty or are
                too long.
        """
        class_names = checked_class_names(class_names)
        revisions = {"vfm": vfm_revision, "vlm": vlm_revision}
        encoders = load_pretrained_encoders(vfm, vlm, revisions)
        config = encoders.model_config(class_names, tokenizer, **kwargs)
        model = cls(config)
        notes = load_towers(model.base_model, encoders)
        model.encoders = {
            key: str(name) if revisions[key] is None else {"name_or_path": str(name), "revision": revisions[key]}
            for key, name in (("vfm", vfm), ("vlm", vlm))
        }
        summary = "".join(f"\n- {note}" for note in notes)
        logger.warning(
            f"MFuser was built from {vfm} and {vlm}; its fusion and decoder are newly initialised and need "
            f"training.{summary}"
        )
        return model.eval()

    def freeze_encoders(self):
        """Disables the gradients of both encoders and of the text encoder, and keeps them in evaluation mode."""
        model = self.base_model
        model.config.freeze_encoders = True
        for tower in (model.vfm, model.vlm):
            tower.requires_grad_(False).eval()
        if model.stored_class_embeddings is not None:
            model.stored_class_embeddings.requires_grad_(False)

    def freeze_unused_parameters(self):
        """
        Disables the gradients of encoder parameters that no output depends on, since `DistributedDataParallel` waits
        for every gradient: layers after the last MVFuser, mask tokens, with CLIP the last norm of the vision
        foundation model and, with SigLIP and no MTEnhancer, the probe that pools an image.
        """
        model = self.base_model
        last_vfm, last_vlm = model.config.layer_pairs[-1]
        unused = [*model.vfm.layers[last_vfm:], *model.vlm.layers[last_vlm:]]
        if not model.vlm.merges_normalised_vfm:
            unused.append(model.vfm.final_norm)
        for module in unused:
            module.requires_grad_(False)
        tokens = [getattr(model.vfm.vision.embeddings, "mask_token", None)] if model.config.use_vfm else []
        if model.enhancer is None:
            tokens.append(getattr(getattr(model.vlm.vision, "head", None), "probe", None))
        for token in tokens:
            if token is not None:
                token.requires_grad_(False)

    def check_pixels(self, pixel_values: torch.Tensor):
        """Raises `ValueError` unless `pixel_values` is a floating-point batch of images of at least one patch."""
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "torch.jit.trace, and torch.onnx.export with dynamo=False, cannot capture this model; use "
                "`mfuser export`, torch.export.export or torch.onnx.export with dynamo=True"
            )
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            given = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise ValueError(
                f"pixel_values are {given}; they must be a floating-point tensor of normalised images, as the image "
                "processor returns"
            )
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must have shape (batch, 3, height, width), not {tuple(pixel_values.shape)}"
            )
        if min(pixel_values.shape[-2:]) < self.config.patch_size:
            raise ValueError(
                f"pixel_values hold images of {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels; both sides "
                f"must be at least one patch, {self.config.patch_size} pixels"
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.vlm.vision.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module):
        self.base_model.vlm.vision.embeddings.patch_embedding = value

    @classmethod
    def is_custom_code(cls) -> bool:
        # For custom code, Transformers skips modules that initialise the weights of their submodules, as the encoders'
        # attention does. This is unnecessary, since `_init_weights` does not change loaded weights.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        initial_values = getattr(module, "initial_values", {})
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            module.reset_parameters()
        elif not initial_values:
            super()._init_weights(module)
        for name, fill in initial_values.items():
            if (parameter := getattr(module, name)) is not None:
                fill(parameter)
