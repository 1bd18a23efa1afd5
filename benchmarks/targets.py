"""Compilers for C that was exported, and the emulated machines that run what they make."""

from dataclasses import dataclass
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/cortex_m"
SEMIHOSTING = ("-nographic", "-semihosting-config", "enable=on,target=native", "-kernel")
M4 = ("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")
M7 = ("-mcpu=cortex-m7", "-mthumb", "-mfpu=fpv5-d16", "-mfloat-abi=hard")
CORTEX_M = ("--specs=rdimon.specs", "-T", str(EXAMPLE / "link.ld"), str(EXAMPLE / "startup.c"))
VIRT = {"__flash": 0x80000000, "__flash_size": 0x400000, "__ram": 0x80400000, "__ram_size": 0x400000}
PICOLIBC = ("--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted", "-mcmodel=medany")
RISCV = (*PICOLIBC, *(f"-Wl,--defsym={name}={number}" for name, number in VIRT.items()))


@dataclass(frozen=True)
class Target:
    """How a program is made and run. reads: whether it can read a file there; if not, images are compiled in."""

    compile: tuple[str, ...]
    run: tuple[str, ...] = ()
    reads: bool = True


def board(machine: str, *flags: str) -> Target:
    """A Cortex-M board that qemu has."""
    return Target(("arm-none-eabi-gcc", *flags, *CORTEX_M), ("qemu-system-arm", "-M", machine, *SEMIHOSTING), False)


def riscv(bits: int, *flags: str) -> Target:
    """A bare RISC-V machine."""
    emulator = (f"qemu-system-riscv{bits}", "-M", "virt", "-bios", "none", *SEMIHOSTING)
    return Target(("riscv64-unknown-elf-gcc", *flags, *RISCV), emulator, False)


TARGETS = {
    "Cortex-M4F": board("mps2-an386", "-Os", *M4),
    "Cortex-M7": board("mps2-an500", "-O2", *M7),
    "RV32 without floats": riscv(32, "-Os", "-march=rv32imac", "-mabi=ilp32"),
    "RV64": riscv(64, "-O2", "-march=rv64gc", "-mabi=lp64d"),
    "AArch64": Target(("aarch64-linux-gnu-gcc", "-O2", "-static"), ("qemu-aarch64",)),
    "s390x, big-endian": Target(("s390x-linux-gnu-gcc", "-O2", "-static", "-fexcess-precision=fast"), ("qemu-s390x",)),
    "gcc": Target(("gcc", "-O2")),
    "gcc for this processor": Target(("gcc", "-O3", "-march=native")),
    "clang": Target(("clang", "-O3", "-march=native")),
    "gcc with sanitizers": Target(("gcc", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")),
}
