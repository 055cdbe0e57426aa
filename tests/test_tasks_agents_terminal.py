"""The small shell against the system's own, its limits, and the chores at the terminal."""

import fnmatch
import os
import posixpath
import random
import shlex
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.tasks.agents.calling import Call
from minglm.tasks.agents.commands import COMMANDS
from minglm.tasks.agents.files import LONGEST_FILE, MOST_ENTRIES, FileSystem, ShellError, matches
from minglm.tasks.agents.shell import LONGEST_OUTPUT, run, split_words
from minglm.tasks.agents.terminal import Terminal
from minglm.tasks.agents.world import Move

FILES = {"/a.txt": "one\ntwo\none\n", "/b.txt": "three\n", "/d/c.log": "two\nTwo\n", "/d/e/f.txt": "six\n"}
FOLDERS = ("/d", "/d/e", "/empty")
LINES = """\
cat a.txt b.txt
cat a.txt | sort | uniq -c | sort -r | head -n 1 | wc -w
cat d/c.log | grep -i two | wc -l
grep -c one a.txt
grep -v one a.txt
grep two a.txt d/c.log
sort -u a.txt
sort -r a.txt > r.txt && cat r.txt
uniq a.txt
head -n 1 a.txt
tail -n 2 a.txt
wc -l a.txt b.txt
wc -l b.txt
echo 'two  words' "and | more" > q.txt && cat q.txt
echo x >> b.txt && cat b.txt
echo one > d/new.txt && cat d/*.txt
mkdir -p k/l/m && mv a.txt k/l/m && cat k/l/m/a.txt
mv d k && mv k/e empty && cat empty/e/f.txt
mv a.txt b.txt && cat b.txt
mkdir z && mv *.txt z && ls z
cp a.txt d/e && cat d/e/a.txt && cat a.txt
cp -r d copy && cat copy/e/f.txt
rm -r d && ls
rm *.txt && ls
rm -f nothing && touch t.txt && ls
cd d/e && pwd | grep -c d/e && cat ../c.log
find d -name '*.txt'
ls empty
ls d/*.log
cp b.txt c.txt && cp c.txt a.txt && cat a.txt
cat missing.txt
mv missing.txt x.txt
rm d
cp d copy
mkdir d
cd nowhere
mkdir q/r
cat a.txt > q/r.txt
grep one missing.txt"""


def system():
    return FileSystem(FILES, FOLDERS)


def real_tree(root):
    files, folders = {}, {"/"}
    for folder, names, found in os.walk(root):
        place = "/" + os.path.relpath(folder, root)
        place = posixpath.normpath(place)
        folders |= {posixpath.join(place, name) for name in names}
        for name in found:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                files[posixpath.join(place, name)] = file.read()
    return files, folders


def lay_out(root, files, folders):
    root.mkdir()
    for folder in sorted(folders):
        (root / folder.lstrip("/")).mkdir(parents=True)
    for path, text in files.items():
        (root / path.lstrip("/")).write_text(text, encoding="utf-8")


def real_run(root, line):
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    return subprocess.run(["sh", "-c", line], cwd=root, env=environment, capture_output=True, text=True, timeout=20)


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no sh to compare with")
@pytest.mark.parametrize("line", LINES.splitlines())
def test_the_shell_does_what_the_systems_shell_does(tmp_path, line):
    """But for: order of files where the system's is that of its disk, slashes behind folders, and the words of errors."""
    root = tmp_path / "root"
    lay_out(root, FILES, FOLDERS)
    theirs, ours = real_run(root, line), system()
    output = run(ours, line)
    if theirs.returncode and theirs.stderr:
        assert output.startswith("error: ")
    else:
        columns = [line.split() for line in theirs.stdout.splitlines()]  # wc and uniq -c pad theirs
        assert sorted(line.rstrip("/").split() for line in output.splitlines()) == sorted(columns)
    assert (ours.files, ours.folders) == real_tree(root)


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no sh to compare with")
def test_chores_are_done_by_the_systems_shell_too(tmp_path):
    rng = random.Random(0)
    for index in range(60):
        problem = Terminal.sample(rng, index % 5 + 1)
        root = tmp_path / str(index)
        lay_out(root, dict(problem.files), problem.folders)
        outputs = [real_run(root, command).stdout for _, command in problem.chore.commands]
        assert real_tree(root) == (dict(problem.chore.files_after), {"/", *problem.chore.folders_after}), problem
        if problem.chore.form:
            assert problem.chore.answer in outputs[-1].split()


@st.composite
def lines(draw):
    words = st.sampled_from(
        [
            *COMMANDS,
            "|",
            ">",
            ">>",
            "&&",
            "-r",
            "-n",
            "-c",
            "-l",
            "-p",
            "-name",
            "2",
            "*",
            "d/*",
            "..",
            "/",
            "",
            "''",
            "'",
            "one",
        ]
        + [path.lstrip("/") for path in (*FILES, *FOLDERS)]
    )
    return " ".join(draw(st.lists(words | st.text(max_size=4), max_size=7)))


@given(st.lists(lines(), max_size=12))
@settings(max_examples=200)
def test_whatever_is_run_the_file_system_stays_one(commands):
    files = system()
    for command in commands:
        output = run(files, command)
        assert len(output) <= LONGEST_OUTPUT + 20
    assert not files.files.keys() & files.folders
    assert files.folder in files.folders
    for path in (*files.files, *files.folders):
        assert posixpath.normpath(path) == path and posixpath.dirname(path) in files.folders
    assert len(files.files) + len(files.folders) <= MOST_ENTRIES
    assert all(len(text) <= LONGEST_FILE for text in files.files.values())


def test_nothing_grows_without_end():
    files = system()
    for _ in range(30):
        run(files, "cat a.txt a.txt > b.txt && cat b.txt b.txt > a.txt")
    assert all(len(text) <= LONGEST_FILE for text in files.files.values())
    for number in range(12):
        run(files, f"cp -r d /empty/d{number} && cp -r empty d/e{number}")
    assert len(files.files) + len(files.folders) <= MOST_ENTRIES
    assert "at most" in run(files, "echo " + "x" * 2000)
    assert "commands" in run(files, " | ".join(["cat a.txt"] * 40))


@given(st.text("ab*.", max_size=8), st.text("ab.", max_size=8))
def test_a_star_stands_for_any_text(pattern, name):
    assert matches(name, pattern) == fnmatch.fnmatchcase(name, pattern)


def test_many_stars_are_matched_at_once():
    assert not matches("a" * 500 + "b", "*a" * 400 + "c")


@given(st.text("ab '\"", max_size=12))
def test_quotes_keep_words_together(line):
    try:
        expected = shlex.split(line)
    except ValueError:
        with pytest.raises(ShellError):
            split_words(line)
        return
    assert [word.text for word in split_words(line)] == expected


def test_a_change_is_judged_by_the_files_however_it_was_made():
    """Another way to the same tree is as right; one file more, or one folder, is not."""
    rng = random.Random(1)
    seen = 0
    while seen < 10:
        problem = Terminal.sample(rng, rng.randint(1, 5))
        if problem.chore.form:
            continue
        seen += 1
        before, after = dict(problem.files), dict(problem.chore.files_after)
        commands = [f"rm {path}" for path in before if after.get(path) != before[path]]
        commands += [f"mkdir {path}" for path in problem.chore.folders_after if path not in problem.folders]
        for path, text in after.items():
            if before.get(path) != text:
                commands += [f"touch {path}", *(f"echo {line} >> {path}" for line in text.splitlines())]

        def moves(commands):
            for start in range(0, len(commands), 3):
                yield Move("", [Call("run", {"command": " && ".join(commands[start : start + 3])})])
            yield Move("", content="done")

        assert problem.verify(problem.play(moves(commands))) == (1.0, ()), problem
        for spoilt in ("touch /more", "mkdir /more"):
            assert problem.verify(problem.play(moves([*commands, spoilt]))).reward == 0


def test_a_question_leaves_the_files_as_they_are():
    rng = random.Random(2)
    for _ in range(40):
        problem = Terminal.sample(rng, rng.randint(1, 4))
        if problem.chore.form:

            def moves(problem=problem):
                yield Move("", [Call("run", {"command": "touch /more"})])
                yield Move("", content=problem.chore.answer)

            assert problem.verify(problem.play(moves())).reward == 0
