# SPDX-License-Identifier: Apache-2.0
"""Checks of config dataclasses: values of the annotated type, and not below their least."""

import dataclasses
import types
import typing
from operator import attrgetter
from typing import Any, Literal

from model_port.errors import UserError


def check_least(config: Any, least: dict[str, int]) -> None:
    """Raise a UserError for the first field, by dotted name, that is below its least value."""
    for name, bound in least.items():
        value = attrgetter(name)(config)
        if not value >= bound:
            raise UserError(f"{name} must be at least {bound}, got {value}")


def check_types(config: Any, prefix: str = "") -> None:
    """Raise a UserError for the first field that is not of its annotated type, which dataclasses do not check."""
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        value, kind = getattr(config, entry.name), hints[entry.name]
        if not _is_a(value, kind):
            raise UserError(f"{prefix}{entry.name} must be {_describe(kind)}, got {value!r}")
        if dataclasses.is_dataclass(kind):
            check_types(value, f"{prefix}{entry.name}.")


def _is_a(value: Any, kind: Any) -> bool:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in arguments
    if typing.get_origin(kind) is types.UnionType:
        return any(_is_a(value, one) for one in arguments)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _describe(kind: Any) -> str:
    """Return a type in words.

    >>> _describe(tuple[str, ...]), _describe(float | None), _describe(Literal["k1", "k2"])
    ('a tuple of str', 'float or None', "one of 'k1', 'k2'")
    """
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if typing.get_origin(kind) is types.UnionType:
        return " or ".join(map(_describe, arguments))
    if typing.get_origin(kind) is tuple:
        return f"a tuple of {_describe(arguments[0])}"
    return "None" if kind is types.NoneType else kind.__name__
