"""MFuser: a vision and a vision-language foundation model, fused by Mamba, for segmentation that generalises.

Names are imported on first use, so `import mfuser` costs nothing and needs neither torch nor transformers.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "MFuserConfig": "configuration_mfuser",
    "MFuserModel": "modeling_mfuser",
    "MFuserForSemanticSegmentation": "modeling_mfuser",
    "MFuserImageProcessor": "image_processing_mfuser",
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
