"""A small shell: command lines to commands, over a file system in memory.

Pipes, `>`, `>>`, `&&`, quotes and `*`. Everything has a limit, so that no line runs long or prints much.
"""

import posixpath
from typing import NamedTuple

from minglm.tasks.agents.commands import COMMANDS
from minglm.tasks.agents.files import LONGEST_FILE, FileSystem, ShellError, matches

LONGEST_LINE = 1_000  # characters of a command line
LONGEST_OUTPUT = 2_000
MOST_COMMANDS = 10  # in a line
OPERATORS = ("|", ">", ">>", "&&")


class Word(NamedTuple):
    text: str
    is_quoted: bool = False


def run(system: FileSystem, line: str) -> str:
    """Run a command line. -> what it prints, errors included."""
    try:
        output = _run_all(system, line)
    except ShellError as error:
        return f"error: {error}"
    output = output.rstrip("\n")
    return output if len(output) <= LONGEST_OUTPUT else output[:LONGEST_OUTPUT] + " ... (cut)"


def _run_all(system: FileSystem, line: str) -> str:
    if len(line) > LONGEST_LINE:
        raise ShellError(f"a line of {len(line)} characters; at most {LONGEST_LINE} are read")
    printed = ""
    chains = _split(split_words(line), "&&")
    if sum(len(_split(chain, "|")) for chain in chains) > MOST_COMMANDS:
        raise ShellError(f"more than {MOST_COMMANDS} commands in a line")
    for chain in chains:
        output = ""
        for number, words in enumerate(_split(chain, "|")):
            output = _run_one(system, words, output if number else None)
            if len(output) > LONGEST_FILE:
                raise ShellError(f"more than {LONGEST_FILE} characters of output")
        printed += output
    return printed


def _run_one(system: FileSystem, words: list[Word], given: str | None) -> str:
    """One command with its redirection. given: what a pipe brings."""
    target, append = None, False
    for operator in (">>", ">"):
        if Word(operator) in words:
            at = words.index(Word(operator))
            if len(words) != at + 2:
                raise ShellError(f"{operator} wants one file behind it, at the end")
            target, append, words = words[-1].text, operator == ">>", words[:at]
    if not words:
        raise ShellError("a command is missing")
    name = words[0].text
    if name not in COMMANDS:
        raise ShellError(f"{name[:40]}: no such command; there are {' '.join(COMMANDS)}")
    arguments = [argument for word in words[1:] for argument in _expanded(system, word)]
    output = COMMANDS[name](system, arguments, given)
    if target is None:
        return output
    path = system.path(target)
    system.write(path, (system.files.get(path, "") if append else "") + output)
    return ""


def _expanded(system: FileSystem, word: Word) -> list[str]:
    """The paths that a word with `*` stands for; itself if there are none."""
    if word.is_quoted or "*" not in word.text:
        return [word.text]
    folder, pattern = posixpath.split(word.text)
    found = [name for name in system.names(system.path(folder)) if matches(name, pattern)]
    return [posixpath.join(folder, name) for name in found] or [word.text]


def split_words(line: str) -> list[Word]:
    """Words and operators of a line. Quotes of both kinds keep a stretch together; there is no escape sign."""
    words: list[Word] = []
    text, quote, is_open, is_quoted = "", "", False, False

    def close() -> None:
        nonlocal text, is_open, is_quoted
        if is_open:
            words.append(Word(text, is_quoted))
        text, is_open, is_quoted = "", False, False

    position = 0
    while position < len(line):
        sign = line[position]
        position += 1
        if quote:
            quote, text = ("", text) if sign == quote else (quote, text + sign)
        elif sign in "'\"":
            quote, is_open, is_quoted = sign, True, True
        elif sign in "|>&":
            close()
            double = line[position - 1 : position + 1]
            operator = double if double in OPERATORS else sign
            position += len(operator) - 1
            if operator not in OPERATORS:
                raise ShellError(f"{operator} is not known here")
            words.append(Word(operator))
        elif sign.isspace():
            close()
        else:
            text, is_open = text + sign, True
    if quote:
        raise ShellError(f"a {quote} is not closed")
    close()
    return words


def _split(words: list[Word], operator: str) -> list[list[Word]]:
    parts: list[list[Word]] = [[]]
    for word in words:
        if word == Word(operator):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
