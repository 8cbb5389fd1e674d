"""Class names: the lists that are shared, names as the token ids of the text encoder, and similar names."""

import torch
from torch.nn import functional as F

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

# Label of pixels without a class. They enter no loss and no score.
IGNORE_INDEX = 255

# The tokens of `CITYSCAPES_CLASSES` in the vocabulary of CLIP and EVA02-CLIP, without start and end.
CITYSCAPES_CLIP_TOKENS = (
    (1759,), (23278,), (2307,), (2569,), (12679,), (8170,), (3399, 1395), (3399, 2292), (33947,), (20184,),
    (2390,), (2533,), (9707,), (1615,), (4629,), (2840,), (3231,), (10297,), (11652,),
)  # fmt: skip

CLIP_START_TOKEN, CLIP_END_TOKEN, CLIP_PADDING = 49406, 49407, 0
CLASS_TOKEN_LENGTH = 5  # positions of a class name in the published models: start, name, end, padding


def clip_token_row(name_tokens: tuple[int, ...] | list[int], length: int = CLASS_TOKEN_LENGTH) -> list[int]:
    """Start token, `name_tokens`, end token and zero padding up to `length`, as CLIP and EVA02-CLIP take a name."""
    row = [CLIP_START_TOKEN, *name_tokens, CLIP_END_TOKEN]
    if len(row) > length:
        raise ValueError(
            f"class_token_length is {length}, but a class name of {len(name_tokens)} tokens needs at least {len(row)}"
        )
    return row + [CLIP_PADDING] * (length - len(row))


def class_token_ids(class_names: list[str], tokenizer, length: int = CLASS_TOKEN_LENGTH) -> list[list[int]]:
    """
    Tokenizes class names, one row of `length` ids per name: start (if the tokenizer has one), name, end, padding.

    Tokenizers with a start token (CLIP, EVA02-CLIP) get 0 as padding, as in the published models, since the text
    embedding is read at the end token. SigLIP's is read at the last position, so its rows keep the tokenizer's own
    padding.

    Args:
        class_names (`list[str]`): The names, in the order of the labels.
        tokenizer ([`PreTrainedTokenizerBase`]): The tokenizer of the vision-language model.
        length (`int`, defaults to 5): Token positions per name.

    Raises:
        ValueError: A name needs more than `length` tokens.
    """
    rows = [list(tokenizer(name)["input_ids"]) for name in class_names]
    needed = max(len(row) for row in rows)
    if needed > length:
        too_long = [
            f"{name!r} needs {len(row)}" for name, row in zip(class_names, rows, strict=True) if len(row) > length
        ]
        raise ValueError(
            f"class names longer than {length} tokens: {', '.join(too_long)}; give shorter names or "
            f"class_token_length={needed}"
        )
    has_start_token = all(row[0] == tokenizer.bos_token_id for row in rows)
    padding = CLIP_PADDING if has_start_token else tokenizer.pad_token_id
    return [row + [padding] * (length - len(row)) for row in rows]


def nearest_classes(embeddings: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """For each class embedding (N, E), the index of the most similar one among `known` (K, E), by cosine -> (N,)."""
    return (F.normalize(embeddings, dim=-1) @ F.normalize(known, dim=-1).T).argmax(dim=-1)
