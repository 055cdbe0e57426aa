"""The notebooks run from top to bottom on a model that the test trains, and their exercises tell right from wrong.

One kernel runs the notebook as shipped, then the solutions and planted mistakes, each followed by its check cell.
"""

import copy
import itertools
import os
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from small_run import run_small, small_recipe, write_text

from minglm.train.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "01-one-token.ipynb"
LARGEST = 700_000  # bytes, outputs included

# What stands in the exercise's cell, and a part of what the check must answer.
MISTAKES = {
    "1": {
        "components from rotary_dim": """
def partial_rope(x, positions, rotary_dim, theta):
    d = x.shape[-1]
    angles = positions[:, None, None] * theta ** (-torch.arange(0, d, 2) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
""",
        "neighbours are paired": """
def partial_rope(x, positions, rotary_dim, theta):
    angles = positions[:, None, None] * theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    out = x.clone()
    a, b = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    out[..., 0:rotary_dim:2] = a * angles.cos() - b * angles.sin()
    out[..., 1:rotary_dim:2] = b * angles.cos() + a * angles.sin()
    return out
""",
        "wrong way round": """
def partial_rope(x, positions, rotary_dim, theta):
    p = rotary_dim // 2
    angles = positions[:, None, None] * theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    a, b = x[..., :p], x[..., p:rotary_dim]
    turned = [a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()]
    return torch.cat([*turned, x[..., rotary_dim:]], -1)
""",
        "spread over head_dim": """
def partial_rope(x, positions, rotary_dim, theta):
    p = rotary_dim // 2
    angles = positions[:, None, None] * theta ** (-torch.arange(0, rotary_dim, 2) / x.shape[-1])
    a, b = x[..., :p], x[..., p:rotary_dim]
    turned = [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()]
    return torch.cat([*turned, x[..., rotary_dim:]], -1)
""",
        "x itself was changed": """
def partial_rope(x, positions, rotary_dim, theta):
    x[..., :rotary_dim] *= -1
    return x.clone()
""",
        # No mistake that has a name: the check says which component is off. Right at the start, wrong far into a text.
        "positions from 9000, component": """
def partial_rope(x, positions, rotary_dim, theta):
    p = rotary_dim // 2
    angles = positions[:, None, None].clamp(max=100) * theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    a, b = x[..., :p], x[..., p:rotary_dim]
    turned = [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()]
    return torch.cat([*turned, x[..., rotary_dim:]], -1)
""",
        "wanted x's shape": "def partial_rope(x, positions, rotary_dim, theta):\n    return x[..., :rotary_dim // 2]",
    },
    "2": {
        "the bias leaks into the weights; ": """
def choose_experts(scores, bias, k, scaling):
    weights, experts = (scores + bias).topk(k)
    return experts, weights / weights.sum(-1, keepdim=True) * scaling
""",
        "not multiplied by scaling": """
def choose_experts(scores, bias, k, scaling):
    experts = (scores + bias).topk(k).indices
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(-1, keepdim=True)
""",
        "chosen by the score alone": """
def choose_experts(scores, bias, k, scaling):
    weights, experts = scores.topk(k)
    return experts, weights / weights.sum(-1, keepdim=True) * scaling
""",
        "divided by the sum over all experts": """
def choose_experts(scores, bias, k, scaling):
    experts = (scores + bias).topk(k).indices
    return experts, scores.gather(1, experts) / scores.sum(-1, keepdim=True) * scaling
""",
        "not divided by the sum": """
def choose_experts(scores, bias, k, scaling):
    experts = (scores + bias).topk(k).indices
    return experts, scores.gather(1, experts) * scaling
""",
        # Weights in another order than their experts.
        "got weights": """
def choose_experts(scores, bias, k, scaling):
    experts = (scores + bias).topk(k).indices
    weights = scores.gather(1, experts).sort(-1).values
    return experts, weights / weights.sum(-1, keepdim=True) * scaling
""",
        "got experts": """
def choose_experts(scores, bias, k, scaling):
    experts = (scores - bias).topk(k).indices
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(-1, keepdim=True) * scaling
""",
        "wanted two tensors": "def choose_experts(scores, bias, k, scaling):\n    return (scores + bias).topk(k).indices",
    },
}


def read_notebook() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def tagged(notebook: NotebookNode, tag: str) -> NotebookNode:
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return cell


def solution(notebook: NotebookNode, number: str) -> str:
    """The code in the folded cell."""
    source = tagged(notebook, f"solution-{number}").source
    assert source.startswith("<details>") and source.endswith("</details>")
    (code,) = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
    return code


def execute(notebook: NotebookNode, folder: Path, run: Path | str | None) -> NotebookNode:
    """Run all cells in a new kernel that starts in `folder`, as Jupyter would; `run` is the run folder to name, if any."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MINGLM_RUN")}
    if run is not None:
        environment["MINGLM_RUN"] = str(run)
    with patch.dict(os.environ, environment, clear=True):
        client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
        return client.execute()


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.fixture(scope="module")
def small_run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with all that a nano run has, QK-norm and MTP included."""
    folder = tmp_path_factory.mktemp("notebook")
    run_small(small_recipe(write_text(folder / "text.jsonl"), steps=2, every=2), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def executed(small_run_folder: Path) -> NotebookNode:
    """The notebook as shipped and, behind it, every answer to an exercise with the check again."""
    notebook = read_notebook()
    for number, mistakes in MISTAKES.items():
        check = tagged(notebook, f"check-{number}").source
        for answer in (solution(notebook, number), *mistakes.values()):
            notebook.cells += [new_code_cell(answer), new_code_cell(check)]
    return execute(notebook, NOTEBOOK.parent, small_run_folder)


def test_every_cell_runs_and_the_exercises_are_unsolved_as_shipped(executed):
    shipped = executed.cells[: len(read_notebook().cells)]  # a cell that fails would have raised in `execute`
    assert all(cell.execution_count for cell in shipped if cell.cell_type == "code")
    for number in MISTAKES:
        assert printed(tagged(executed, f"check-{number}")) == f"exercise {number}: not solved yet\n"


def test_checks_accept_the_solution_and_name_each_mistake(executed):
    answers = iter(executed.cells[len(read_notebook().cells) :])
    for number, mistakes in MISTAKES.items():
        next(answers)
        assert printed(next(answers)) == f"exercise {number}: right\n"
        for part in mistakes:
            next(answers)
            verdict = printed(next(answers))
            assert verdict.startswith(f"exercise {number}: wrong: ") and part in verdict, (part, verdict)


def test_a_wrong_step_stops_the_notebook(small_run_folder):
    notebook = read_notebook()
    last = next(index for index, cell in enumerate(notebook.cells) if cell.id == "norm")
    notebook.cells = copy.deepcopy(notebook.cells[: last + 1])
    right = ".square().mean(-1, keepdim=True)"
    assert right in notebook.cells[last].source
    notebook.cells[last].source = notebook.cells[last].source.replace(right, ".abs().mean(-1, keepdim=True)")
    # From the repository's folder, where some editors start.
    with pytest.raises(CellExecutionError, match="Tensor-likes are not close"):
        execute(notebook, ROOT, small_run_folder)
    assert "checkpoints/step-2" in "".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")


def test_committed_outputs_are_those_of_this_code_in_order(executed):
    committed = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in committed] == list(range(1, len(committed) + 1))

    def kinds(cell: NotebookNode) -> list[str]:
        """Of the outputs, in order. stderr differs between machines, and one text may come in several pieces."""
        found = [output.output_type for output in cell.outputs if output.get("name") != "stderr"]
        return [kind for kind, _ in itertools.groupby(found)]

    fresh = [cell for cell in executed.cells if cell.cell_type == "code"]
    for cell, again in zip(committed, fresh, strict=False):
        assert kinds(cell) == kinds(again), cell.source
        assert "error" not in kinds(cell)
    checks = [re.findall(r"^checked: ([^(]+)", printed(cell), re.MULTILINE) for cell in committed]
    assert sum(map(len, checks)) >= 20


def test_committed_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    assert not re.findall(r"(?:/home/|/Users/|/tmp/|/root/|/usr/|/opt/|[A-Z]:\\\\)[^\"\s]*", text)
    assert str(ROOT) not in text and str(Path.home()) not in text


@pytest.mark.slow
def test_without_a_checkpoint_the_notebook_trains_one(tmp_path):
    for folder in ("minglm", "configs", "notebooks"):  # a repository of its own, whose runs/ is empty
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    notebook = read_notebook()
    last = next(index for index, cell in enumerate(notebook.cells) if cell.id == "embedding")
    notebook.cells = notebook.cells[: last + 1]
    with pytest.raises(CellExecutionError, match="MINGLM_RUN=elsewhere holds no complete checkpoint"):
        execute(copy.deepcopy(notebook), tmp_path / "notebooks", "elsewhere")
    assert not (tmp_path / "elsewhere").exists()

    execute(notebook, tmp_path / "notebooks", None)
    assert RunFolder(tmp_path / "runs" / "quick").newest_checkpoint().name == "step-40"
    text = "".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "training nano for 40 steps now" in text and "checked: embedding of our token" in text
