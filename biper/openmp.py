"""Which OpenMP library compiled code is to share with torch."""

from pathlib import Path

import torch


def openmp_library() -> str:
    """How to link OpenMP: torch brings its own, and with another one beside it both would wait for the cores."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return str(own[0]) if own else "-fopenmp"
