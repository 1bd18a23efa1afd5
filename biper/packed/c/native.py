"""The C of a folder, compiled and run on this machine: to compare it with the network that it was made of."""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from biper.compilers import find_compiler
from biper.errors import CompilerMissing, Different, one_line
from biper.packed.c.export import name_of
from biper.packed.c.plan import Plan
from biper.packed.network import PackedNetwork

FLAGS = ("-std=c99", "-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared")
PATIENCE = 300  # seconds
ALIGNMENT = 64  # bytes


class NativeNetwork:
    """Images (N, 3, S, S), normalized, to logits (N, classes), one after the other, by the C that was written."""

    def __init__(self, packed: PackedNetwork, made: Plan, folder: Path, flags: tuple[str, ...] = FLAGS) -> None:
        """Compile the folder, elsewhere. Raises CompilerMissing, and Different if a compiler does not take the C."""
        compiler = find_compiler()
        sources = [str(folder / "network.c"), str(folder / "kernels.c")]
        with tempfile.TemporaryDirectory() as place:
            library = Path(place) / "network.so"
            for chosen in (
                flags,
                tuple(flag for flag in flags if flag != "-march=native"),
            ):  # not all compilers know it
                command = [*compiler, *chosen, *sources, "-o", str(library)]
                try:
                    done = subprocess.run(
                        command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False
                    )
                except (OSError, subprocess.TimeoutExpired) as error:
                    raise CompilerMissing(f"{compiler[0]}: {one_line(error)}") from error
                if done.returncode == 0:
                    break
            else:
                said = one_line(RuntimeError(done.stderr))
                raise Different(f"{compiler[0]} does not compile the C: {said}; please report this")
            try:
                self._run = getattr(ctypes.CDLL(str(library)), f"{name_of(packed)}_run")
            except OSError as error:
                raise CompilerMissing(f"what was compiled cannot be loaded: {one_line(error)}") from error
        self._run.argtypes, self._run.restype = [ctypes.c_void_p] * 3, None
        self.classes, self.arena = made.logits.shape[0], torch.zeros(made.arena + ALIGNMENT, dtype=torch.uint8)

    def __call__(self, images: Tensor) -> Tensor:
        """images: (N, 3, S, S) float32 -> (N, classes)."""
        logits = torch.zeros(len(images), self.classes)
        arena = self.arena.data_ptr() + -self.arena.data_ptr() % ALIGNMENT
        for image, row in zip(images.permute(0, 2, 3, 1).contiguous(), logits, strict=True):
            self._run(image.data_ptr(), row.data_ptr(), arena)
        return logits
