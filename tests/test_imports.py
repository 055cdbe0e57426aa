"""Imports flow only downwards through the rooms of docs/architecture.md, and its drawing shows these rooms and imports.

The page's table is the rule: its rows are the rooms, top first. Imports are read from the source with `ast`: at the top
of a file or inside a function, absolute or relative, by `importlib` or through the public names of a package.
"""

import ast
import functools
import graphlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PAGE, DRAWING = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
PACKAGES = ("minglm", "kernels", "scale")

# (importer, imported): why it may look upwards. All of them inside a function, so that no file needs the upper one to load.
EXCEPTIONS = {
    ("minglm/model.py", "minglm/checkpoint.py"): "GLM.from_pretrained and save_pretrained: users expect these names there",
    ("minglm/__init__.py", "minglm/tokenizer.py"): "one of the public names, imported when it is first used",
    ("minglm/ops.py", "kernels/__init__.py"): "ops.using('triton') loads the kernels, which then register themselves",
}


class Room(NamedTuple):
    name: str
    entries: tuple[str, ...]  # files, or folders that end in a slash

    def holds(self, file: str) -> bool:
        return any(file.startswith(entry) if entry.endswith("/") else file == entry for entry in self.entries)


class Import(NamedTuple):
    importer: str
    line: int
    imported: str  # a file; or, where that cannot be told from the source, the source
    lazy: bool  # inside a function: done when that is called

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def read_rooms(page: str) -> list[Room]:
    """The rows of the page's table `| room | files | ... |`, top first."""
    rows = re.search(r"^\| room \| files \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert rows, "found no table '| room | files | ... |' on the page"
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines())
    return [Room(name, tuple(re.findall(r"`([^`]+)`", files))) for name, files, *_ in cells]


def source_files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for package in PACKAGES for path in (root / package).rglob("*.py"))


class Statement(NamedTuple):
    """What the source says: `import module`, `from module import name`, or a call that imports."""

    line: int
    module: str | None  # with a dot in front for each level of a relative import; None: cannot be told, see `source`
    name: str | None
    lazy: bool
    source: str


class _Reader(ast.NodeVisitor):
    """Collects the statements of one file."""

    def __init__(self, text: str):
        tree = ast.parse(text)
        self.depth = 0  # functions around the node being visited
        self.found: list[Statement] = []
        self.tables = dict(_string_tables(tree))
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        for_types_only = getattr(node.test, "attr", getattr(node.test, "id", None)) == "TYPE_CHECKING"  # never loaded
        self.depth += for_types_only
        self.generic_visit(node)
        self.depth -= for_types_only

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._add(node, "." * node.level + (node.module or ""), alias.name)

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "attr", getattr(node.func, "id", None)) in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant):
                self._add(node, argument.value)
            elif isinstance(argument, ast.Subscript) and getattr(argument.value, "id", None) in self.tables:
                for module in self.tables[argument.value.id].values():
                    self._add(node, module)
            else:
                self._add(node, None)
        self.generic_visit(node)

    def _add(self, node: ast.AST, module: str | None, name: str | None = None) -> None:
        self.found.append(Statement(node.lineno, module, name, self.depth > 0, ast.unparse(node)))


def _string_tables(tree: ast.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """The module-level dictionaries of strings, such as the public names of minglm/__init__.py."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            items = [*node.value.keys, *node.value.values]
            if items and all(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in items):
                yield node.targets[0].id, ast.literal_eval(node.value)


@functools.cache  # the planted trees below differ in a file each
def _read(text: str) -> _Reader:
    return _Reader(text)


def _imported(root: Path, file: str, statement: Statement) -> str | None:
    """The file that a statement in `file` imports, or words where there is none; None for a module that is not ours."""

    def file_of(module: str) -> str | None:
        path = module.replace(".", "/")
        return next((found for found in (f"{path}.py", f"{path}/__init__.py") if (root / found).is_file()), None)

    module, name = statement.module, statement.name
    if module is None:
        return statement.source
    if module.startswith("."):
        tail = module.lstrip(".")
        folder = Path(file).parts[: len(tail) - len(module)]
        module = ".".join([*folder, tail] if tail else folder)
    if module.split(".")[0] not in PACKAGES:
        return None
    home = file_of(module)
    if home and name:
        if inner := file_of(f"{module}.{name}"):
            return inner
        for table in _read((root / home).read_text(encoding="utf-8")).tables.values():
            if name in table:  # `from minglm import GLM` is an import of the file that minglm fetches GLM from
                return file_of(table[name])
    return home or f"{module}, which does not exist"


def read_imports(root: Path) -> list[Import]:
    imports = []
    for file in source_files(root):
        for statement in _read((root / file).read_text(encoding="utf-8")).found:
            imported = _imported(root, file, statement)
            if imported not in (None, file):
                imports.append(Import(file, statement.line, imported, statement.lazy))
    return imports


def misplaced_files(root: Path, rooms: Sequence[Room]) -> list[str]:
    """Files that are not in exactly one room, and entries of rooms that do not exist."""
    owners = {file: [room.name for room in rooms if room.holds(file)] for file in source_files(root)}
    wrong = [f"{file} is in {names or 'no room'}" for file, names in owners.items() if len(names) != 1]
    entries = [entry for room in rooms for entry in room.entries]
    return wrong + [f"{entry} does not exist" for entry in entries if not (root / entry).exists()]


def upward_imports(root: Path, rooms: Sequence[Room]) -> list[Import]:
    """Imports of a room above the importer's, or of something that is not a file of ours."""

    def level(file: str) -> float:
        return next((index for index, room in enumerate(rooms) if room.holds(file)), float("-inf"))

    return [found for found in read_imports(root) if level(found.imported) < level(found.importer)]


def import_cycle(root: Path) -> list[str]:
    """Files that need one another to load, each the next one; empty if there are none.

    Importing a module also loads the packages that it lies in, but for those that are being loaded already.
    """
    needs: dict[str, set[str]] = {file: set() for file in source_files(root)}
    for found in read_imports(root):
        if not found.lazy and found.imported in needs:
            packages = (f"{folder.as_posix()}/__init__.py" for folder in Path(found.imported).parents)
            around = {package for package in packages if package in needs and not _lies_in(found.importer, package)}
            needs[found.importer] |= {found.imported, *around}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def _lies_in(file: str, package: str) -> bool:
    return file.startswith(package.removesuffix("__init__.py"))


@pytest.fixture(scope="module")
def rooms() -> list[Room]:
    return read_rooms(PAGE.read_text(encoding="utf-8"))


def test_every_file_is_in_one_room_and_every_room_exists(rooms):
    assert len(rooms) >= 10
    assert misplaced_files(ROOT, rooms) == []


def test_imports_flow_only_downwards(rooms):
    upward = upward_imports(ROOT, rooms)
    unknown = [str(found) for found in upward if (found.importer, found.imported) not in EXCEPTIONS]
    assert unknown == [], "of a room above (docs/architecture.md), or of no file: move the code, or pass it in as an argument"
    assert all(found.lazy for found in upward)
    unused = EXCEPTIONS.keys() - {(found.importer, found.imported) for found in upward}
    assert not unused, "these exceptions are no longer needed: take them out of the list"


def test_no_files_need_one_another_to_load():
    assert import_cycle(ROOT) == []


def test_the_page_names_files_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert DRAWING.name in links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
    places = set(re.findall(r"`(\w+(?:/\w+)*\.py)`", page.partition("## The way of a batch")[2]))
    assert places and [place for place in sorted(places) if not (ROOT / "minglm" / place).is_file()] == []


# ---- the drawing

SVG = "{http://www.w3.org/2000/svg}"


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_the_drawing_has_the_rooms_of_the_table_in_order(rooms):
    drawn = []
    for group in ElementTree.parse(DRAWING).iter(f"{SVG}g"):
        if group.get("class") == "room":
            texts = {text.get("class"): text_of(text) for text in group.iter(f"{SVG}text")}
            drawn.append(Room(texts["name"], tuple(texts["files"].split(" · "))))
    assert drawn == rooms


def test_the_drawing_has_the_arrows_of_the_imports(rooms):
    """An arrow is an import, and of every import there is an arrow or a way of several."""
    names = [room.name for room in rooms]

    def room_of(file: str) -> str | None:  # None where there is no such file, which another test reports
        return next((room.name for room in rooms if room.holds(file)), None)

    known = [found for found in read_imports(ROOT) if (found.importer, found.imported) not in EXCEPTIONS]
    real = {(room_of(found.importer), room_of(found.imported)) for found in known}
    real = {(upper, lower) for upper, lower in real if upper != lower and lower is not None}
    arrows = {
        (path.get("data-from"), path.get("data-to")) for path in ElementTree.parse(DRAWING).iter() if path.get("data-from")
    }
    assert arrows <= real, "the drawing has arrows where no import is"
    reachable = {name: {name} for name in names}
    for name in reversed(names):  # what lies below is known already
        for upper, lower in arrows:
            if upper == name:
                reachable[name] |= reachable[lower]
    missing = {(upper, lower) for upper, lower in real if lower not in reachable[upper]}
    assert not missing, "the drawing lacks arrows: add a path with data-from and data-to to docs/architecture.svg"


# ---- the test can fail


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of our sources, to plant mistakes in."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def plant(tree: Path, file: str, code: str) -> None:
    path = tree / file
    path.write_text(path.read_text(encoding="utf-8") + code + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "imported", "lazy"),
    [
        ("import minglm.train.trainer", "minglm/train/trainer.py", False),
        ("import minglm.train.trainer as t", "minglm/train/trainer.py", False),
        ("from minglm.train import trainer", "minglm/train/trainer.py", False),
        ("from minglm.train.trainer import Trainer", "minglm/train/trainer.py", False),
        ("from .train.trainer import Trainer", "minglm/train/trainer.py", False),
        ("from . import model", "minglm/model.py", False),
        ("if True:\n    from minglm.model import GLM", "minglm/model.py", False),
        ("class Planted:\n    import minglm.model", "minglm/model.py", False),
        ("from minglm import GLM", "minglm/model.py", False),
        ("def planted():\n    from scale import mesh", "scale/mesh.py", True),
        ("async def planted():\n    import scale", "scale/__init__.py", True),
        ("planted = lambda: importlib.import_module('minglm.model')", "minglm/model.py", True),
        ("planted = importlib.import_module(__name__ + 'x')", "importlib.import_module(__name__ + 'x')", False),
        ("import minglm.planted", "minglm.planted, which does not exist", False),
    ],
)
def test_a_planted_upward_import_is_reported(tree, rooms, code, imported, lazy):
    before = upward_imports(tree, rooms)
    plant(tree, "minglm/ops.py", code)
    (found,) = set(upward_imports(tree, rooms)) - set(before)
    assert (found.importer, found.imported, found.lazy) == ("minglm/ops.py", imported, lazy)


def test_a_planted_downward_import_is_none(tree, rooms):
    before = upward_imports(tree, rooms)
    plant(tree, "minglm/model.py", "from . import ops as planted\nimport kernels.launch\nfrom torch.nn import Module")
    assert upward_imports(tree, rooms) == before


@pytest.mark.parametrize(
    "plants",
    [
        {"minglm/config.py": "from minglm.model import GLM"},
        {"minglm/ops.py": "import kernels.launch"},  # which loads minglm.ops
        {"minglm/tokenizer.py": "import minglm.planted.inner", "minglm/planted/__init__.py": "import minglm.tokenizer"},
    ],
)
def test_a_planted_cycle_is_reported(tree, plants):
    for file, code in plants.items():
        (tree / file).parent.mkdir(exist_ok=True)
        (tree / file).touch()
        plant(tree, file, code)
    (tree / "minglm/planted").mkdir(exist_ok=True)
    (tree / "minglm/planted/inner.py").touch()
    cycle = import_cycle(tree)
    assert cycle[0] == cycle[-1] and set(plants) <= set(cycle)


def test_a_planted_file_and_a_planted_room_are_reported(tree, rooms):
    (tree / "minglm/planted.py").touch()
    assert misplaced_files(tree, rooms) == ["minglm/planted.py is in no room"]
    twice = [*rooms, Room("planted", ("minglm/planted.py", "minglm/ops.py", "minglm/missing/"))]
    assert misplaced_files(tree, twice) == [
        f"minglm/ops.py is in ['{rooms[-1].name}', 'planted']",
        "minglm/missing/ does not exist",
    ]
