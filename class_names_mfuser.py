"""Class names: shared lists, names as token ids of the text encoder, and the replacement of a model's classes."""

import copy
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

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

# Text encoders that read the embedding of a name at its end token.
END_TOKEN_ENCODERS = ("clip_text_model", "eva02_clip_text_model")
# Parameters with one row per class.
CLASS_TABLES = (
    "stored_class_embeddings",
    "pixel_decoder.text_position_embedding",
    "decoder.query_position_embedding",
    "decoder.predictor.class_head.weight",
    "decoder.predictor.class_head.bias",
)
# Arguments of `from_pretrained` that select a file on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that select a file on the Hub."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def clip_token_row(name_tokens: tuple[int, ...] | list[int], length: int = CLASS_TOKEN_LENGTH) -> list[int]:
    """Start token, `name_tokens`, end token and zero padding up to `length`, as CLIP and EVA02-CLIP take a name."""
    row = [CLIP_START_TOKEN, *name_tokens, CLIP_END_TOKEN]
    if len(row) > length:
        raise ValueError(
            f"class_token_length is {length}, but a class name of {len(name_tokens)} tokens needs at least {len(row)}"
        )
    return row + [CLIP_PADDING] * (length - len(row))


def class_token_ids(
    class_names: list[str], tokenizer, length: int = CLASS_TOKEN_LENGTH, limit: int | None = None
) -> list[list[int]]:
    """
    Tokenizes class names, one row of `length` ids per name: start (if the tokenizer has one), name, end, padding.

    Tokenizers with a start token (CLIP, EVA02-CLIP) get 0 as padding, as in the published models, since the text
    embedding is read at the end token. SigLIP's is read at the last position, so its rows keep the tokenizer's own
    padding.

    Args:
        class_names (`list[str]`):
            The names, in the order of the labels.
        tokenizer ([`PreTrainedTokenizerBase`]):
            The tokenizer of the vision-language model.
        length (`int`, *optional*, defaults to 5):
            Token positions per name.
        limit (`int`, *optional*):
            Largest `length` that the text encoder can take, if known.

    Raises:
        ValueError: If a name needs more than `length` tokens, or the tokenizer has no padding.
    """
    rows = [list(tokenizer(name)["input_ids"]) for name in class_names]
    needed = max(len(row) for row in rows)
    if needed > length:
        too_long = [
            f"{name!r} needs {len(row)}" for name, row in zip(class_names, rows, strict=True) if len(row) > length
        ]
        advice = f"shorter names or class_token_length={needed}"
        if limit is not None and needed > limit:
            advice = (
                f"shorter names: this text encoder has positions for {limit} tokens only. To build a new model with "
                f"more, use from_vfm_vlm_pretrained(..., class_token_length={needed})"
            )
        raise ValueError(f"class names longer than {length} tokens: {', '.join(too_long)}; give {advice}")
    has_start_token = all(row[0] == tokenizer.bos_token_id for row in rows)
    padding = CLIP_PADDING if has_start_token else tokenizer.pad_token_id
    if padding is None:
        raise ValueError("the tokenizer has neither a start token nor a padding token; it must have one of them")
    return [row + [padding] * (length - len(row)) for row in rows]


def label_names(id2label: dict) -> list[str]:
    """
    The class names in the order of their ids.

    Raises:
        ValueError: If the ids are not 0, 1, 2 and so on.
    """
    names = {int(class_id): name for class_id, name in id2label.items()}
    if sorted(names) != list(range(len(id2label))):
        raise ValueError(f"id2label has the ids {list(id2label)}; they must be 0 to {len(id2label) - 1}")
    return [names[class_id] for class_id in range(len(names))]


def checked_class_names(class_names) -> list[str]:
    """
    Returns class names as a list.

    Raises:
        ValueError: If they are not a list of different, non-empty strings. Case and surrounding spaces make no
            difference, since most tokenizers ignore them.
    """
    accepted = "it must be a list of different, non-empty names, such as ['road', 'sky']"
    if not isinstance(class_names, (list, tuple)):
        raise ValueError(f"class_names is {class_names!r}; {accepted}")
    wrong = [name for name in class_names if not (isinstance(name, str) and name.strip())]
    if wrong or not class_names:
        raise ValueError(f"class_names is {list(class_names)!r}; {accepted}")
    counts = Counter(name.strip().casefold() for name in class_names)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"class_names contains {', '.join(map(repr, repeated))} more than once; {accepted}")
    return list(class_names)


def pretrained_tokenizer(name_or_path: str | os.PathLike, **hub_kwargs) -> PreTrainedTokenizerBase:
    """
    The tokenizer in a folder or a repository of the Hub, without running code from there.

    Args:
        name_or_path (`str`):
            The folder or Hub id.
        hub_kwargs:
            Arguments for the download, such as `revision`.

    Raises:
        OSError, ValueError: If there is no tokenizer, or it needs code of its own.
    """
    return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **hub_kwargs)


def load_tokenizer(tokenizer, folder: str | None = None, **hub_kwargs) -> PreTrainedTokenizerBase:
    """
    Returns a tokenizer that is given as such, by its folder or Hub id, or as part of a saved model.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`] or `str`, *optional*):
            The tokenizer, or its folder or Hub id.
        folder (`str`, *optional*):
            Folder or Hub id of the saved model, which is used if `tokenizer` is `None`.
        hub_kwargs:
            Arguments for the download. `revision` and `subfolder` are those of `folder`.

    Raises:
        ValueError: If there is no tokenizer.
    """
    accepted = "a tokenizer of the model's text encoder, or its folder or Hub id"
    if tokenizer is None:
        if not folder or not _contains_tokenizer(folder, **hub_kwargs):
            found = f"{folder} contains none" if folder else "none was given"
            raise ValueError(f"new class names need a tokenizer, and {found}; give tokenizer={accepted}")
        tokenizer = folder
    else:
        hub_kwargs = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            return pretrained_tokenizer(tokenizer, **hub_kwargs)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"tokenizer is {str(tokenizer)!r}, which cannot be loaded as a tokenizer; it must be {accepted}"
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is of type {type(tokenizer).__name__}; it must be {accepted}")
    return tokenizer


def _contains_tokenizer(folder: str, **hub_kwargs) -> bool:
    try:
        return cached_file(folder, "tokenizer_config.json", **hub_kwargs) is not None
    except (OSError, ValueError):  # no such file, offline, or no valid id
        return False


def new_class_token_ids(
    config: PreTrainedConfig, class_names: list[str], tokenizer: PreTrainedTokenizerBase, length: int | None = None
) -> list[list[int]]:
    """
    Tokenizes new class names for a model that exists already, and checks that its text encoder can take them.

    Args:
        config ([`MFuserConfig`]):
            The configuration of the model, with the token ids of its present classes.
        class_names (`list[str]`):
            The new names.
        tokenizer ([`PreTrainedTokenizerBase`]):
            The tokenizer of the text encoder.
        length (`int`, *optional*):
            Token positions per name. Defaults to that of the present classes.

    Raises:
        ValueError: If a name is too long, or the tokenizer belongs to another text encoder.
    """
    text, present = config.text_config, config.class_token_ids
    length = len(present[0]) if length is None else length
    limit = text.max_position_embeddings - config.text_prompt_length
    if type(length) is not int or not 1 <= length <= limit:
        raise ValueError(
            f"class_token_length is {length!r}; it must be between 1 and {limit}: the text encoder has "
            f"{text.max_position_embeddings} positions, of which {config.text_prompt_length} hold context vectors. "
            "Only a new model, built by from_vfm_vlm_pretrained(..., class_token_length=...), can have more"
        )
    rows = class_token_ids(class_names, tokenizer, length, limit)
    problem = None
    for name, row in zip(class_names, rows, strict=True):
        if max(row) >= text.vocab_size:
            problem = f"it gives {name!r} the id {max(row)}, but the vocabulary has {text.vocab_size} ids"
    # CLIP and EVA02-CLIP read the embedding at the largest id, which is that of the end token.
    marks = {(row[0], max(row)) for row in present}
    found = {(row[0], max(row)) for row in rows} - marks
    if problem is None and found and len(marks) == 1 and text.model_type in END_TOKEN_ENCODERS:
        problem = f"its start and end tokens are {found.pop()}, those of the model's class names {marks.pop()}"
    if problem is not None:
        raise ValueError(
            f"the tokenizer does not belong to the text encoder, a {text.model_type}: {problem}. Give that of the "
            "vision-language model"
        )
    return rows


def nearest_classes(embeddings: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """For each class embedding (N, E), the index of the most similar one among `known` (K, E), by cosine -> (N,)."""
    return (F.normalize(embeddings, dim=-1) @ F.normalize(known, dim=-1).T).argmax(dim=-1)


def selected_rows(table: torch.Tensor, rows: torch.Tensor, initialise: Callable) -> nn.Parameter:
    """
    Rows of a table with one row per class.

    Args:
        table (`torch.Tensor` of shape `(K, ...)`):
            The table.
        rows (`torch.Tensor` of shape `(N,)`):
            Row to copy for each new class, or -1 for an initial value.
        initialise (`Callable`):
            Fills a tensor with initial values, in place.

    Returns:
        `nn.Parameter` of shape `(N, ...)`: A copy, trainable if `table` is, or if it has initial values.
    """
    copied = rows >= 0
    values = table.new_empty(len(rows), *table.shape[1:])
    if not copied.all():
        initialise(values)
    values[copied] = table[rows[copied]]
    return nn.Parameter(values, requires_grad=table.requires_grad or not bool(copied.all()))


@torch.no_grad()
def replace_classes(model: Any, class_names: list[str], token_ids: list | None = None, **config_fields) -> str:
    """
    Replaces the classes of a model, and selects what is kept of each table with one row per class.

    A class takes the rows of the class of the same name. If there is none, it takes those of the class whose name has
    the most similar text embedding, or initial values if the model has no text encoder. Everything is checked before
    anything is changed.

    Args:
        model ([`MFuserModel`] or [`MFuserForSemanticSegmentation`]):
            The model.
        class_names (`list[str]`):
            The new names, in the order of the labels.
        token_ids (`list[list[int]]`, *optional*):
            Their token ids; required by a text encoder.
        config_fields:
            Other fields of the configuration to change.

    Returns:
        `str`: The origin of each class, in words.

    Raises:
        ValueError: If the new classes and the configuration are inconsistent.
    """
    config, base = model.config, getattr(model, model.base_model_prefix, model)
    fields = {"id2label": dict(enumerate(class_names)), "class_token_ids": token_ids, **config_fields}
    fields["confidence_temperature"] = None  # it holds for the scores of the previous classes
    fields["label2id"] = {name: index for index, name in enumerate(class_names)}
    candidate = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(candidate, name, value)
    candidate.check()
    known = label_names(config.id2label)
    position = {name: index for index, name in reversed(list(enumerate(known)))}
    rows = torch.tensor([position.get(name, -1) for name in class_names], device=model.device)
    equal = rows >= 0
    if base.prompts is not None:
        embeddings = base.vlm.encode_text(torch.tensor(token_ids, device=base.prompts.device), base.prompts)
        rows = torch.where(equal, rows, nearest_classes(embeddings, base.class_embeddings()).to(rows.device))
    for name, value in fields.items():
        setattr(config, name, value)
    if base.prompts is None:
        initialise = base.initial_values["stored_class_embeddings"]
        base.stored_class_embeddings = selected_rows(base.stored_class_embeddings, rows, initialise)
    if base is not model:
        model.pixel_decoder.select_classes(rows)
        model.decoder.select_classes(rows, share_probability=config.queries_vote_for_own_class)
    groups: dict[str, list[str]] = {}
    for name, row, same in zip(class_names, rows.tolist(), equal.tolist(), strict=True):
        if same:
            groups.setdefault("kept", []).append(name)
        elif row >= 0:
            groups.setdefault("new, initialised from the most similar class", []).append(f"{name} ({known[row]})")
        else:
            groups.setdefault("new, randomly initialised, to be trained", []).append(name)
    if dropped := [name for name in known if name not in class_names]:
        groups["discarded"] = dropped
    return "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items())


def give_classes(
    model: Any, class_names: list[str], tokenizer=None, class_token_length: int | None = None, **config_fields
) -> str:
    """[`replace_classes`] with the token ids that a tokenizer, by default that in the model's folder, computes."""
    class_names, token_ids = checked_class_names(class_names), None
    if model.config.use_text_encoder:
        tokenizer = load_tokenizer(tokenizer, model.name_or_path)
        token_ids = new_class_token_ids(model.config, class_names, tokenizer, class_token_length)
    return replace_classes(model, class_names, token_ids, **config_fields)


@dataclass
class RequestedClasses:
    """
    Classes that a saved model is to have after loading, other than those it was saved with.

    Args:
        folder (`str`):
            Folder or Hub id of the saved model.
        class_names (`list[str]`):
            The classes.
        token_ids (`list[list[int]]`, *optional*):
            Their token ids, if the model has a text encoder.
    """

    folder: str
    class_names: list[str]
    token_ids: list | None

    def give_to(self, model: nn.Module, loading_info: dict | None):
        """Replaces the classes of the loaded model, with a warning, and reports their tables as mismatched weights."""
        before = {name: weight.shape for name, weight in model.named_parameters() if name.endswith(CLASS_TABLES)}
        origin = replace_classes(model, self.class_names, self.token_ids)
        logger.warning(f"{self.folder} was loaded with other classes than it was saved with; {origin}")
        if loading_info is not None:
            weights = dict(model.named_parameters())
            changed = [(name, shape, weights[name].shape) for name, shape in before.items()]
            mismatched = loading_info["mismatched_keys"]
            loading_info["mismatched_keys"] = type(mismatched)([*mismatched, *changed])


def requested_classes(
    config_class: type[PreTrainedConfig],
    folder,
    kwargs: dict,
    class_names: list[str] | None,
    tokenizer,
    class_token_length: int | None,
) -> RequestedClasses | None:
    """
    Finds out whether the arguments of `from_pretrained` ask for other classes than the saved ones.

    Args:
        config_class (`type`):
            [`MFuserConfig`].
        folder (`str` or `Path`):
            Folder or Hub id of the saved model.
        kwargs (`dict`):
            Further arguments. If the classes differ, they are changed so that the model loads with its saved classes.
        class_names, tokenizer, class_token_length:
            See [`MFuserPreTrainedModel.from_pretrained`].

    Returns:
        [`RequestedClasses`], *optional*: The classes, if they differ from the saved ones.

    Raises:
        ValueError: If the new classes cannot be used.
    """
    if class_names is not None:
        class_names = checked_class_names(class_names)
    config, label_fields = kwargs.get("config"), ("num_labels", "id2label")
    if folder is None or kwargs.get("state_dict") is not None:
        if class_names is not None:
            raise ValueError("class_names was given without the folder of a saved model; use set_class_names instead")
        return None
    if config is None and class_names is None and not any(name in kwargs for name in label_fields):
        return None
    hub_kwargs = hub_arguments(kwargs)
    saved_fields = config_class.get_config_dict(folder, **hub_kwargs)[0]
    if not saved_fields:
        return None  # Transformers raises an error
    saved = config_class.from_dict(saved_fields)
    known = label_names(saved.id2label)
    if config is None:
        target, token_ids = saved, kwargs.get("class_token_ids")
        given = _names_of_arguments(saved, kwargs.get("num_labels"), kwargs.get("id2label"))
    else:
        if not isinstance(config, PreTrainedConfig):
            config = config_class.from_pretrained(config, **hub_kwargs)
        target, given = config, label_names(config.id2label)
        token_ids = None if config.class_token_ids == saved.class_token_ids else config.class_token_ids
    if class_names is None:
        class_names = given
        if class_names != known and not kwargs.get("ignore_mismatched_sizes"):
            if token_ids is not None:
                return None  # the caller gives names and queries; Transformers compares the shapes
            raise ValueError(
                f"{folder} has the {len(known)} labels {', '.join(known)}; {len(given)} other labels were given "
                f"({', '.join(given)}): give class_names=[...] or ignore_mismatched_sizes=True to load it with other "
                "classes. To rename classes only, change model.config.id2label after loading"
            )
    elif given not in (known, class_names):
        raise ValueError(
            f"class_names is {class_names}, but num_labels, id2label or config give {given}; give one of them"
        )
    if class_names == known:
        return None
    if not target.use_text_encoder:
        token_ids = None
    elif token_ids is None:
        tokenizer = load_tokenizer(tokenizer, str(folder), **hub_kwargs)
        token_ids = new_class_token_ids(target, class_names, tokenizer, class_token_length)
    if config is None:
        for name in (*label_fields, "label2id", "class_token_ids"):
            kwargs.pop(name, None)
    else:
        kwargs["config"] = config = copy.deepcopy(config)
        for name in ("id2label", "label2id", "class_token_ids"):
            setattr(config, name, getattr(saved, name))
    return RequestedClasses(str(folder), class_names, token_ids)


def _names_of_arguments(saved: PreTrainedConfig, num_labels: int | None, id2label: dict | None) -> list[str]:
    """The class names that `num_labels` and `id2label` give."""
    if id2label is not None:
        if num_labels not in (None, len(id2label)):
            raise ValueError(f"num_labels is {num_labels}, but id2label has {len(id2label)} labels")
        return label_names(id2label)
    if num_labels in (None, saved.num_labels):
        return label_names(saved.id2label)
    if saved.use_text_encoder:
        raise ValueError(
            f"num_labels is {num_labels}, and the saved model has {saved.num_labels} labels; its queries are computed "
            "from class names: give class_names=[...] or id2label={...} as well"
        )
    return [f"LABEL_{index}" for index in range(num_labels)]
