"""Writes a folder with a packed network in it that is a web page, and a module for Node."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from biper.errors import UsageError, one_line
from biper.files import folder_atomically, require_empty
from biper.packed.c.export import export_c, name_of
from biper.packed.c.plan import Plan
from biper.packed.network import PackedNetwork

HERE = Path(__file__).parent
COMPILERS = ("clang", *(f"clang-{version}" for version in range(23, 12, -1)))
FLAGS = ("--target=wasm32", "-std=c99", "-O2", "-ffp-contract=off", "-ffreestanding", "-nostdlib")
LINKER = ("-Wl,--no-entry", "-Wl,--strip-all", "-Wl,--stack-first")
VERSIONS = {"simd.wasm": ("-msimd128",), "plain.wasm": ()}  # code alone
NUMBERS = "network.bin"  # what memory holds at the start, the same for both: behind either it makes a whole module
MAGIC, DATA = 8, 11  # bytes before a module's first section; the kind of the section of what memory holds
FACTS = "biper"  # the name of a section of our own, with what is known of the network


def export_web(
    packed: PackedNetwork,
    folder: str | os.PathLike[str],
    *,
    shorter: int | None = None,
    image_size: int | None = None,
) -> None:
    """Write a folder that any web server can serve: a page that shows what a network sees, and biper.mjs for Node.

    shorter: the page resizes an image's shorter side to it and cuts the centre out; 0: it resizes the whole image to a
    square; by default the side of the network's images. image_size: as `export_c` has it. Raises UsageError for a
    folder that is not empty, a network that C cannot compute, and where there is no clang that compiles to WebAssembly;
    then nothing is written.
    """
    target = Path(folder)
    require_empty(target)
    compiler = find_clang()
    with folder_atomically(target) as page, tempfile.TemporaryDirectory() as place:
        source = Path(place) / "c"
        made = export_c(packed, source, image_size=image_size)
        parts = [_split(_compile(compiler, flags, name_of(packed), made, source)) for flags in VERSIONS.values()]
        _write_network(page, parts, json.dumps(_facts(packed, made, shorter)))
        _write_page(page)


def find_clang() -> str:
    """A clang that compiles to WebAssembly. Raises UsageError if there is none, saying why."""
    why = "there is no clang"
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "nothing.c"
        source.write_text("")
        for name in COMPILERS:
            if not (found := shutil.which(name)):
                continue
            failed = _run([found, *FLAGS, "-msimd128", *LINKER, "-o", f"{place}/nothing.wasm", str(source)])
            if failed is None:
                return found
            why = f"{found} says: {failed}"
    raise UsageError(f"a web page needs clang and lld, which compile to WebAssembly (Debian: clang and lld): {why}")


def _run(command: Sequence[str]) -> str | None:
    """The first line of what is wrong; None if all went well."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return None
    return one_line(RuntimeError(done.stderr or f"it ended with {done.returncode}"))


def _compile(clang: str, flags: Sequence[str], name: str, made: Plan, source: Path) -> bytes:
    """Compile a network's folder of C with what JavaScript calls: a WebAssembly module."""
    shutil.copy(HERE / "web.c", source)
    target = source / "network.wasm"
    _, height, width = made.image.shape
    sizes = {"PIXELS": 3 * height * width, "CLASSES": made.logits.shape[0], "ARENA": made.arena}
    given = [f"-DRUN={name}_run_pixels", *(f"-D{key}={value}" for key, value in sizes.items())]
    files = [str(source / file) for file in ("web.c", "kernels.c")]
    failed = _run([clang, *FLAGS, *flags, *given, *LINKER, "-o", str(target), *files])
    if failed is not None:
        raise UsageError(f"this network was not compiled to WebAssembly: {clang} says: {failed}")
    return target.read_bytes()


def _split(module: bytes) -> tuple[bytes, bytes]:
    """A module's code, and its last sections from what memory holds at the start on."""
    at = MAGIC
    while at < len(module) and module[at] != DATA:
        length, begin = _read_unsigned(module, at + 1)
        at = begin + length
    return module[:at], module[at:]


def _write_network(folder: Path, parts: Sequence[tuple[bytes, bytes]], facts: str) -> None:
    """The code of each version, and what they share. parts: of each of VERSIONS, as `_split` gives them."""
    shared = parts[0][1]
    if any(data != shared for _, data in parts):
        raise UsageError("this clang lays memory out differently with SIMD and without: try another version of it")
    for file, (code, _) in zip(VERSIONS, parts, strict=True):
        (folder / file).write_bytes(code)
    name = FACTS.encode()
    section = _unsigned(len(name)) + name + facts.encode()
    (folder / NUMBERS).write_bytes(shared + b"\0" + _unsigned(len(section)) + section)


def _facts(packed: PackedNetwork, made: Plan, shorter: int | None) -> dict[str, object]:
    """What JavaScript needs to know of a network, and cannot read in its memory."""
    _, height, width = made.image.shape
    count, m = made.logits.shape[0], packed.metadata
    names = (m.class_names or m.classes if m else ()) or tuple(map(str, range(count)))
    return {
        "name": name_of(packed),
        "classes": list(names),
        "height": height,
        "width": width,
        "shorter": height if shorter is None else shorter,
        "layers": [str(call.nodes[0].target) for call in made.calls if call.kind == "binary"],
    }


def _unsigned(number: int) -> bytes:
    """A number as WebAssembly writes it (LEB128): seven bits a byte, the lowest first; the eighth: more follow."""
    parts = [number & 127]
    while number := number >> 7:
        parts.append(number & 127)
    return bytes([part | 128 for part in parts[:-1]] + parts[-1:])


def _read_unsigned(module: bytes, at: int) -> tuple[int, int]:
    """A number that WebAssembly wrote, and where it ends."""
    number, shift = 0, 0
    while True:
        number |= (module[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if module[at - 1] < 128:
            return number, at


def _write_page(folder: Path) -> None:
    """The page's files beside the network; what keeps them for use without a network names them and their sum."""
    files = sorted((HERE / "files").iterdir())
    for path in files:
        shutil.copyfile(path, folder / path.name)
    keeper = folder / "offline.js"
    kept = sorted(path.name for path in folder.iterdir() if path != keeper and path.suffix not in (".mjs", ".json"))
    total = hashlib.sha256(b"".join((folder / name).read_bytes() for name in kept)).hexdigest()
    text = keeper.read_text(encoding="utf-8").replace("FILES_", json.dumps(kept)).replace("VERSION_", total[:16])
    keeper.write_text(text, encoding="utf-8")
