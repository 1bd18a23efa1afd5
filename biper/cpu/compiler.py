"""Training's C code, compiled where it runs and for that processor."""

import ctypes
import hashlib
import logging
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from biper.compilers import find_compiler, openmp_library
from biper.cpu.cache import cache_folder, is_kept, keep
from biper.errors import CompilerMissing

log = logging.getLogger("biper")
HERE = Path(__file__).parent
FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffp-contract=fast",
    "--param=avoid-fma-max-bits=0",  # gcc would leave out some, for some processors: their sums would differ
    "-fno-math-errno",
    "-fPIC",
)
OPTIONAL = ("-mprefer-vector-width=512",)  # not every processor's compiler knows them
PATIENCE = 120  # seconds


@cache
def load(name: str) -> ctypes.CDLL:
    """The library of biper/cpu/<name>.c, compiled now if this machine has not yet. Raises CompilerMissing."""
    source = HERE / f"{name}.c"
    compiler = find_compiler()
    try:
        facts = (source.read_text(), *compiler, torch.__version__, openmp_library(), *FLAGS, _processor())
        key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
        path = cache_folder() / f"{name}-{key}.so"
        if not is_kept(path):
            start = time.monotonic()
            _compile(compiler, source, path)
            log.info("compiled the CPU kernels in %.1f s, once on this machine", time.monotonic() - start)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerMissing(f"cannot compile the CPU kernels: {error}") from error


def _compile(compiler: Sequence[str], source: Path, path: Path) -> None:
    """Write the library at once, under its final name: several processes may do so at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "code.o", Path(folder) / "code.so"
        flags = [flag for flag in FLAGS if platform.machine() == "x86_64" or flag not in OPTIONAL]
        _call(*compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(compiled))
        _call(*compiler, "-shared", str(compiled), openmp_library(), "-lm", "-o", str(linked))
        keep(linked, path)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CompilerMissing(f"{command[0]} does not work here: {next((x for x in lines if 'error' in x), lines[0])}")


def _processor() -> str:
    """What the code is compiled for: a home folder may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
