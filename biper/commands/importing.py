"""A user's own file, imported by --import: it registers a quantizer or a model under a name."""

import hashlib
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from biper.errors import UsageError, one_line


def import_file(path: Path) -> None:
    """Run a Python file as a module, once: a second time it is left alone.

    The module's name is made of the file's place, so it takes no other module's; what lies beside the file can be
    imported by it. Raises UsageError naming file and line if the file is missing, is not Python, or raises.
    """
    if not path.is_file():
        raise UsageError(f"--import {path}: " + ("that is a folder" if path.is_dir() else "there is no such file"))
    file = path.resolve()
    name = f"imported_{re.sub(r'[^a-zA-Z0-9_]', '_', file.stem)}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    if name in sys.modules:
        return
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # at the end, where it hides nothing
    try:
        exec(compile(file.read_bytes(), str(file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(f"--import {path}{_line_of(error, file)}: {_said_by(error, file)}") from error


def _line_of(error: BaseException, file: Path) -> str:
    """The line of the file on which it failed; empty if Python does not say."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}" if error.lineno else ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""


def _said_by(error: BaseException, file: Path) -> str:
    if isinstance(error, UsageError):
        return one_line(error)
    if isinstance(error, SyntaxError) and error.filename == str(file):  # of another file Python names the place
        return f"{type(error).__name__}: {error.msg}"
    return f"{type(error).__name__}: {one_line(error)}"
