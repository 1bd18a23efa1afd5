"""What checkpoints and packed files may say, field by field: the tables by which they are checked before use."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biper.kinds import (
    ANY_NUMBER,
    FLAG,
    LARGEST_SIDE,
    LINE,
    PLAIN,
    Kind,
    Table,
    by_name,
    either,
    in_turn,
    is_number,
    number,
    one_of,
    optional,
    several,
    whole,
)

MOST_CLASSES = 10**6  # of a network
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def is_tensor(value: object) -> bool:
    """Whether a value is a dense tensor of real or whole numbers that are all there.

    A file can hold sparse, complex, quantized and meta tensors, and huge ones of which every row is the same memory.
    """
    if type(value) not in (Tensor, torch.nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    dense = value.layout == torch.strided and value.device.type == "cpu" and value.dtype in (*REAL, *WHOLE)
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def tensor(*dtypes: torch.dtype, size: int | None = None) -> Kind:
    """A dense tensor, of one of the types if there are any, and of one dimension of that size."""

    def fits(value: Any) -> bool:  # noqa: ANN401
        return is_tensor(value) and (not dtypes or value.dtype in dtypes) and (size is None or value.shape == (size,))

    shape = "" if size is None else f" ({size},)"
    return Kind(f"a dense {dtypes[0] if len(dtypes) == 1 else 'real'} tensor{shape}", fits)


def _is_scalar(value: Any) -> bool:  # noqa: ANN401
    return is_tensor(value) and value.numel() == 1 and 0 <= value.item() <= 100


def _is_quantizer(value: object) -> bool:
    if not by_name(PLAIN, required=("name",)).fits(value):
        return False
    assert isinstance(value, Mapping)
    return isinstance(value["name"], str) and ("freq" not in value or (is_number(value["freq"]) and value["freq"] > 0))


PERCENT = number(0, 100)
SCORE = either(PERCENT, Kind("a tensor of one", _is_scalar))  # the published code saved tensors
QUANTIZER = Kind("a quantizer by name and settings, with a positive freq if any", _is_quantizer)
TENSORS = by_name(tensor())

METADATA: Table = {
    "model": LINE,
    "family": LINE,
    "num_classes": whole(1, MOST_CLASSES),
    "freq": number(above=0),  # with stage in place of the quantizers, in files of BiPer's own method
    "stage": one_of(1, 2),
    "weight_quantizer": QUANTIZER,
    "input_quantizer": optional(QUANTIZER),
    "activation": LINE,
    "dataset": LINE,
    "classes": several(LINE),
    "class_names": several(LINE),
    "mean": several(number(-1e6, 1e6), 0, 3),
    "std": several(number(1e-6, 1e6), 0, 3),
    "image_size": optional(whole(1, LARGEST_SIDE)),
}

PUBLISHED: Table = {"model": optional(LINE), "best_prec1": SCORE}  # of the paper's files what is used

CHECKPOINT: Table = {
    "model": LINE,
    "state_dict": TENSORS,
    "metadata": by_name(Kind("values", lambda _: True)),  # METADATA's turn comes when they are read
    "progress": number(0, 1),
    "settings": by_name(either(PLAIN, several(PLAIN))),
    "versions": by_name(LINE),
    "recalibrated": FLAG,
    "best_prec1": SCORE,
    "best_prec5": SCORE,
    "best_epoch": whole(),
    "epoch": whole(),
    "step": whole(),
    "history": several(
        by_name(
            optional(ANY_NUMBER),
            {"epoch": whole(1), "test_top1": PERCENT, "test_top5": PERCENT},
            required=("epoch", "test_top1", "test_top5"),
        )
    ),
    "seconds": several(optional(number(0))),
    "partial": by_name(
        Kind("sums", lambda _: False),
        {"sums": either(by_name(number()), several(number(), 4)), "count": whole(), "replaced": whole()},
    ),
    "optimizer": by_name(
        Kind("groups and a state of tensors", lambda _: False),
        {
            "state": Kind("a state of each parameter", lambda v: isinstance(v, Mapping)),
            "param_groups": several(by_name(either(PLAIN, several(ANY_NUMBER)))),
        },
        required=("state", "param_groups"),
    ),
    "not_averaged": TENSORS,
    "teacher": LINE,
    "random_state": by_name(
        Kind("states", lambda _: True),
        {
            "python": in_turn(one_of(3), several(whole(0, 2**32 - 1), 625), optional(number())),
            "numpy": in_turn(one_of("MT19937"), tensor(torch.int64, size=624), whole(0, 624), one_of(0, 1), number()),
            "torch": tensor(torch.uint8),
            "cuda": several(tensor(torch.uint8)),
        },
        required=("python", "numpy", "torch", "cuda"),
    ),
}

PACKED: Table = {"top1": optional(PERCENT), "own": LINE, "layers": by_name(LINE)}  # beside METADATA, or in its place
