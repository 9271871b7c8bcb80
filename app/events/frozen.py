"""Make small values that nobody changes, at the price of ones that anybody could.

A frozen dataclass sets every field by a call of its own, which makes an event four times, and
an envelope ten times as dear. Here the type checker forbids the assignment instead.
"""

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[_Class]) -> type[_Class]:
    """Return `cls` as a dataclass with slots that compares, and hashes, by its values."""
    return dataclass(slots=True, unsafe_hash=True)(cls)
