"""Code as training documents: pieces to fill in, repositories ordered by imports, commits."""

import ast
import random
import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.data.commits import commit
from minglm.data.fim import MIDDLE, PREFIX, SUFFIX, fill_in_the_middle, pieces
from minglm.data.repositories import File, imports_first, repository_documents, used_names
from minglm.data.shards import open_dataset, prepare
from minglm.data.sources import Corpus, DataError, Document
from minglm.tokenizer import train_tokenizer

CODE = '''import os


def read(path):
    """Text of a file."""
    with open(path) as opened:
        return opened.read()


def unused(a, b):
    return a + b


class Reader:
    def __init__(self, path):
        self.text = read(path)
'''
TOKENIZER = train_tokenizer([CODE], 400, show_progress=False)
some_code = st.text(st.characters(codec="utf-8"), min_size=60, max_size=400) | st.just(CODE)


def code(text: str, name: str = "m") -> Document:
    return Document(text, name, "code/x", "code", split="train")


# ---- fill in the middle


@given(some_code, st.integers(60, 500), st.integers(0, 9))
def test_prefix_middle_suffix_is_the_text_again(text, characters, seed):
    parts = []
    for document in fill_in_the_middle([code(text)], 1, characters, seed):
        if document.marks:
            assert [name for _, name in document.marks] == [PREFIX, SUFFIX, MIDDLE]
            (start, _), (suffix, _), (middle, _) = document.marks
            assert start == 0 and 0 < suffix and middle < len(document.text)
            parts.append(document.text[:suffix] + document.text[middle:] + document.text[suffix:middle])
        else:
            assert len(document.text) < 60
            parts.append(document.text)
        assert len(parts[-1]) <= characters
    assert "".join(parts) == text


@given(some_code, st.integers(1, 100))
def test_pieces_are_the_text_cut_at_lines_where_lines_are_short_enough(text, characters):
    found = list(pieces(text, characters))
    assert "".join(found) == text and all(0 < len(piece) <= characters for piece in found)
    if all(len(line) < characters for line in text.split("\n")):
        assert all(piece.endswith("\n") for piece in found[:-1])


def test_the_rate_is_a_share_and_cuts_follow_from_content_and_seed():
    documents = [code(f"x{i} = {i}\n" * 20, str(i)) for i in range(400)]
    chosen = {d.name.split("#")[0] for d in fill_in_the_middle(documents, 0.5) if d.marks}
    assert 160 < len(chosen) < 240
    alone = [made for d in documents for made in fill_in_the_middle([d], 0.5)]
    assert alone == list(fill_in_the_middle(documents, 0.5))
    assert list(fill_in_the_middle(documents, 0)) == documents
    assert list(fill_in_the_middle(documents, 0.5, seed=1)) != alone
    middles = [d.text[d.marks[2][0] :] for d in fill_in_the_middle([code(CODE * 300)], 1) if d.marks]
    whole_lines = sum(middle.endswith("\n") for middle in middles) / len(middles)
    assert 0.3 < whole_lines < 0.7


def test_marks_become_special_tokens_and_their_names_in_text_do_not(tmp_path):
    text = CODE + f"# {PREFIX} is a mark\n"
    [document] = fill_in_the_middle([code(text)], 1, 4 * len(text))
    dataset = prepare(Corpus.from_documents([document]), TOKENIZER, tmp_path / "data", progress=False)
    ids = open_dataset(dataset.folder, TOKENIZER).splits["train"].document(0).tolist()
    special = {TOKENIZER.special_ids[name]: name for name in (PREFIX, SUFFIX, MIDDLE)}
    assert [special[id] for id in ids if id in special] == [PREFIX, SUFFIX, MIDDLE]
    (_, suffix, middle), places = (o for o, _ in document.marks), [i for i, id in enumerate(ids) if id in special]
    stretches = [TOKENIZER.decode(ids[a + 1 : b]) for a, b in zip(places, [*places[1:], -1], strict=True)]
    assert stretches == [document.text[:suffix], document.text[suffix:middle], document.text[middle:]]


def test_marks_that_the_tokenizer_lacks_or_the_document_has_already_are_refused(tmp_path):
    [document] = fill_in_the_middle([code(CODE)], 1, 4 * len(CODE))
    plain = train_tokenizer([CODE], 400, specials=["<|endoftext|>"], show_progress=False)
    with pytest.raises(DataError, match=r"marked with '<\|code_prefix\|>', which is no special token"):
        prepare([document], plain, tmp_path / "data", progress=False)
    with pytest.raises(DataError, match="has marks already"):
        list(fill_in_the_middle([document], 1))
    with pytest.raises(DataError, match=r"marks stand at \[4, 2\]; wanted rising offsets from 0 to 3"):
        Document("abc", "n", "s", "code", marks=((4, PREFIX), (2, SUFFIX)))


# ---- repositories

PACKAGE = {
    "shop.orders": "from . import money\nfrom shop.stock import take\n\n\ndef order(n):\n    return take(n) * money.price(n)\n",
    "shop.stock": "from .money import Coin\n\n\ndef take(n):\n    return [Coin(1)] * n\n",
    "shop.money": "class Coin:\n    def __init__(self, v):\n        self.v = v\n\n\ndef price(n):\n    return 2 * n\n",
    "shop": '"""A shop."""\n',
    "broken": "def f(:\n",
}
FILES = {name: File(name, text, is_package=name == "shop") for name, text in PACKAGE.items()}


def test_used_names_are_found_through_every_form_of_import():
    assert used_names(FILES["shop.orders"], FILES) == {"shop.stock": ["take"], "shop.money": ["price"]}
    assert used_names(FILES["shop.stock"], FILES) == {"shop.money": ["Coin"]}
    absolute = File("shop.x", "import shop.money as m\nfrom .money import *\n\nm.price(m.nothing)\n")
    assert used_names(absolute, FILES) == {"shop.money": ["price"]}
    assert used_names(File("shop", "from .stock import take\n", is_package=True), FILES) == {"shop.stock": ["take"]}
    assert used_names(FILES["broken"], FILES) == {}


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=20))
def test_the_imported_stands_before_the_importing_unless_they_import_each_other(edges):
    uses = {str(i): {str(b): [] for a, b in edges if a == i and b != i} for i in range(9)}
    order = imports_first(uses)
    assert sorted(order) == sorted(uses)

    def reaches(start: str, wanted: str) -> bool:
        seen, todo = set(), [start]
        while todo:
            if (one := todo.pop()) not in seen:
                seen.add(one)
                todo += uses[one]
        return wanted in seen

    for module, imported in ((m, i) for m, others in uses.items() for i in others):
        assert order.index(imported) < order.index(module) or reaches(imported, module)


def repository(characters: int, seed: int = 0) -> list[Document]:
    documents = [Document(text, name, "code/x", "code", "shop", "train") for name, text in PACKAGE.items()]
    return list(repository_documents(documents, characters, seed))


def shown(document: Document) -> dict[str, str]:
    """Path -> text of the files that a document shows."""
    before = document.text.split("# commit:")[0]
    parts = re.split(r"^# file: (.*)\n", before, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("characters", [200, 4000])
def test_a_document_shows_imported_files_first_and_names_that_are_used(characters, monkeypatch):
    monkeypatch.setattr("minglm.data.repositories.FEWEST_CHARACTERS", 1)
    documents = repository(characters)
    assert documents and all(d.domain == "repositories" and d.split == "train" for d in documents)
    for document in documents:
        paths = list(shown(document))
        assert len(paths) >= 2
        order = [FILES[path.removesuffix(".py").replace("/", ".")] for path in paths]
        *before, last = order
        assert all(imported.module in used_names(last, FILES) for imported in before)
        if characters == 200:
            assert len(document.text.split("# commit")[0]) <= 2 * characters
    assert repository(characters) == documents


def test_files_of_different_splits_are_never_put_together():
    held_out = Document(PACKAGE["shop.money"], "shop.money", "code/x", "code", split="held_out")
    train = Document(PACKAGE["shop.stock"], "shop.stock", "code/x", "code", split="train")
    assert list(repository_documents([held_out, train])) == []


# ---- commits


@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_a_commit_applies_to_the_files_it_follows_and_gives_python_again(tmp_path_factory, seed):
    files = [("a/money.py", PACKAGE["shop.money"]), ("a/all.py", CODE)]
    made = commit(files, random.Random(seed))
    assert made is not None
    before, change = made
    message, diff = change.split("\n", 1)
    assert re.fullmatch(r"# commit: (Rename `\w+` to `\w+`|Remove `\w+`, which is not used|Add `\w+`)", message)
    folder = tmp_path_factory.mktemp("repository")
    for path, text in before:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text.rstrip() + "\n")
    subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=folder, check=True)
    after = {path: (folder / path).read_text() for path, _ in files}
    assert any(after[path] != text.rstrip() + "\n" for path, text in before)
    for text in after.values():
        ast.parse(text)
    if message.startswith("# commit: Add"):
        assert after == {path: text.rstrip() + "\n" for path, text in files}
