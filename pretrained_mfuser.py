"""From two pretrained encoders to the parts of an MFuser: class names to token ids, grids and kernels resampled."""

from .configuration_mfuser import CLASS_TOKEN_LENGTH


def class_token_ids(class_names: list[str], tokenizer, length: int = CLASS_TOKEN_LENGTH) -> list[list[int]]:
    """
    One row of token ids a class name: start (where the tokenizer has one), name, end, padding.

    CLIP's rows are padded with 0 as in the published models; text after the end token is never looked at. SigLIP reads
    its embedding off the last position, padding or not, so there it is the tokenizer's own padding.

    Raises:
        ValueError: names that need more than `length` tokens, with what they need.
    """
    rows = [tokenizer(name)["input_ids"] for name in class_names]
    needed = max(len(row) for row in rows)
    if needed > length:
        longest = [
            f"{name!r} needs {len(row)}" for name, row in zip(class_names, rows, strict=True) if len(row) > length
        ]
        raise ValueError(
            f"class names longer than {length} tokens: {', '.join(longest)}; give shorter names or "
            f"class_token_length={needed}"
        )
    padding = 0 if tokenizer.bos_token_id is not None else tokenizer.pad_token_id
    return [row + [padding] * (length - len(row)) for row in rows]
