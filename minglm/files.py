"""Files and folders that are there whole or not at all, and their checksums. Nothing here needs torch.

They are written aside, folders also brought to the disk, and renamed, so that a crash, a kill or a full disk never costs what
was there before.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class WriteError(ValueError):
    """What cannot be written. The message names the file or folder and what to do."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole_lines(text: bytes) -> list[bytes]:
    """The lines of what is appended to line by line, without a last one that a kill has cut off: it has no newline."""
    return text.split(b"\n")[:-1]


def write_text_atomically(path: str | Path, text: str) -> None:
    """Whoever reads finds the old file or the new one, never half of one."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


@contextlib.contextmanager
def write_folder_atomically(folder: str | Path, size: int = 0) -> Iterator[Path]:
    """Yields an empty folder to write into; when the block ends, it becomes `folder`, and what `folder` held is gone.

    Until then, whatever happens (an exception, a kill, a power cut), `folder` stays as it was. `size`: about how many
    bytes will be written, to refuse at once what will not fit. One process at a time may write a given folder. Raises
    `WriteError` when the disk is full or `folder` is a file.

    A kill between the two renames at the end leaves the old folder named `.NAME.old`: `load_model` reads it there, and the
    next write puts it back.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise WriteError(f"{folder}: is a file; wanted a folder to write, or a name that is not taken")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_killed_writers(folder)
    new = folder.with_name(f"{_unfinished_prefix(folder)}{os.getpid()}-{secrets.token_hex(4)}")
    aside = old_folder(folder)
    if size > shutil.disk_usage(folder.parent).free:
        raise _disk_full(folder, size)
    try:
        new.mkdir()
        yield new
        _flush_to_disk(new)
        if folder.exists():
            os.rename(folder, aside)
        os.rename(new, folder)
        _fsync(folder.parent)
    except BaseException as error:
        full = _means_disk_full(error, folder.parent)
        size = max(size, sum(path.stat().st_size for path in new.rglob("*") if path.is_file()))
        shutil.rmtree(new, ignore_errors=True)
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        if full:
            raise _disk_full(folder, size) from error
        raise
    shutil.rmtree(aside, ignore_errors=True)  # if something is left of it, the next write removes it


def _unfinished_prefix(folder: Path) -> str:
    """Folders being written carry host and process in their names: a killed writer's can be told from a live one's."""
    return f".{folder.name}.writing-{socket.gethostname()}-"


def old_folder(folder: Path) -> Path:
    """Where the old folder is, for the moment between the two renames."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.old")


def _clean_up_after_killed_writers(folder: Path) -> None:
    """Put back a folder whose writer was killed between its renames, and remove what other killed writers left."""
    aside = old_folder(folder)
    if aside.exists():
        if folder.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, folder)
    prefix = _unfinished_prefix(folder)
    for path in sorted(folder.parent.iterdir()):
        match = re.fullmatch(re.escape(prefix) + r"(\d+)-[0-9a-f]+", path.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _flush_to_disk(folder: Path) -> None:
    """A rename can reach the disk before the data does; after this it cannot."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _means_disk_full(error: BaseException, where: Path) -> bool:
    """Python says so by errno, safetensors in words, and torch.save not at all: there, no free space is the sign."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, SafetensorError):
        return any(f"(os error {code})" in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
    return isinstance(error, RuntimeError) and shutil.disk_usage(where).free < 2**20


def _disk_full(folder: Path, size: int) -> WriteError:
    free = shutil.disk_usage(folder.parent).free
    return WriteError(
        f"{folder}: the disk is full: at least {size:,} bytes are needed, {free:,} are free. Make room or write "
        "elsewhere; nothing that was saved before is lost"
    )
