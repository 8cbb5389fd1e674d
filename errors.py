"""Exceptions that the input or the machine can cause, and their messages in one line. Imports no library."""

import sys

# Errors that input can cause, besides those of EXPECTED_LIBRARY_ERRORS.
EXPECTED_ERRORS = (OSError, ValueError, ImportError, MemoryError)
# Errors of libraries that derive from none of these. A library that raises one has been imported already.
EXPECTED_LIBRARY_ERRORS = (
    ("safetensors", "SafetensorError"),
    ("yaml", "YAMLError"),
    ("huggingface_hub.errors", "StrictDataclassError"),
    ("datasets.exceptions", "DatasetsError"),
    ("torch", "OutOfMemoryError"),
    ("av.error", "FFmpegError"),
)
NO_MEMORY_ON_CPU = ("can't allocate memory", "not enough memory")  # of PyTorch's RuntimeError, on Linux and Windows


class CommandError(Exception):
    """An error that ends a command with one line, although no argument and no file is invalid."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a GPU was exhausted."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY_ON_CPU)


def is_expected(error: BaseException) -> bool:
    """Whether an error is caused by the input or the machine, so that its message suffices; others are bugs."""
    if isinstance(error, (*EXPECTED_ERRORS, CommandError)) or is_out_of_memory(error):
        return True
    loaded = ((sys.modules.get(module), name) for module, name in EXPECTED_LIBRARY_ERRORS)
    return isinstance(error, tuple(getattr(module, name) for module, name in loaded if module is not None))


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks; its type if it has no message."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error) and "out of memory" not in text:
        return f"out of memory: {text}".rstrip(": ")
    return text or type(error).__name__
