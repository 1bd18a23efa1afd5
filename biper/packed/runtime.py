"""The compiled instructions of packed networks (packed/packed.c): which are there, and how to run them."""

import ctypes
import logging
import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from biper.compilers import openmp_library
from biper.errors import CompilerMissing, UsageError
from biper.packed import fields
from biper.packed.bits import Border

log = logging.getLogger("biper")
HERE = Path(__file__).parent
PATHS = {"plain": 0, "avx2": 1, "avx512": 2, "neon": 3}
CHOICE = "BIPER_POPCOUNT"  # environment variable: one of PATHS, or torch
TORCH = "torch"
EPSILON = 1e-30  # of batch norms whose variance is 1, to which it adds nothing; torch 2.11 takes no 0
Addresses = ctypes.Array[ctypes.c_void_p]


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled instructions; None, and a line that says so once, where the installation found no compiler."""
    try:
        library = built("packed")
        if _fields(library) != fields.table():
            raise CompilerMissing("they are of another version of biper; install it again")
    except CompilerMissing as error:
        log.warning("packed networks run through plain torch operations, which is slower: %s", error)
        return None
    library.biper_offsets.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int, ctypes.c_void_p]
    library.biper_limits.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] + [ctypes.c_void_p] * 2
    library.biper_run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_int] * 2
    return library


def _fields(library: ctypes.CDLL) -> str:
    """What a library states of the programs that it reads; '' if it is of a version that states nothing."""
    if not hasattr(library, "biper_fields"):
        return ""
    library.biper_fields.restype = ctypes.c_char_p
    stated: bytes = library.biper_fields()
    return stated.decode()


@cache
def available() -> tuple[str, ...]:
    """The ways in which this processor can count bits, fastest first; the last, 'torch', needs no compiled code."""
    library = compiled()
    found = [name for name, number in PATHS.items() if library and library.biper_supports(number)]
    return (*reversed(found), TORCH)


def chosen() -> str:
    """The way that is taken: the fastest, or what the environment variable BIPER_POPCOUNT says. Raises UsageError."""
    choice = os.environ.get(CHOICE)
    if not choice:
        return available()[0]
    if choice not in available():
        raise UsageError(f"{CHOICE}={choice} cannot run here: choose from {', '.join(available())}")
    return choice


@cache
def fused() -> bool:
    """Whether torch's batch norm rounds `x*gain + shift` once on this machine, and not the product too."""
    x = torch.tensor([[1 + 2.0**-12]], dtype=torch.float32, device="cpu")
    ones = torch.ones_like(x[0])
    return bool(F.batch_norm(x, 0 * ones, ones, x[0], -ones, False, 0.0, EPSILON).item() != 2.0**-11)


def addresses(tensors: Sequence[Tensor | None]) -> Addresses:
    """Where tensors lie, for `run`."""
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def run(code: Tensor, addresses: Addresses, images: int, path: str) -> None:
    """Run a program (program.py) on tensors that lie at these addresses, in place. Raises MemoryError."""
    library = compiled()
    assert library is not None
    if library.biper_run(code.data_ptr(), addresses, images, torch.get_num_threads(), PATHS[path], fused()):
        raise MemoryError("no memory for a packed network's activations: give a smaller batch")


def looks_up(path: str) -> bool:
    """Whether a path looks up the nibbles of weights, which it has in an order of their own."""
    return path == fields.LOOKED_UP


def offsets(instruction: Sequence[int], weights: Tensor, border: Border, path: str) -> Tensor:
    """What the sums of a convolution's instruction begin with, int32 (2, kinds, blocks, 16): see packed.c."""
    library = compiled()
    assert library is not None
    blocks, _, lanes = weights.shape
    result = torch.empty((2, len(border.masks), blocks, lanes), dtype=torch.int32, device="cpu")
    row = torch.tensor(instruction, dtype=torch.int64, device="cpu")
    given = map(Tensor.data_ptr, (row, weights, border.masks, border.terms, border.rows))
    library.biper_offsets(*given, looks_up(path), result.data_ptr())
    return result


def limits(instruction: Sequence[int], offsets: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """What an instruction for bits alone compares with, and its turns, int32 (blocks,): see packed.c.

    offsets: of `offsets`; parameters: alpha, bias, gain, shift and threshold.
    """
    library = compiled()
    assert library is not None
    found, turns = offsets.clone(), torch.empty(offsets.shape[2], dtype=torch.int32, device="cpu")
    row = torch.tensor(instruction, dtype=torch.int64, device="cpu")
    given = [None if tensor is None else tensor.data_ptr() for tensor in parameters]
    library.biper_limits(row.data_ptr(), *given, fused(), found.data_ptr(), turns.data_ptr())
    return found, turns


@cache
def built(name: str) -> ctypes.CDLL:
    """The library of biper/packed/<name>.c, compiled when biper was installed. Raises CompilerMissing if it was not.

    It brings no OpenMP of its own: torch's is what its symbols are found in.
    """
    path = HERE / f"_{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise CompilerMissing("they were not compiled when biper was installed; install a C compiler, then biper again")
    openmp = openmp_library()
    try:
        ctypes.CDLL("libgomp.so.1" if openmp == "-fopenmp" else openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerMissing(f"{path.name} cannot be loaded: {error}") from error
