"""The compiled instructions of packed networks; everything else stands in pyproject.toml."""

from setuptools import Extension, setup

PACKED = Extension(
    "biper.packed._packed",
    ["biper/packed/packed.c"],
    depends=["biper/packed/packed_instructions.h"],
    # no contraction: every operation rounds as torch's. -fopenmp is not for the linker: torch brings its own OpenMP
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"],
    optional=True,  # without a compiler plain torch operations do the work
)
setup(ext_modules=[PACKED])
