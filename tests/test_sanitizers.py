"""The packed networks' instructions on random cases, with and without sanitizers: see packed_properties.c."""

import os
import subprocess
from pathlib import Path

import pytest

from biper.compilers import find_compiler
from biper.errors import CompilerMissing
from biper.packed import runtime as kernels

SOURCE = Path(__file__).with_name("packed_properties.c")
FLAGS = "-fopenmp", "-ffp-contract=off", "-Wno-psabi"  # as in setup.py
SANITIZED = "-g1", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
NO_LEAKS = "LeakSanitizer has encountered a fatal error"  # what it says where processes may not be traced


def compiled(folder, *flags):
    try:
        compiler = find_compiler()
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    program, empty = folder / "properties", folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    probe = subprocess.run(
        [*compiler, *FLAGS, *flags, empty, "-o", program], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"{compiler[0]} cannot link this: {probe.stderr[-200:]}")
    subprocess.run([*compiler, *FLAGS, *flags, SOURCE, "-lm", "-o", program], check=True)
    return program


def run(program, cases, seed, **options):
    # threads that wait give way: there may be more of them than cores
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **options}
    command = [program, str(cases), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def check(done, cases):
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    paths = kernels.available()[:-1] or ("plain",)  # without torch's
    assert {f"path {name}: {cases} cases" for name in paths} <= set(done.stdout.splitlines())


def test_as_it_is_installed(tmp_path):
    check(run(compiled(tmp_path, "-O3", "-fno-math-errno"), 1500, 1), 1500)


def test_addresses_leaks_and_undefined_behaviour(tmp_path):
    program = compiled(tmp_path, *SANITIZED)
    done = run(program, 250, 10_000)
    if NO_LEAKS in done.stderr:
        done = run(program, 250, 10_000, ASAN_OPTIONS="detect_leaks=0")
    check(done, 250)
