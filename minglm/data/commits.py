"""Commits in diff form, made from files: something that the files hold is renamed, taken out or put in, and the difference
between the two states is written as `diff -u` writes it, under a line that says what was done."""

import ast
import difflib
import random
import re
from collections.abc import Sequence

WORDS = re.compile(r"[A-Za-z_]\w*")
LONGEST_DIFF = 100  # lines: longer ones say little that is new


Files = Sequence[tuple[str, str]]  # (path, text)


def commit(files: Files, rng: random.Random) -> tuple[Files, str] | None:
    """A change to `files`: the files as they are before it, and its message with the diff of each file that it touches.

    None where there is none to make that is short enough. What one state lacks, the other one has: both are real code.
    """
    for make in rng.sample([_rename, _take_out, _put_in], 3):
        change = make(files, rng)
        if change is not None:
            message, before, after = change
            diffs = [_diff(*old, new) for old, (_, new) in zip(before, after, strict=True) if old[1] != new]
            if diffs and sum(diff.count("\n") for diff in diffs) <= LONGEST_DIFF:
                return before, f"# commit: {message}\n" + "".join(diffs)
    return None


Change = tuple[str, Files, Files]  # message, before, after


def _diff(path: str, old: str, new: str) -> str:
    lines = difflib.unified_diff(_lines(old), _lines(new), f"a/{path}", f"b/{path}")
    return f"diff --git a/{path} b/{path}\n" + "".join(lines)


def _lines(text: str) -> list[str]:
    """As the document shows the file: blanks at its end count as none."""
    return [line + "\n" for line in text.rstrip().split("\n")]


def _rename(files: Files, rng: random.Random) -> Change | None:
    """A function or class of the first file, in all files: made private, or public where it was private."""
    names = [name for name, _, _ in _functions(files[0][1])]
    taken = {word for _, text in files for word in WORDS.findall(text)}
    rng.shuffle(names)
    for name in names:
        new = name.lstrip("_") if name.startswith("_") else f"_{name}"
        if new.isidentifier() and new not in taken and not name.startswith("__"):
            whole = re.compile(rf"\b{re.escape(name)}\b")
            return f"Rename `{name}` to `{new}`", files, [(path, whole.sub(new, text)) for path, text in files]
    return None


def _take_out(files: Files, rng: random.Random) -> Change | None:
    """A function of the last file that nothing else in the files names."""
    path, text = files[-1]
    everything = [word for _, text in files for word in WORDS.findall(text)]
    unused = [found for found in _functions(text) if everything.count(found[0]) == 1]
    if not unused:
        return None
    name, first, last = rng.choice(unused)
    lines = text.split("\n")
    while first > 1 and not lines[first - 2].strip():
        first -= 1
    without = "\n".join(lines[: first - 1] + lines[last:])
    if not without.strip():
        return None
    return f"Remove `{name}`, which is not used", files, [*files[:-1], (path, without)]


def _put_in(files: Files, rng: random.Random) -> Change | None:
    """The same read backwards: the document's files are the state after the commit."""
    change = _take_out(files, rng)
    if change is None:
        return None
    name = change[0].split("`")[1]
    return f"Add `{name}`", change[2], change[1]


def _functions(text: str) -> list[tuple[str, int, int]]:
    """Name, first and last line (from 1) of each top-level function and class, decorators included."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.append((node.name, first, node.end_lineno or node.lineno))
    return found
