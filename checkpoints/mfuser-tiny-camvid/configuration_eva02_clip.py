"""Configuration of EVA02-CLIP: its vision tower, its text tower, and both together."""

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, PreTrainedConfig

# SwiGLU has three matrices in place of two: 4 * 2 / 3, with the digits that the published models were built with.
SWIGLU_RATIO = 2.6667


def _require_positive(config: PreTrainedConfig, names: tuple[str, ...]) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}: {name} must be positive, got {getattr(config, name)}")


@strict
class Eva02ClipVisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`Eva02ClipVisionModel`]. The defaults are EVA02-CLIP-L/14-336.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads:
            Width, depth and heads. The width of a head is a multiple of 4: pairs of channels on two axes.
        intermediate_size (`int`, *optional*):
            Width inside the SwiGLU; `int(hidden_size * 2.6667)` by default, as in every published model.
        projection_dim (`int`, defaults to 768):
            Width of the space that images and texts share.
        image_size, patch_size, num_channels:
            Side in pixels of the image that the position table was made for, side of a patch, colour channels. The
            table has `(image_size // patch_size) ** 2 + 1` rows; other image sizes interpolate it.
        rope_theta (`float`, defaults to 10000):
            Base of the rotary frequencies.
        rope_pretrained_grid (`int`, defaults to 16):
            Rotary positions run from 0 to this number over a grid of any size: the side, in patches, of the grid that
            the masked-image pre-training saw (16 for every published model, B/16 and L/14-336 too).
        layer_norm_eps (`float`, defaults to 1e-6): Of every norm, the inner ones included.
        initializer_range (`float`, defaults to 0.02): Standard deviation of fresh weights.

    Raises:
        ValueError: values that can't work together, with what would.
    """

    model_type = "eva02_clip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int | None = None
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
        """Raises `ValueError` for values that can't work together."""
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
                f"hidden_size {self.hidden_size} must be a multiple of 4 * num_attention_heads "
                f"({4 * self.num_attention_heads}): the rotary embedding turns pairs of channels on two axes"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size}")


@strict
class Eva02ClipTextConfig(CLIPTextConfig):
    r"""
    Configuration of [`Eva02ClipTextModel`]: a [`CLIPTextConfig`] with the numbers of EVA02-CLIP-L, of which only the
    exact GELU differs in kind from OpenAI's CLIP. `eos_token_id` is the token whose output stands for the text.

    Raises:
        ValueError: values that can't work together, with what would.
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
        """Raises `ValueError` for values that can't work together."""
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
                f"eos_token_id must be a token of the vocabulary (0 to {self.vocab_size - 1}), its output stands for "
                f"the text; got {self.eos_token_id}"
            )


@strict
class Eva02ClipConfig(PreTrainedConfig):
    r"""
    Configuration of [`Eva02ClipModel`]. The defaults are EVA02-CLIP-L/14-336.

    Args:
        vision_config, text_config (`dict` or [`PreTrainedConfig`], *optional*):
            The two towers, [`Eva02ClipVisionConfig`] and [`Eva02ClipTextConfig`].
        projection_dim (`int`, defaults to 768):
            Width of the space that images and texts share. A tower configuration that names its own must agree.
        logit_scale_init_value (`float`, defaults to 2.6592):
            Start of the learned logarithm of the inverse temperature, ln(1 / 0.07).

    Raises:
        ValueError: towers that project to different widths.
    """

    model_type = "eva02_clip"
    sub_configs = sub_configs_defaults = {"vision_config": Eva02ClipVisionConfig, "text_config": Eva02ClipTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
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
        """Raises `ValueError` for values that can't work together."""
        for name in ("vision_config", "text_config"):
            if getattr(self, name).projection_dim != self.projection_dim:
                raise ValueError(
                    f"{name}.projection_dim is {getattr(self, name).projection_dim}, but projection_dim is "
                    f"{self.projection_dim}: images and texts meet in one space, give all three the same width"
                )


__all__ = ["Eva02ClipConfig", "Eva02ClipTextConfig", "Eva02ClipVisionConfig"]

Eva02ClipVisionConfig.register_for_auto_class()
Eva02ClipTextConfig.register_for_auto_class()
Eva02ClipConfig.register_for_auto_class()
