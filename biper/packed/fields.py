"""The fields of a packed program, by name: what packed.c reads, and what `program.py` writes.

packed.c has this table too, and makes its structs of it; both are compared when the library is loaded (runtime.py).
"""

from collections.abc import Mapping
from typing import TypeVar

WIDTH = 40  # numbers of an instruction
TILE, GROUP = 4, 8  # pixels that are worked on together, and so many of them that are gathered together
LANES, WORD = 16, 32  # channels side by side, and bits of a word
LOOKED_UP = "avx2"  # the path that looks up the nibbles of weights, which it has in an order of their own
COPY = 32  # bytes that are copied at a time, and so may be read and written more than asked for
HEADER = "instructions values scratch gathered"  # how a program begins
# how an instruction begins, behind its code
HEAD = "in out out_bits skip clamp gain shift slope before after threshold height width channels out_height out_width"
INSTRUCTIONS = {  # and their own fields; the codes are 1, 2 and so on in this order
    "CONV": "weights alpha bias masks offsets classes kernel_h kernel_w stride_h stride_w pad_h pad_w dilation_h "
    "dilation_w out_channels groups words pool conv_height kinds turns",
    "TAIL": "kernel stride pad",
    "AVERAGE": "window front copies out_channels",
    "REAL": "weights kernel_h kernel_w stride_h stride_w pad_h pad_w out_channels channels_first chunk",
}
T = TypeVar("T")


def table() -> str:
    """All of it, as the library of this version states it."""
    sizes = f"{WIDTH} TILE {TILE} GROUP {GROUP} LANES {LANES} WORD {WORD} COPY {COPY} LOOKED_UP {LOOKED_UP}"
    lines = {"WIDTH": sizes, "HEADER": HEADER, "HEAD": f"code {HEAD}", **INSTRUCTIONS}
    return "\n".join(f"{name} {text}" for name, text in lines.items())


def header(given: Mapping[str, int]) -> list[int]:
    """The numbers with which a program begins. Raises ValueError unless they are those of the table."""
    return _in_order("HEADER", HEADER, given)


def instruction(name: str, given: Mapping[str, T | int]) -> list[T | int]:
    """An instruction, from all of its fields but the code. Raises ValueError unless they are those of the table."""
    code = list(INSTRUCTIONS).index(name) + 1
    return [code, *_in_order(name, f"{HEAD} {INSTRUCTIONS[name]}", given)]


def _in_order(name: str, fields: str, given: Mapping[str, T]) -> list[T]:
    order = fields.split()
    if odd := set(order) ^ set(given):
        raise ValueError(f"fields of {name} that are missing or unknown: {', '.join(sorted(odd))}")
    return [given[field] for field in order]
