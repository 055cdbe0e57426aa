"""A file system in memory: files, folders, and where one is. Nothing outside this object is read or written."""

import posixpath
from collections.abc import Mapping, Sequence

LONGEST_FILE = 10_000  # characters, and of what goes through a pipe
MOST_ENTRIES = 200  # files and folders


class ShellError(ValueError):
    """What a command prints instead of its output."""


class FileSystem:
    """files: content by path; folders: paths. Paths are absolute; "/" is always there."""

    def __init__(self, files: Mapping[str, str], folders: Sequence[str] = ()):
        self.files = dict(files)
        self.folders = {"/", *folders}
        self.folder = "/"  # where one is

    def path(self, text: str) -> str:
        return posixpath.normpath(posixpath.join(self.folder, text)).replace("//", "/")

    def names(self, folder: str) -> list[str]:
        """What is in a folder, sorted."""
        return sorted(
            posixpath.basename(path)
            for path in (*self.files, *self.folders)
            if path != "/" and posixpath.dirname(path) == folder
        )

    def read(self, text: str) -> str:
        path = self.path(text)
        if path in self.folders:
            raise ShellError(f"{text}: is a folder")
        if path not in self.files:
            raise ShellError(f"{text}: no such file")
        return self.files[path]

    def write(self, path: str, content: str) -> None:
        self._check_place(path)
        if path in self.folders:
            raise ShellError(f"{path}: is a folder")
        if len(content) > LONGEST_FILE:
            raise ShellError(f"{path}: larger than {LONGEST_FILE} characters")
        self.files[path] = content

    def make(self, path: str) -> None:
        self._check_place(path)
        self.folders.add(path)

    def below(self, path: str) -> list[str]:
        """A folder and all that is in it, or a file; sorted."""
        inside = path.rstrip("/") + "/"
        return sorted(name for name in (*self.files, *self.folders) if name == path or name.startswith(inside))

    def _check_place(self, path: str) -> None:
        if posixpath.dirname(path) not in self.folders:
            raise ShellError(f"{posixpath.dirname(path)}: no such folder")
        is_new = path not in self.files and path not in self.folders
        if is_new and len(self.files) + len(self.folders) >= MOST_ENTRIES:
            raise ShellError("the disk is full")


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern in which `*` stands for any text. In linear time: each piece is found greedily."""
    first, *others = pattern.split("*")
    if not others:
        return name == pattern
    if not name.startswith(first):
        return False
    *middle, last = others
    position = len(first)
    for piece in middle:
        found = name.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return len(name) - position >= len(last) and name.endswith(last)
