"""Training's C code, compiled where it runs and for that processor."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from biper.errors import CompilerMissing
from biper.openmp import openmp_library

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
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CompilerMissing("no C compiler was found: install gcc")
    try:
        facts = (source.read_text(), compiler, torch.__version__, openmp_library(), *FLAGS, _processor())
        key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
        path = _cache_folder() / f"{name}-{key}.so"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # a damaged file: it is written anew
                path.unlink()
        start = time.monotonic()
        _compile(compiler, source, path)
        log.info("compiled the CPU kernels in %.1f s, once on this machine", time.monotonic() - start)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerMissing(f"cannot compile the CPU kernels: {error}") from error


def _compile(compiler: str, source: Path, path: Path) -> None:
    """Write the library at once, under its final name: several processes may do so at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "code.o", Path(folder) / "code.so"
        flags = [flag for flag in FLAGS if platform.machine() == "x86_64" or flag not in OPTIONAL]
        _call(compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(compiled))
        _call(compiler, "-shared", str(compiled), openmp_library(), "-lm", "-o", str(linked))
        linked.replace(path)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CompilerMissing(f"{command[0]} does not work here: {next((x for x in lines if 'error' in x), lines[0])}")


def _cache_folder() -> Path:
    """Where libraries are kept; a folder of this user in the system's temporary one if home cannot be written to."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biper"
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    except (OSError, RuntimeError):  # the latter where a user has no home
        pass
    folder = Path(tempfile.gettempdir()) / f"biper-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} could be written to by others")
    return folder


def _processor() -> str:
    """What the code is compiled for: a home folder may be shared by machines with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
