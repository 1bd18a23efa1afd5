"""What C is compiled with on this machine, and the OpenMP library that it shares with torch."""

import os
import shlex
import shutil
from pathlib import Path

import torch

from biper.errors import CompilerMissing


def find_compiler() -> list[str]:
    """The C compiler's command: $CC with its arguments, otherwise cc or gcc. Raises CompilerMissing."""
    try:
        named, *arguments = shlex.split(os.environ.get("CC", "")) or [""]
    except ValueError as error:
        raise CompilerMissing(f"CC={os.environ['CC']!r} cannot be read: {error}") from error
    if found := shutil.which(named):
        return [found, *arguments]
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CompilerMissing("no C compiler was found: install gcc")
    return [compiler]


def openmp_library() -> str:
    """How to link OpenMP: torch brings its own, and with another one beside it both would wait for the cores."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return str(own[0]) if own else "-fopenmp"
