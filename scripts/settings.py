"""Settings from recipes (YAML files) and from the command line, checked against their declared types."""

import enum
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from mfuser.encoder_configs_mfuser import nearest

RECIPES = Path(__file__).parents[1] / "recipes"
# Strings that are booleans where a boolean is expected. YAML 1.1 reads them as booleans everywhere.
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class SettingsLoader(yaml.SafeLoader):
    """
    Reads YAML with the plain values of YAML 1.2: `1e-4` is a number; `no`, `010`, `1:30` and `2024-01-01` are strings.

    A key that is given twice is an error.
    """

    def construct_mapping(self, node, deep=False):
        names = [
            self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"
        ]
        repeated = [name for index, name in enumerate(names) if name in names[:index]]
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"{repeated[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


SettingsLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", "N", ""]),
    ("bool", r"true|false", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9]\d*)", "-+0123456789"),
    ("float", r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?|\d+e[-+]?\d+)", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    SettingsLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z", re.IGNORECASE), list(_first)
    )


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; raises `ValueError`, in one line with the position, if it is not valid."""
    try:
        value = yaml.load(text, SettingsLoader)
        json.dumps(value, default=str)  # raises ValueError if an alias makes the value contain itself
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{origin} is not valid YAML: {position}{error.problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error


def read_recipe(recipe: Path, bases: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    The settings of a recipe and, where it does not override them, of its `base`.

    Args:
        recipe (`Path`):
            The file.
        bases (`tuple[Path, ...]`, *optional*):
            The recipes of which it is the base.

    Raises:
        ValueError: If a recipe does not exist, is not a YAML file of settings, or is its own base.
    """
    if recipe.resolve() in bases:
        chain = " -> ".join(path.name for path in (*bases, recipe))
        raise ValueError(f"{recipe} is its own base ({chain}); base must name another recipe")
    if not recipe.is_file():
        found = "is a folder, not a recipe" if recipe.is_dir() else "does not exist"
        raise ValueError(f"the recipe {recipe} {found}; the published recipes are in {RECIPES}")
    try:
        settings = parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))
    except UnicodeDecodeError as error:
        raise ValueError(f"{recipe} is not a recipe: it is not UTF-8 text") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        shown = repr(settings)[:80]
        raise ValueError(f"{recipe} holds {shown}; a recipe must hold settings such as `learning_rate: 1e-4`")
    base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise ValueError(f"base of {recipe} is {base!r}; it must be the file name of a recipe")
    return read_recipe(recipe.parent / base, (*bases, recipe.resolve())) | settings


def read_settings(arguments: list[str]) -> dict[str, Any]:
    """
    Reads the settings of the command line and of the recipe that it may begin with.

    Args:
        arguments (`list[str]`):
            The arguments of the command. Settings that are given here override those of the recipe.

    Returns:
        `dict`: The value of each setting by its name.

    Raises:
        ValueError: If an argument is not a setting, or the recipe cannot be read.
    """
    settings: dict[str, Any] = {}
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        settings = read_recipe(Path(arguments.pop(0)))
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if not equals:
            if not name.startswith("--"):
                raise ValueError(f"{name!r} is not a setting; write settings as --name value or name=value")
            if not arguments or arguments[0].startswith("--"):
                raise ValueError(f"{name} has no value; write settings as --name value or name=value")
            value = arguments.pop(0)
        path = name.removeprefix("--").split(".")
        if not all(path):
            raise ValueError(f"{name!r} is not the name of a setting; write settings as --name value or name=value")
        target = settings
        for depth, part in enumerate(path[:-1], start=1):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                parent = ".".join(path[:depth])
                raise ValueError(f"{name} cannot be set: {parent} is {target!r}, which has no fields")
        target[path[-1]] = parse_yaml(value, f"the value of {name}")
    return settings


# --- types -----------------------------------------------------------------------------------------------------------


def typed(value: Any, annotation: Any, name: str) -> Any:
    """
    A setting as the type that is declared for it.

    Conversions are lossless: integers are numbers and 1e3 is an integer, `no` is `False` where a boolean is declared,
    an integer is its digits where a string is declared, and a single value is a list of one.

    Args:
        value (`Any`):
            The value.
        annotation (`Any`):
            The declared type. Classes other than those of YAML and enumerations are not checked.
        name (`str`):
            The name of the setting in error messages.

    Returns:
        `Any`: The converted value.

    Raises:
        ValueError: If the value is not of that type.
    """
    try:
        return _convert(value, annotation)
    except _WrongTypeError as error:
        detail = f" ({error})" if str(error) else ""
        raise ValueError(f"{name} is {value!r}; it must be {described(annotation)}{detail}") from None


class _WrongTypeError(Exception):
    """A value is not of the declared type."""


def _convert(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (None, type(None)):
        if value is None:
            return None
        raise _WrongTypeError
    if origin in (Union, types.UnionType):
        return _convert_to_one(value, arguments)
    if origin is Literal:
        if any(value == each and type(value) is type(each) for each in arguments):
            return value
        raise _WrongTypeError
    if annotation in (bool, int, float, str):
        return _convert_plain(value, annotation)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        if isinstance(value, annotation) or value in [each.value for each in annotation]:
            return value
        raise _WrongTypeError
    if annotation is dict or origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _WrongTypeError
        kind = arguments[1] if arguments else Any
        return {key: _convert(each, kind) for key, each in value.items()}
    if annotation in (list, tuple) or origin in (list, tuple):
        return _convert_list(value, origin or annotation, arguments)
    return value


def _convert_to_one(value: Any, alternatives: tuple) -> Any:
    """The value as the first alternative that it fits. An enumeration lists the strings that are accepted."""
    enums = [each for each in alternatives if isinstance(each, type) and issubclass(each, enum.Enum)]
    if enums and value is not None:
        return _convert(value, enums[0])
    exact = [each for each in alternatives if each is type(value)]
    for alternative in (*exact, *alternatives):
        try:
            return _convert(value, alternative)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _convert_plain(value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, str) and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
    elif isinstance(value, bool):
        raise _WrongTypeError
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif kind is float and isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise _WrongTypeError
        return float(value) if isinstance(value, float) else value
    elif kind is str and isinstance(value, int):
        return str(value)
    if isinstance(value, kind) and not isinstance(value, enum.Enum):
        return value
    raise _WrongTypeError("put it in quotes" if kind is str and isinstance(value, float) else "")


def _convert_list(value: Any, kind: type, arguments: tuple) -> Any:
    if isinstance(value, dict) or value is None:
        raise _WrongTypeError
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    fixed = kind is tuple and arguments and arguments[-1] is not Ellipsis
    if fixed and len(values) != len(arguments):
        raise _WrongTypeError
    if fixed:
        return tuple(_convert(each, wanted) for each, wanted in zip(values, arguments, strict=True))
    return kind(_convert(each, arguments[0] if arguments else Any) for each in values)


def described(annotation: Any) -> str:
    """A declared type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    plain: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    plain |= {dict: "a dictionary", list: "a list", tuple: "a list", type(None): "null"}
    if annotation in plain:
        return plain[annotation]
    if origin in (Union, types.UnionType):
        enums = [each for each in arguments if isinstance(each, type) and issubclass(each, enum.Enum)]
        words = dict.fromkeys(described(each) for each in enums or arguments)
        return " or ".join(word for word in words if not (word == "an integer" and "a number" in words))
    if origin is Literal:
        return " or ".join(repr(each) for each in arguments)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return f"one of {', '.join(str(each.value) for each in annotation)}"
    if origin is dict:
        return "a dictionary" if arguments[1] is Any else f"a dictionary (each value {described(arguments[1])})"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} (each {described(arguments[0])})"
    if origin in (list, tuple):
        return f"a list (each {described(arguments[0])})"
    return getattr(annotation, "__name__", str(annotation))


def check_names(
    values: Mapping[str, Any], known: typing.Iterable[str], role: str | None = None, more: typing.Iterable[str] = ()
) -> None:
    """
    Raises `ValueError` for the first of some settings that is unknown, with the most similar name.

    Args:
        values (`dict`):
            The settings.
        known (`Iterable[str]`):
            The names that exist.
        role (`str`, *optional*):
            The setting of which these are the fields.
        more (`Iterable[str]`, *optional*):
            Fields of other settings, such as `model_config.crop_size`, which are suggested as well.
    """
    known = list(known)
    for name in values:
        if name not in known:
            fields = [each for each in more if each.rpartition(".")[2] == name]
            hint = f"; did you mean {fields[0]!r}?" if fields else nearest(str(name), known)
            raise ValueError(f"{f'{role} has no' if role else 'unknown'} setting {name!r}{hint}")


__all__ = ["SettingsLoader", "check_names", "parse_yaml", "read_recipe", "read_settings", "typed"]
