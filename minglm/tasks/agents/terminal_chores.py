"""What is asked for at a terminal: each chore draws its names from a tree of files, and says how it is done and what the
files are afterwards. The latter is computed here on a dictionary, not by the shell, so that each checks the other."""

import posixpath
import random
from collections.abc import Callable
from dataclasses import dataclass

WORDS = tuple(
    "lamp river stone bread cloud horse apple queen metal night tiger onion glass paper snow tree wolf boat drum fire".split()
)
NAMES = tuple("notes list plan data log book mail todo menu song code page".split())
FOLDERS = ("docs", "work", "home", "old")
NUMBERS = tuple(str(number) for number in range(1, 7))
Files = dict[str, str]


@dataclass(frozen=True)
class Chore:
    """question: asked. commands: thinking and command of each step. answer: the right last word; of a question also its
    form, and a pool of which a guess takes one. files_after, folders_after: the tree at the end."""

    question: str
    commands: tuple[tuple[str, str], ...]
    files_after: tuple[tuple[str, str], ...]
    folders_after: tuple[str, ...]
    answer: str = "done"
    form: str = ""
    pool: tuple[str, ...] = ()
    conclusion: str = "Done."


Maker = Callable[[random.Random, Files, tuple[str, ...]], Chore | None]
"""Draws a chore for the files and folders, to which it may add some; None if there is none of its kind for them."""


def draw_tree(rng: random.Random, difficulty: int) -> tuple[Files, tuple[str, ...]]:
    """Files with lines of one word, from two at the top to eight in folders."""
    count = (2, 3, 5, 6, 8)[difficulty - 1]
    folders = ["/" + name for name in rng.sample(FOLDERS, difficulty // 2)]
    lines = (1, 4, 4, 5, 6)[difficulty - 1]
    files: Files = {}
    while len(files) < count:
        path = posixpath.join(rng.choice(["/", "/", *folders]), f"{rng.choice(NAMES)}.{rng.choice(('txt', 'txt', 'log'))}")
        files[path] = "".join(rng.choice(WORDS) + "\n" for _ in range(rng.randint(1, lines)))
    return files, tuple(sorted(folders))


def _ask(question: str, steps: list[tuple[str, str]], before: tuple[Files, tuple[str, ...]], form: str, answer: str) -> Chore:
    """A question: the tree stays as it is."""
    files, folders = before
    pool = {"word": WORDS, "number": NUMBERS, "path": tuple(sorted(_short(path) for path in files))}[form]
    return Chore(question, tuple(steps), tuple(sorted(files.items())), folders, answer, form, pool, f"It is {answer}.")


def _change(question: str, steps: list[tuple[str, str]], files: Files, folders: tuple[str, ...]) -> Chore:
    return Chore(question, tuple(steps), tuple(sorted(files.items())), tuple(sorted(folders)))


def _short(path: str) -> str:
    return path.removeprefix("/")


def _new_name(rng: random.Random, files: Files) -> str:
    return rng.choice([path for name in NAMES if (path := f"/{name}.txt") not in files])


def _lines(text: str) -> list[str]:
    return text.splitlines()


def _holding(files: Files, word: str) -> list[str]:
    return [path for path, text in sorted(files.items()) if word in _lines(text)]


# ---------------------------------------------------------------------------------------------- one file, one command


def read_word(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    path = rng.choice(sorted(files))
    question = f"Which word is in {_short(path)}?"
    return _ask(question, [("Read the file.", f"cat {_short(path)}")], (files, folders), "word", files[path].strip())


def write_word(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    path, word = _new_name(rng, files), rng.choice(WORDS)
    question = f"Write the word {word} into a new file {_short(path)}."
    return _change(question, [("Write the file.", f"echo {word} > {_short(path)}")], files | {path: word + "\n"}, folders)


def remove(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    path = rng.choice(sorted(files))
    left = {name: text for name, text in files.items() if name != path}
    return _change(f"Delete {_short(path)}.", [("Remove the file.", f"rm {_short(path)}")], left, folders)


def count_lines(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    path = rng.choice(sorted(files))
    steps = [("Count the lines.", f"wc -l {_short(path)}")]
    return _ask(f"How many lines has {_short(path)}?", steps, (files, folders), "number", str(len(_lines(files[path]))))


def rename(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    path, new = rng.choice(sorted(files)), _new_name(rng, files)
    after = {new if name == path else name: text for name, text in files.items()}
    question = f"Rename {_short(path)} to {_short(new)}."
    return _change(question, [("Move it to the new name.", f"mv {_short(path)} {_short(new)}")], after, folders)


def move_into(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    tops = [path for path in sorted(files) if posixpath.dirname(path) == "/"]
    if not tops or not folders:
        return None
    path, folder = rng.choice(tops), rng.choice(folders)
    new = posixpath.join(folder, _short(path))
    if new in files:
        return None
    after = {new if name == path else name: text for name, text in files.items()}
    question = f"Move {_short(path)} into the folder {_short(folder)}."
    return _change(question, [("Move the file.", f"mv {_short(path)} {_short(folder)}")], after, folders)


# ------------------------------------------------------------------------------------------------- lines and many files


def which_holds(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    word = rng.choice(WORDS)
    paths = _holding(files, word)
    if len(paths) != 1:
        return None
    steps = [("Search all files.", f"grep -rl {word}")]
    return _ask(f"Which file holds the word {word}?", steps, (files, folders), "path", _short(paths[0]))


def count_word(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    path = rng.choice(sorted(files))
    word = rng.choice(_lines(files[path]))
    question = f"How many lines of {_short(path)} are {word}?"
    steps = [("Count the lines with it.", f"grep -c {word} {_short(path)}")]
    return _ask(question, steps, (files, folders), "number", str(_lines(files[path]).count(word)))


def append_word(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    path, word = rng.choice(sorted(files)), rng.choice(WORDS)
    question = f"Add the line {word} at the end of {_short(path)}."
    steps = [("Add it with >>.", f"echo {word} >> {_short(path)}")]
    return _change(question, steps, files | {path: files[path] + word + "\n"}, folders)


def count_named(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    ending = rng.choice(("txt", "log"))
    count = sum(path.endswith(ending) for path in files)
    if str(count) not in NUMBERS:
        return None
    steps = [("Find them and count.", f"find -name '*.{ending}' | wc -l")]
    return _ask(f"How many .{ending} files are there in all folders?", steps, (files, folders), "number", str(count))


def total(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    word = rng.choice(WORDS)
    count = sum(_lines(text).count(word) for text in files.values())
    if str(count) not in NUMBERS or len(_holding(files, word)) < 2:
        return None
    steps = [("Search all files, count the lines.", f"grep -r {word} | wc -l")]
    return _ask(f"How many lines of all files together are {word}?", steps, (files, folders), "number", str(count))


def last_line(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    word = rng.choice(WORDS)
    paths = _holding(files, word)
    if len(paths) != 1 or (last := _lines(files[paths[0]])[-1]) == word:
        return None
    steps = [("Which file is it?", f"grep -rl {word}"), (f"It is {_short(paths[0])}.", f"tail -n 1 {_short(paths[0])}")]
    return _ask(f"What is the last line of the file that holds the word {word}?", steps, (files, folders), "word", last)


# ------------------------------------------------------------------------------------------------ several commands


def move_all(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    ending, name = rng.choice(("txt", "log")), rng.choice(("box", "store"))
    moved = [path for path in files if posixpath.dirname(path) == "/" and path.endswith(ending)]
    if not moved:
        return None
    after = {f"/{name}{path}" if path in moved else path: text for path, text in files.items()}
    steps = [("Make the folder.", f"mkdir {name}"), ("Move the files.", f"mv *.{ending} {name}")]
    question = f"Make a folder {name} and move the .{ending} files of the top folder into it."
    return _change(question, steps, after, (*folders, f"/{name}"))


def remove_holding(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    word = rng.choice(WORDS)
    paths = _holding(files, word)
    if not 1 <= len(paths) <= 2:
        return None
    names = " ".join(map(_short, paths))
    steps = [("Which files are it?", f"grep -rl {word}"), (f"Remove {names}.", f"rm {names}")]
    left = {path: text for path, text in files.items() if path not in paths}
    return _change(f"Delete every file that holds the word {word}.", steps, left, folders)


def report(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    word, new = rng.choice(WORDS), _new_name(rng, files)
    count = sum(_lines(text).count(word) for text in files.values())
    if count == 0:
        return None
    steps = [
        ("How many are there?", f"grep -r {word} | wc -l"),
        (f"There are {count}. Write it.", f"echo {count} > {_short(new)}"),
    ]
    question = f"Write into a new file {_short(new)} how many lines of all files together are {word}."
    return _change(question, steps, files | {new: f"{count}\n"}, folders)


def sort_lines(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    word, new = rng.choice(WORDS), _new_name(rng, files)
    paths = _holding(files, word)
    if len(paths) != 1:
        return None
    name, lines = _short(paths[0]), sorted(set(_lines(files[paths[0]])))
    steps = [("Which file is it?", f"grep -rl {word}"), (f"It is {name}.", f"sort {name} | uniq > {_short(new)}")]
    question = (
        f"Take the file that holds the word {word}, and write its different lines, sorted, into a new file {_short(new)}."
    )
    return _change(question, steps, files | {new: "".join(line + "\n" for line in lines)}, folders)


def copy_holding(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    word, name = rng.choice(WORDS), rng.choice(("box", "store"))
    paths = _holding(files, word)
    copies = {f"/{name}/{posixpath.basename(path)}": files[path] for path in paths}
    if not 1 <= len(paths) <= 3 or len(copies) < len(paths):
        return None
    names = " ".join(map(_short, paths))
    steps = [
        ("Which files are it?", f"grep -rl {word}"),
        ("Make the folder.", f"mkdir {name}"),
        ("Copy them.", f"cp {names} {name}"),
    ]
    question = f"Make a folder {name} and copy every file that holds the word {word} into it."
    return _change(question, steps, files | copies, (*folders, f"/{name}"))


def swap(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    one, two = rng.sample(sorted(files), 2)
    if files[one] == files[two]:
        return None
    a, b = _short(one), _short(two)
    steps = [("First one aside.", f"mv {a} aside"), ("Then the other.", f"mv {b} {a}"), ("Then the first.", f"mv aside {b}")]
    return _change(f"Swap the contents of {a} and {b}.", steps, files | {one: files[two], two: files[one]}, folders)


def follow(rng: random.Random, files: Files, folders: tuple[str, ...]) -> Chore | None:
    new = [path for folder in ("/", *folders) for name in NAMES if (path := posixpath.join(folder, f"{name}.txt")) not in files]
    way = rng.sample(new, 3)
    word = rng.choice(WORDS)
    for path, following in zip(way, [*map(_short, way[1:]), word], strict=True):
        files[path] = f"{following}\n"
    names = [_short(path) for path in way]
    steps = [("Read the first.", f"cat {names[0]}"), *((f"It names {name}.", f"cat {name}") for name in names[1:])]
    question = f"{names[0]} names a file, and that one another file. Which word is in the last one?"
    return _ask(question, steps, (files, folders), "word", word)


CHORES: dict[int, tuple[Maker, ...]] = {
    1: (read_word, write_word, remove),
    2: (count_lines, rename, move_into),
    3: (which_holds, count_word, append_word, count_named),
    4: (total, last_line, move_all, remove_holding),
    5: (report, sort_lines, copy_holding, swap, follow),
}
