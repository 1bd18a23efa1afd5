"""Kinds of values that a file may hold: what is read is checked against a table of them, by type and range, before use.

A table says for each name what its value has to be. A kind looks at a value and at nothing else, so it never fails.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biper.errors import UsageError, shown

LARGEST = 2**31 - 1  # of whole numbers that count something
LARGEST_SIDE = 4096  # of an image that a network is shown, in pixels
LONGEST = 4096  # characters of a name or a path


@dataclass(frozen=True)
class Kind:
    """What a value has to be, in words, and whether one is."""

    text: str
    fits: Callable[[Any], bool]


Table = Mapping[str, Kind]


def is_line(value: object) -> bool:
    """Whether a value is a text of one line that every file and terminal can show: no line ends, NUL or surrogates."""
    if not isinstance(value, str) or len(value) > LONGEST:
        return False
    return value.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value)


def is_number(value: object) -> bool:
    """Whether a value is an int or a finite float, neither a truth value nor of a type derived from them."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def whole(low: int = 0, high: int = LARGEST) -> Kind:
    """A whole number from low to high."""
    return Kind(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def number(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Kind:
    """A finite number from low to high, and above another."""
    bounds = {"from": low, "above": above, "to": high}
    text = " ".join(
        ["a finite number", *(f"{word} {bound:g}" for word, bound in bounds.items() if abs(bound) < math.inf)]
    )
    return Kind(text, lambda v: is_number(v) and low <= v <= high and v > above)


def one_of(*choices: str | int) -> Kind:
    """One of a few values."""
    text = " or ".join(map(repr, choices))
    return Kind(text, lambda v: any(type(v) is type(choice) and v == choice for choice in choices))


def optional(kind: Kind) -> Kind:
    """None, or what the kind says."""
    return Kind(f"{kind.text}, or nothing", lambda v: v is None or kind.fits(v))


def either(*kinds: Kind) -> Kind:
    """What one of several kinds says."""
    return Kind(", or ".join(kind.text for kind in kinds), lambda v: any(kind.fits(v) for kind in kinds))


def several(kind: Kind, *lengths: int) -> Kind:
    """A list or tuple of values of a kind, as long as one of `lengths` if there are any."""
    count = f"{' or '.join(map(str, lengths))} values" if lengths else "values"
    return Kind(
        f"a list of {count}, each {kind.text}",
        lambda v: type(v) in (list, tuple) and (not lengths or len(v) in lengths) and all(map(kind.fits, v)),
    )


def in_turn(*kinds: Kind) -> Kind:
    """A list or tuple of as many values as kinds, each of its kind."""
    return Kind(
        "a list of " + ", ".join(kind.text for kind in kinds),
        lambda v: (
            type(v) in (list, tuple)
            and len(v) == len(kinds)
            and all(kind.fits(item) for kind, item in zip(kinds, v, strict=True))
        ),
    )


def by_name(kind: Kind, fields: Table | None = None, required: Sequence[str] = ()) -> Kind:
    """A mapping from texts of one line to values of a kind; some of its fields to those of another."""
    known = fields or {}
    return Kind(
        f"a mapping from names to {kind.text}" + (f" with {', '.join(required)}" if required else ""),
        lambda v: (
            isinstance(v, Mapping)
            and all(name in v for name in required)
            and all(is_line(name) and known.get(name, kind).fits(value) for name, value in v.items())
        ),
    )


LINE = Kind("a text of one line", is_line)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
ANY_NUMBER = Kind("a number", lambda v: type(v) in (int, float))  # also NaN and infinity
PLAIN = either(LINE, FLAG, ANY_NUMBER, Kind("nothing", lambda v: v is None))


def require(values: Mapping[str, Any], table: Table, required: Sequence[str] = ()) -> None:
    """Raise UsageError for a value that is not of its kind, naming it, or a name that is missing."""
    for name in required:
        if name not in values:
            raise UsageError(f"its {name} is missing")
    for name, kind in table.items():
        if name in values and not kind.fits(values[name]):
            raise UsageError(f"its {name} is {shown(values[name])}, not {kind.text}")
