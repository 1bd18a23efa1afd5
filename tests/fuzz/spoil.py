"""Spoiled copies: of bytes, and of what a file says, which is a nest of mappings, lists, plain values and tensors."""

import random
from typing import Any

import torch
from torch import Tensor

Draw = random.Random
ODD = (
    *(
        None,
        True,
        False,
        "",
        "ten",
        "1e-3",
        "a\nb",
        "nul\0",
        "half \ud800",
        "x" * 5000,
        "../..",
        [],
        {},
        [None],
        {"a": {}},
    ),
    *(-1, 0, 1, 2, 3, 7, 2**31, 2**62, 2**63, 2**64, -(2**70), 10**5000, 0.5, -0.0, 1e-320, 1e300, -2.5),
    *(float("nan"), float("inf"), [1.0, 2.0], [0.5] * 3, ["a"] * 10, {"name": "sign"}, {"name": "sine", "freq": 1e308}),
)


def spoiled_bytes(draw: Draw, contents: bytes) -> bytes:
    """Flipped, cut, overwritten, lengthened, or with a part twice."""
    place = draw.randrange(len(contents))
    kind = draw.randrange(6)
    if kind == 0:
        return contents[:place]
    if kind == 1:
        return contents[:place] + draw.randbytes(draw.randint(1, 64)) + contents[place:]
    if kind == 2:
        return contents[:place] + contents[place + draw.randint(1, 64) :]
    if kind == 3:
        return contents + contents[place : place + 1000]
    damaged = bytearray(contents)
    if kind == 4:
        damaged[place : place + 8] = draw.choice((b"\0" * 8, b"\xff" * 8, draw.randbytes(8)))
    else:
        for _ in range(draw.choice((1, 1, 3))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def spoiled(draw: Draw, value: Any, tensors: bool = True) -> Any:
    """A copy of a nest with one thing changed: a value, or a name that is missing, new, or another value's."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, copy = draw.choice(list(value)), dict(value)
        kind = draw.randrange(12)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[draw.choice(("more", "a\nb", 3, "freq"))] = odd(draw, tensors)
        elif kind == 2:
            copy[key] = value[draw.choice(list(value))]
        else:
            copy[key] = spoiled(draw, value[key], tensors)
        return copy
    if isinstance(value, list | tuple) and value and draw.random() < 0.7:
        items, place = list(value), draw.randrange(len(value))
        items[place : place + 1] = draw.choice(
            ([], items[place : place + 1] * 2, [spoiled(draw, items[place], tensors)])
        )
        return type(value)(items)
    if isinstance(value, Tensor) and draw.random() < 0.8:
        return odd_tensor(draw, value)
    return odd(draw, tensors)


def odd(draw: Draw, tensors: bool) -> Any:
    """Something that is hardly ever right."""
    kind = draw.random()
    if kind < 0.05:
        return nest(draw.choice((3, 50, 900)))
    return odd_tensor(draw, torch.ones(3)) if tensors and kind < 0.2 else draw.choice(ODD)


def nest(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def odd_tensor(draw: Draw, like: Tensor) -> Tensor:
    """A tensor of another kind, shape or type, or with a value that is not finite."""
    real = like.detach().clone().float()
    made = draw.randrange(10)
    if made == 0:
        return real.flatten()[:0]
    if made == 1:
        return real.to(torch.complex64)
    if made == 2:
        return real.to_sparse()
    if made == 3:
        return torch.empty(like.shape, device="meta")
    if made == 4:
        return torch.zeros(1).expand(10**6, 10**6)
    if made == 5:
        return real.to(draw.choice((torch.half, torch.bfloat16, torch.float64, torch.int8, torch.bool)))
    if made == 6:
        return torch.zeros(like.shape, dtype=torch.uint16)
    if made == 7:
        return real[None]
    if real.numel():
        real.view(-1)[draw.randrange(real.numel())] = draw.choice((float("nan"), float("inf"), 1e38, -1e38))
    return real
