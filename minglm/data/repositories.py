"""Documents of whole repositories: the files that belong together in one text, the imported before the importing.

GLM-4.5's first mid-training stage reads files of one repository concatenated, and commits in diff form, so that a model
learns to use names that another file defines (paper, section 2.3). Each document is a file and those that it imports:

    # file: csv/reader.py
    ...
    # file: csv/sniffer.py            <- imports the one above
    ...
    # commit: Rename `guess` to `_guess`
    diff --git a/csv/reader.py b/csv/reader.py
    ...

Where whole files do not fit in the length that is asked for, they are shortened to what the document is about: the
definitions that the other file uses, and the code that uses them, whole statements in their order.
"""

import ast
import random
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from minglm.data.commits import WORDS, commit
from minglm.data.sources import Document, split_of, without_garbage_collector

DOMAIN = "repositories"
USES_A_FILE = 3  # parts of a file that are shown for each one that it imports
NAMES_A_DOCUMENT = 4  # at most, where files do not fit whole
FEWEST_CHARACTERS = 300  # of a document
LEAVES = (ast.Name, ast.Constant, ast.alias)  # of a syntax tree


@dataclass(frozen=True)
class File:
    """One source file of a repository; `module` is its dotted name, or that of the package whose `__init__` it is."""

    module: str
    text: str
    is_package: bool = False

    @property
    def path(self) -> str:
        return self.module.replace(".", "/") + ("/__init__.py" if self.is_package else ".py")

    @cached_property
    def statements(self) -> list[tuple[ast.stmt, str]]:
        """Its top-level statements, each with its source, decorators included; none where it cannot be parsed."""
        with without_garbage_collector(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                tree = ast.parse(self.text)
            except (SyntaxError, ValueError):
                return []
        lines = self.text.split("\n")
        found = []
        for node in tree.body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            found.append((node, "\n".join(lines[first - 1 : node.end_lineno]) + "\n"))
        return found

    @cached_property
    def definitions(self) -> dict[str, str]:
        """Source of each function, class and constant defined at the top level, by name."""
        found: dict[str, str] = {}
        for node, source in self.statements:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[node.name] = source
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = source
        return found

    @cached_property
    def words(self) -> dict[str, set[str]]:
        """The words in the source of each definition."""
        return {name: set(WORDS.findall(source)) for name, source in self.definitions.items()}


def repository_documents(files: Iterable[Document], characters: int = 6000, seed: int = 0) -> Iterator[Document]:
    """Documents of at most about `characters` from source files, whose `name` is the module's dotted name.

    Only files of one split and source are put together. Every importing file gives a document for each file that it imports
    names from; in an order that the seed decides.
    """
    repositories: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for document in files:
        repositories[document.source, split_of(document)].append(document)
    for (source, split), documents in repositories.items():
        packages = {document.name.rpartition(".")[0] for document in documents}
        modules = {d.name: File(d.name, d.text, is_package=d.name in packages) for d in documents}
        groups = {document.name: document.group for document in documents}
        uses = {name: used_names(file, modules) for name, file in modules.items()}
        for module in imports_first(uses):
            for number, text in enumerate(_texts(modules[module], uses[module], modules, characters, seed), 1):
                name = f"{module} {number}"
                yield Document(text, name, source.replace("code/", "repositories/"), DOMAIN, groups[module], split)


# ---- who imports whom


def used_names(file: File, modules: Mapping[str, File]) -> dict[str, list[str]]:
    """What `file` imports from each module of the same repository: names that the module defines, in order of import."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    local: dict[str, str] = {}  # modules by the name that they have in this file
    attributes: list[ast.Attribute] = []
    for node in _nodes(file):
        if isinstance(node, ast.Import):
            local |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, file)
            for alias in node.names:
                if alias.name in getattr(modules.get(origin), "definitions", ()):
                    found[origin][alias.name] = None
                elif (module := f"{origin}.{alias.name}".lstrip(".")) in modules:
                    local[alias.asname or alias.name] = module
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.append(node)
    for node in attributes:  # module.name
        origin = local.get(node.value.id)
        if origin is not None and node.attr in modules[origin].definitions:
            found[origin][node.attr] = None
    found.pop(file.module, None)
    return {module: list(names) for module, names in found.items()}


def _nodes(file: File) -> Iterator[ast.AST]:
    """All nodes of its statements, level by level, but for those that hold no others: most are names and constants."""
    nodes = deque(statement for statement, _ in file.statements)
    while nodes:
        node = nodes.popleft()
        yield node
        nodes.extend(child for child in ast.iter_child_nodes(node) if child._fields and not isinstance(child, LEAVES))


def _absolute(node: ast.ImportFrom, file: File) -> str:
    """The dotted name of the module of `from ... import`, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = file.module.split(".")
    parts = parts[: len(parts) - node.level + file.is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imports_first(uses: Mapping[str, Mapping[str, object]]) -> list[str]:
    """The modules in an order in which those that a module uses stand before it; circles are broken where they close."""
    order: list[str] = []
    started: set[str] = set()
    for start in uses:
        stack = [] if start in started else [(start, iter(uses[start]))]
        started.add(start)
        while stack:
            module, imported = stack[-1]
            following = next((name for name in imported if name not in started), None)
            if following is None:
                order.append(module)
                stack.pop()
            else:
                started.add(following)
                stack.append((following, iter(uses[following])))
    return order


# ---- a document


def _texts(
    file: File, uses: Mapping[str, Sequence[str]], modules: Mapping[str, File], characters: int, seed: int
) -> Iterator[str]:
    """One text of `file` with all files that it imports and that fit whole, and one with excerpts for each of the others."""
    rng = random.Random(f"{seed} {file.module}")
    whole: list[File] = []
    excerpts = []
    room = characters - len(file.text)
    for imported in map(modules.__getitem__, uses):
        if len(imported.text) <= room:
            whole.append(imported)
            room -= len(imported.text)
        else:
            excerpts.append(imported)
    if whole:
        yield from _joined([(one.path, one.text) for one in (*whole, file)], rng)
    for imported in excerpts:
        names = list(uses[imported.module])
        rng.shuffle(names)
        for first in range(0, len(names), NAMES_A_DOCUMENT):
            some = names[first : first + NAMES_A_DOCUMENT]
            yield from _joined(_excerpts(imported, file, some, characters * 3 // 4), rng)


def _joined(files: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[str]:
    """The files in one text, followed by a commit where there is one to make: what it repeats of them teaches to copy, and so
    to use names of other files, with few tokens. Nothing where the whole is too short to be worth it."""
    change = commit(files, rng) if files else None
    shown, after = change or (files, "")
    text = "".join(f"# file: {path}\n{_ending(content)}\n" for path, content in shown) + after
    if len(text) >= FEWEST_CHARACTERS:
        yield text


def _excerpts(imported: File, importing: File, names: list[str], room: int) -> Sequence[tuple[str, str]]:
    """Of both files what has to do with some of the names; empty where nothing of it is short enough."""
    names = [name for name in names if len(imported.definitions[name]) <= room // 2]
    kept, uses = _fitting(imported, importing, names, room)
    if not uses:
        return ()
    return (imported.path, _excerpt(imported, kept)), (importing.path, _excerpt(importing, uses, kept))


def _ending(text: str) -> str:
    return text.rstrip() + "\n"


def _fitting(imported: File, importing: File, names: list[str], room: int) -> tuple[list[str], list[str]]:
    """Names of the definitions of the imported file to show, and of those in the importing file that use them."""
    kept: list[str] = []
    uses: dict[str, None] = {}
    for name in names:
        using = [own for own, words in importing.words.items() if own != name and name in words]
        for own in using[:USES_A_FILE]:
            cost = len(importing.definitions[own]) * (own not in uses) + len(imported.definitions[name]) * (name not in kept)
            if cost <= room:
                room -= cost
                uses[own] = None
                kept += [name] * (name not in kept)
    return kept, list(uses)


def _excerpt(file: File, shown: Sequence[str], names: Sequence[str] = ()) -> str:
    """The statements of a file that define `shown` or import `names`, in their order."""
    parts = []
    for node, source in file.statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if set(names) & {alias.name for alias in node.names} or isinstance(node, ast.Import) and names:
                parts.append(source)
        elif any(file.definitions.get(name) == source for name in shown):
            parts.append(source if not parts else "\n\n" + source)
    return "".join(parts)
