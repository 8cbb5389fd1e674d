"""Configurations of EVA02-CLIP and of its two towers."""

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, PreTrainedConfig

if TYPE_CHECKING:
    # After `__post_init__` these fields are set; the class of a sub-configuration depends on its `model_type`.
    SubConfig = Any
    DerivedSize = Any
else:
    # `@strict` checks arguments by these types.
    SubConfig = dict | PreTrainedConfig | None
    DerivedSize = int | None

# 4 * 2 / 3, because a SwiGLU has three matrices instead of two; rounded as in the published models.
SWIGLU_RATIO = 2.6667


def _require_positive(config: PreTrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}: {name} is {getattr(config, name)}; it must be positive")


@strict
class Eva02ClipVisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`Eva02ClipVisionModel`]. The defaults are EVA02-CLIP-L/14-336.

    Args:
        hidden_size (`int`, *optional*, defaults to 1024):
            Dimension of the tokens. Each head has a multiple of 4 channels, because pairs are rotated on two axes.
        intermediate_size (`int`, *optional*):
            Dimension of the SwiGLU. Defaults to `int(hidden_size * 2.6667)`, as in all published models.
        projection_dim (`int`, *optional*, defaults to 768):
            Dimension of the shared embedding space.
        num_hidden_layers (`int`, *optional*, defaults to 24):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of attention heads.
        num_channels (`int`, *optional*, defaults to 3):
            Number of image channels.
        image_size (`int`, *optional*, defaults to 336):
            Image size of the position embeddings, of which there are `(image_size // patch_size) ** 2 + 1`. They are
            interpolated for other image sizes.
        patch_size (`int`, *optional*, defaults to 14):
            Size of a patch.
        rope_theta (`float`, *optional*, defaults to 10000):
            Base of the rotary frequencies.
        rope_pretrained_grid (`int`, *optional*, defaults to 16):
            Number of patches per side in the masked image pretraining. Rotary positions are scaled to this range for
            every grid. It is 16 for all published models, including L/14-336.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of all norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of newly initialised weights.

    Raises:
        ValueError: If a value is out of range or the values are inconsistent.
    """

    model_type = "eva02_clip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: DerivedSize = None
    projection_dim: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    rope_theta: int | float = 10000.0
    rope_pretrained_grid: int = 16
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = int(self.hidden_size * SWIGLU_RATIO)
        super().__post_init__(**kwargs)
        self.check()

    def check(self):
        """Raises `ValueError` if a value is out of range or the values are inconsistent."""
        _require_positive(
            self,
            (
                "hidden_size",
                "intermediate_size",
                "projection_dim",
                "num_hidden_layers",
                "num_attention_heads",
                "num_channels",
                "patch_size",
                "rope_theta",
                "rope_pretrained_grid",
                "layer_norm_eps",
            ),
        )
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of 4 * num_attention_heads "
                f"({4 * self.num_attention_heads}), because pairs of channels are rotated on two axes"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size is {self.image_size}; it must be at least patch_size ({self.patch_size})")


@strict
class Eva02ClipTextConfig(CLIPTextConfig):
    r"""
    Configuration of [`Eva02ClipTextModel`]: a [`CLIPTextConfig`] with the sizes of EVA02-CLIP-L. Unlike OpenAI's CLIP,
    the text tower uses the exact GELU. The output at `eos_token_id` represents the text.

    Raises:
        ValueError: If a value is out of range or the values are inconsistent.
    """

    model_type = "eva02_clip_text_model"
    base_config_key = "text_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_attention_heads: int = 12
    hidden_act: str = "gelu"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()

    def check(self):
        """Raises `ValueError` if a value is out of range or the values are inconsistent."""
        _require_positive(
            self,
            (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "projection_dim",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
            ),
        )
        if not (isinstance(self.eos_token_id, int) and 0 <= self.eos_token_id < self.vocab_size):
            raise ValueError(
                f"eos_token_id is {self.eos_token_id}; it must be a token of the vocabulary (0 to "
                f"{self.vocab_size - 1}), because its output represents the text"
            )


@strict
class Eva02ClipConfig(PreTrainedConfig):
    r"""
    Configuration of [`Eva02ClipModel`]. The defaults are EVA02-CLIP-L/14-336.

    Args:
        vision_config (`dict` or [`Eva02ClipVisionConfig`], *optional*):
            Configuration of the vision tower.
        text_config (`dict` or [`Eva02ClipTextConfig`], *optional*):
            Configuration of the text tower.
        projection_dim (`int`, *optional*, defaults to 768):
            Dimension of the shared embedding space. It must equal the `projection_dim` of both towers.
        logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
            Initial value of the learned logit scale, ln(1 / 0.07).

    Raises:
        ValueError: If the towers have different projection dimensions.
    """

    model_type = "eva02_clip"
    sub_configs = sub_configs_defaults = {"vision_config": Eva02ClipVisionConfig, "text_config": Eva02ClipTextConfig}

    vision_config: SubConfig = None
    text_config: SubConfig = None
    projection_dim: int = 768
    logit_scale_init_value: int | float = 2.6592

    def __post_init__(self, **kwargs):
        for name, config_class in (("vision_config", Eva02ClipVisionConfig), ("text_config", Eva02ClipTextConfig)):
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**{"projection_dim": self.projection_dim, **(value or {})}))
        super().__post_init__(**kwargs)
        self.check()

    def check(self):
        """Raises `ValueError` if a value is out of range or the values are inconsistent."""
        for name in ("vision_config", "text_config"):
            if getattr(self, name).projection_dim != self.projection_dim:
                raise ValueError(
                    f"{name}.projection_dim is {getattr(self, name).projection_dim}; it must be projection_dim "
                    f"({self.projection_dim}), because images and texts share an embedding space"
                )


__all__ = ["Eva02ClipConfig", "Eva02ClipTextConfig", "Eva02ClipVisionConfig"]

Eva02ClipVisionConfig.register_for_auto_class()
Eva02ClipTextConfig.register_for_auto_class()
Eva02ClipConfig.register_for_auto_class()
