"""Whether the bytes of a checkpoint are those that were written.

torch reads a damaged checkpoint as if nothing were wrong. Ours state a SHA-256 of all that comes before it, in the
comment at the end of the zip archive, which every reader of zip passes over. Earlier ones, and the paper's, have a
CRC-32 for each record of the archive; torch's format before zip has nothing.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from biper.errors import UsageError

LABEL, DIGITS = b"biper sha256 ", 64
BLOCK = 1 << 20  # bytes
STATED = (len(LABEL) + DIGITS).to_bytes(2, "little") + LABEL  # as a zip archive has a comment of this length
REACH = 1 << 17  # bytes at the end, in which the statement is looked for; readers of zip look less far for its end
FOLDER = 0x10  # a bit of a record's attributes


def seal(path: Path) -> None:
    """Write its SHA-256 at the end of an archive of torch.save."""
    with path.open("rb+") as file:
        file.seek(-2, os.SEEK_END)  # where the length of the comment is
        file.write(STATED)
        file.write(_sha256(file, file.tell()))


def require_whole(file: BinaryIO, path: Path) -> None:
    """Raise UsageError unless an open file has the contents of its checksums; path: what it is called."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - REACH))
    end = file.read()
    file.seek(0)
    if STATED in end:  # if elsewhere than it should be, something was cut off or added
        whole = _sha256(file, size - DIGITS) == end[-DIGITS:] and end[:-DIGITS].endswith(STATED)
    else:
        whole = file.read(2) != b"PK" or _records_are_whole(file, size)
    if not whole:
        raise UsageError(f"{path} is damaged: its contents do not have the checksum that it states")
    file.seek(0)


def _sha256(file: BinaryIO, size: int) -> bytes:
    """That of the first `size` bytes, in hexadecimal digits. The file is left behind them."""
    digest, left = hashlib.sha256(), size
    file.seek(0)
    while left and (block := file.read(min(left, BLOCK))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def _records_are_whole(file: BinaryIO, size: int) -> bool:
    """Whether the records of an archive have their CRCs. Raises what zipfile does where it is no archive."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > size:  # torch compresses nothing: it would fill the memory
            return False
        if any(record.external_attr & FOLDER for record in records):  # of which torch reads nothing, without a word
            return False
        for record in records:
            if record.CRC == 0:  # torch.serialization.set_crc32_options(False) leaves them out
                continue
            try:
                with archive.open(record) as stream:
                    while stream.read(BLOCK):
                        pass
            except zipfile.BadZipFile:
                return False
    return True
