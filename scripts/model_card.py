"""Writes the model card, the README.md of a model folder."""

from pathlib import Path

from mfuser.configuration_mfuser import MFuserConfig
from mfuser.files import write_text

ENCODER_NAMES = {
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3",
    "clip_vision_model": "CLIP",
    "eva02_clip_vision_model": "EVA02-CLIP",
    "siglip_vision_model": "SigLIP",
    "siglip2_vision_model": "SigLIP 2",
}

CARD = """\
---
library_name: transformers
pipeline_tag: image-segmentation
license: apache-2.0
tags:
- image-segmentation
- semantic-segmentation
- domain-generalization
- mamba
- custom_code
---

# {title}

{about}

{encoders}, fused by Mamba, with a Mask2Former-style decoder whose queries are class names: MFuser, "Mamba as a Bridge"
(CVPR 2025, [arXiv 2504.03193](https://arxiv.org/abs/2504.03193)). {num_labels} classes: {classes}.

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model="{folder}", trust_remote_code=True)
segment("street.jpg")
```

Images larger than {crop} pixels are segmented in sliding windows of {crop} pixels with a stride of {stride}. The
licences of the encoders and of the training data apply as well.
"""


def write_model_card(folder: Path, config: MFuserConfig, title: str, about: str) -> None:
    """
    Writes `README.md` into a model folder.

    Args:
        folder (`Path`):
            The model folder. Its name is used in the example of the card.
        config (`MFuserConfig`):
            Configuration of the model.
        title (`str`):
            Heading of the card.
        about (`str`):
            A paragraph on the origin of the weights and their intended use.
    """
    parts = (config.vfm_config, config.vlm_config) if config.use_vfm else (config.vlm_config,)
    encoders = [ENCODER_NAMES.get(part.model_type, part.model_type) for part in parts]
    card = CARD.format(
        title=title,
        about=about,
        encoders=" and ".join(encoders),
        num_labels=config.num_labels,
        classes=", ".join(config.id2label[index] for index in range(config.num_labels)),
        folder=folder.name,
        crop=config.crop_size,
        stride=config.crop_stride,
    )
    write_text(folder / "README.md", card)
