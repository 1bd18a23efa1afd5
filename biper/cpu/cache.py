"""Where compiled libraries are kept. What is loaded runs: so it must be whole, and this user's own."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from biper.places import users_folder

SEAL = hashlib.sha256().digest_size  # bytes behind a library: the loader ignores them


def cache_folder() -> Path:
    """A folder of this user that nobody else can write to: in the home folder, or else in the temporary one.

    Raises OSError, saying why, if there is neither.
    """
    try:
        return _private(users_folder("XDG_CACHE_HOME", ".cache"))
    except (OSError, RuntimeError):  # the latter where a user has no home
        return _private(Path(tempfile.gettempdir()) / f"biper-{os.getuid()}")


def keep(library: Path, place: Path) -> None:
    """Move a library to its place in the cache, sealed: there at once and whole, or not at all."""
    with library.open("rb+") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())  # on disk before its name is, or a power cut leaves an empty file
    library.chmod(0o644)  # whatever the umask
    library.replace(place)


def is_kept(place: Path) -> bool:
    """Whether a library is there as `keep` wrote it: a damaged one would end the process without a word."""
    if not place.is_file() or not _only_ours(place.lstat()):
        return False
    content = place.read_bytes()
    return hashlib.sha256(content[:-SEAL]).digest() == content[-SEAL:]


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or not _only_ours(found):
        raise OSError(f"{folder} could be written to by others")
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} cannot be written to")
    return folder


def _only_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.getuid() and not found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode)
