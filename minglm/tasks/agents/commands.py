"""The commands of the small shell. Each takes the file system, its arguments, and what a pipe brings (None: nothing does),
and returns what it prints. `grep` looks for plain text, not for patterns."""

import itertools
import posixpath
from collections.abc import Callable

from minglm.tasks.agents.files import FileSystem, ShellError, matches


def options(arguments: list[str], known: str) -> tuple[set[str], list[str]]:
    """Letters behind "-", and the rest."""
    letters: set[str] = set()
    rest: list[str] = []
    for argument in arguments:
        if argument.startswith("-") and len(argument) > 1:
            letters |= set(argument[1:])
        else:
            rest.append(argument)
    for letter in sorted(letters - set(known)):
        raise ShellError(f"-{letter}: no such option")
    return letters, rest


def _texts(system: FileSystem, paths: list[str], given: str | None) -> list[tuple[str, str]]:
    """Names and contents of files; of what a pipe brings where none is named."""
    if paths:
        return [(path, system.read(path)) for path in paths]
    if given is None:
        raise ShellError("a file is missing")
    return [("", given)]


def _lines(texts: list[tuple[str, str]]) -> list[str]:
    return [line for _, text in texts for line in text.splitlines()]


def _joined(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def pwd(system: FileSystem, arguments: list[str], given: str | None) -> str:
    return system.folder + "\n"


def cd(system: FileSystem, arguments: list[str], given: str | None) -> str:
    path = system.path(arguments[0]) if arguments else "/"
    if path not in system.folders:
        raise ShellError(f"{path}: no such folder")
    system.folder = path
    return ""


def ls(system: FileSystem, arguments: list[str], given: str | None) -> str:
    _, paths = options(arguments, "a1l")
    lines: list[str] = []
    for text in paths or ["."]:
        path = system.path(text)
        if path in system.folders:
            inside = system.names(path)
            lines += [name + "/" if posixpath.join(path, name) in system.folders else name for name in inside]
        else:
            system.read(text)
            lines.append(text)
    return _joined(lines)


def cat(system: FileSystem, arguments: list[str], given: str | None) -> str:
    return "".join(text for _, text in _texts(system, arguments, given))


def echo(system: FileSystem, arguments: list[str], given: str | None) -> str:
    return " ".join(arguments) + "\n"


def mkdir(system: FileSystem, arguments: list[str], given: str | None) -> str:
    letters, paths = options(arguments, "p")
    for text in paths:
        path = system.path(text)
        if path in system.files or (path in system.folders and "p" not in letters):
            raise ShellError(f"{text}: is there already")
        if "p" in letters:
            parts = path.strip("/").split("/")
            for depth in range(1, len(parts)):
                parent = "/" + "/".join(parts[:depth])
                if parent in system.files:
                    raise ShellError(f"{parent}: is a file")
                system.make(parent)
        system.make(path)
    return ""


def touch(system: FileSystem, arguments: list[str], given: str | None) -> str:
    for text in arguments:
        path = system.path(text)
        if path not in system.folders:
            system.write(path, system.files.get(path, ""))
    return ""


def rm(system: FileSystem, arguments: list[str], given: str | None) -> str:
    letters, paths = options(arguments, "rf")
    for text in paths:
        path = system.path(text)
        if path in system.folders:
            if "r" not in letters:
                raise ShellError(f"{text}: is a folder; -r removes it")
            if system.folder in system.below(path):
                raise ShellError(f"{text}: one is in it")
            for name in system.below(path):
                system.files.pop(name, None)
                system.folders.discard(name)
        elif path in system.files:
            del system.files[path]
        elif "f" not in letters:
            raise ShellError(f"{text}: no such file")
    return ""


def mv(system: FileSystem, arguments: list[str], given: str | None) -> str:
    for source, goal in _pairs(system, arguments):
        _place(system, source, goal)
        moved = system.below(source)
        if system.folder in moved:
            system.folder = goal + system.folder.removeprefix(source)
        for name in moved:
            new = goal + name.removeprefix(source)
            if name in system.files:
                system.files[new] = system.files.pop(name)
            else:
                system.folders.discard(name)
                system.folders.add(new)
    return ""


def cp(system: FileSystem, arguments: list[str], given: str | None) -> str:
    letters, paths = options(arguments, "r")
    for source, goal in _pairs(system, paths):
        if source in system.folders and "r" not in letters:
            raise ShellError(f"{source}: is a folder; -r copies it")
        _place(system, source, goal)
        for name in system.below(source):
            new = goal + name.removeprefix(source)
            if name in system.files:
                system.write(new, system.files[name])
            else:
                system.make(new)
    return ""


def _pairs(system: FileSystem, paths: list[str]) -> list[tuple[str, str]]:
    """From and to, for mv and cp."""
    if len(paths) < 2:
        raise ShellError("wanted what and where to")
    *sources, goal = map(system.path, paths)
    into = goal in system.folders
    if len(sources) > 1 and not into:
        raise ShellError(f"{goal}: no such folder")
    return [(source, posixpath.join(goal, posixpath.basename(source)) if into else goal) for source in sources]


def _place(system: FileSystem, source: str, goal: str) -> None:
    """Refuse a move or copy that cannot be made."""
    if source not in system.files and source not in system.folders:
        raise ShellError(f"{source}: no such file")
    if source == "/" or goal == source or goal.startswith(source + "/"):
        raise ShellError(f"{source}: cannot go to {goal}")
    if goal in system.folders or (source in system.folders and goal in system.files):
        raise ShellError(f"{goal}: is there already")
    if posixpath.dirname(goal) not in system.folders:
        raise ShellError(f"{posixpath.dirname(goal)}: no such folder")


def grep(system: FileSystem, arguments: list[str], given: str | None) -> str:
    """-r: all files of folders; -l: names of files that have it; -c: how many lines; -v: lines without it; -i: any case."""
    letters, rest = options(arguments, "rlcvi")
    if not rest:
        raise ShellError("wanted what to look for")
    wanted, *paths = rest
    if "r" in letters:
        paths = [name for text in paths or ["."] for name in _files_below(system, text)]
        if not paths:
            return "0\n" if "c" in letters else ""
    fold = str.lower if "i" in letters else str
    printed: list[str] = []
    texts = _texts(system, paths, given)
    names_shown = len(texts) > 1 or "r" in letters
    for name, text in texts:
        found = [line for line in text.splitlines() if (fold(wanted) in fold(line)) != ("v" in letters)]
        prefix = f"{name}:" if names_shown else ""
        if "l" in letters:
            printed += [name] if found else []
        elif "c" in letters:
            printed.append(f"{prefix}{len(found)}")
        else:
            printed += [prefix + line for line in found]
    return _joined(printed)


def _files_below(system: FileSystem, text: str) -> list[str]:
    """The files of a folder, all the way down, named from where one is as the argument does."""
    path = system.path(text)
    if path in system.files:
        return [text]
    if path not in system.folders:
        raise ShellError(f"{text}: no such folder")
    inside = [name for name in system.below(path) if name in system.files]
    below = [name.removeprefix(path).lstrip("/") for name in inside]
    return below if text == "." else [posixpath.join(text, name) for name in below]


def head(system: FileSystem, arguments: list[str], given: str | None) -> str:
    count, paths = _count(arguments)
    return _joined(_lines(_texts(system, paths, given))[:count])


def tail(system: FileSystem, arguments: list[str], given: str | None) -> str:
    count, paths = _count(arguments)
    lines = _lines(_texts(system, paths, given))
    return _joined(lines[max(len(lines) - count, 0) :])


def _count(arguments: list[str]) -> tuple[int, list[str]]:
    """-n 3 or -3; 10 where it is not given."""
    if not arguments or not arguments[0].startswith("-"):
        return 10, arguments
    first, *rest = arguments
    digits = first[1:].removeprefix("n")
    if not digits and rest:
        digits, *rest = rest
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 6):
        raise ShellError("wanted a number of lines, as in -n 3")
    return int(digits), rest


def wc(system: FileSystem, arguments: list[str], given: str | None) -> str:
    """-l: lines; -w: words; -c: characters; all three where none is given."""
    letters, paths = options(arguments, "lwc")
    measures = {"l": lambda text: len(text.splitlines()), "w": lambda text: len(text.split()), "c": len}
    chosen = [measures[letter] for letter in measures if letter in letters or not letters]
    rows = [([measure(text) for measure in chosen], name) for name, text in _texts(system, paths, given)]
    if len(rows) > 1:
        rows.append(([sum(column) for column in zip(*(counts for counts, _ in rows), strict=True)], "total"))
    return _joined([" ".join([*map(str, counts), name]).rstrip() for counts, name in rows])


def sort(system: FileSystem, arguments: list[str], given: str | None) -> str:
    """-r: backwards; -u: equal lines once."""
    letters, paths = options(arguments, "ru")
    lines = _lines(_texts(system, paths, given))
    return _joined(sorted(set(lines) if "u" in letters else lines, reverse="r" in letters))


def uniq(system: FileSystem, arguments: list[str], given: str | None) -> str:
    """Of equal lines one after another only one; -c: with how many there were."""
    letters, paths = options(arguments, "c")
    groups = [(line, len(list(group))) for line, group in itertools.groupby(_lines(_texts(system, paths, given)))]
    return _joined([f"{count} {line}" if "c" in letters else line for line, count in groups])


def find(system: FileSystem, arguments: list[str], given: str | None) -> str:
    """find [FOLDER] [-name PATTERN]: files below a folder."""
    pattern = "*"
    if "-name" in arguments:
        at = arguments.index("-name")
        if at + 2 != len(arguments):
            raise ShellError("-name wants one pattern behind it, at the end")
        pattern, arguments = arguments[-1], arguments[:at]
    folder = arguments[0] if arguments else "."
    return _joined([name for name in _files_below(system, folder) if matches(posixpath.basename(name), pattern)])


COMMANDS: dict[str, Callable[[FileSystem, list[str], str | None], str]] = {
    function.__name__: function
    for function in (ls, cat, grep, head, tail, wc, sort, uniq, find, echo, touch, mkdir, mv, cp, rm, cd, pwd)
}
