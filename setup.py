"""The compiled instructions of packed networks, and what comes with a wheel from outside of biper/.

Everything else stands in pyproject.toml.
"""

import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKED = Extension(
    "biper.packed._packed",
    ["biper/packed/packed.c"],
    depends=["biper/packed/packed_instructions.h"],
    # no contraction: every operation rounds as torch's. -fopenmp is not for the linker: torch brings its own OpenMP
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"],
    optional=True,  # without a compiler plain torch operations do the work
)


class WithRecipesAndWeights(build_py):
    """Copies recipes and pretrained weights into a wheel's biper/; an editable installation has the repository's."""

    def run(self) -> None:
        """Build biper/, and put them there (biper/places.py finds them)."""
        super().run()
        if self.editable_mode:
            return
        biper = Path(self.build_lib) / "biper"
        for name in ("recipes", "pretrained"):
            shutil.rmtree(biper / name, ignore_errors=True)
        for family in ("cifar10", "imagenet"):
            shutil.copytree(ROOT / family / "configs", biper / "recipes" / family / "configs")
        shutil.copytree(ROOT / "pretrained_models", biper / "pretrained")


PURE = os.environ.get("BIPER_PURE") == "1"  # a wheel for every platform, in which torch does all the work
setup(ext_modules=[] if PURE else [PACKED], cmdclass={"build_py": WithRecipesAndWeights})
