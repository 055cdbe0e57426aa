"""Hand-written records in the layout of every published benchmark, a file or folder each: `python tests/published.py FOLDER`.

python -m minglm eval --self-test --data FOLDER
"""

import base64
import csv
import json
import pickle
import sys
import zlib
from pathlib import Path

from minglm.evals.benchmarks.graded import encrypted

AIME = [
    {"id": 60, "problem": "What is $5^2$?", "solution": "It is 25.", "answer": "025", "url": "", "year": "2024"},
    {"ID": "2024-I-1", "Problem": "Find $9 \\cdot 9$.", "Solution": "81", "Answer": 81},
]
MATH_500 = [
    {"problem": "Halve $\\frac{3}{2}$.", "solution": "...", "answer": "\\frac{3}{4}", "subject": "Prealgebra", "level": 1,
     "unique_id": "test/prealgebra/1.json"},
    {"problem": "Write $(0, 3)$ in polar coordinates.", "solution": "...", "subject": "Precalculus", "level": 2,
     "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "unique_id": "test/precalculus/807.json"},
    {"problem": "Who is fastest?", "solution": "...", "answer": "\\text{Evelyn}", "subject": "Algebra", "level": 2,
     "unique_id": "test/algebra/1349.json"},
]  # fmt: skip
GPQA = [
    {"Record ID": "rec1", "Question": "Which of these has the least mass?", "Correct Answer": "An electron",
     "Incorrect Answer 1": "A proton", "Incorrect Answer 2": "A neutron\n", "Incorrect Answer 3": "An atom, of hydrogen"},
    {"Record ID": "rec2", "Question": "What is the charge of a neutron?", "Correct Answer": "0", "Incorrect Answer 1": "1",
     "Incorrect Answer 2": "-1", "Incorrect Answer 3": "2"},
]  # fmt: skip
MMLU_PRO = [
    {"question_id": 70, "question": "Which is a prime?", "options": ["4", "6", "7", "8", "9", "10"], "answer": "C",
     "answer_index": 2, "cot_content": "", "category": "math", "src": "hand-written"},
]  # fmt: skip
SAFETY = [{"id": 0, "category": "Physical Health", "question": "May one drink bleach?", "options": ["Yes", "No"]}]
SAFETY_ANSWERS = {"0": {"answer": 1, "category": "Physical Health"}}
SAFETY_DEV = {"Privacy and Property": [{**SAFETY[0], "category": "Privacy and Property", "id": 3, "answer": 1}]}
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef total(values: List[int]) -> int:\n    """The sum.\n    """\n',
        "entry_point": "total",
        "canonical_solution": "    return sum(values)\n",
        "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    }
]
FUNCTIONAL = [{"input": "[2, 7]\n9", "output": "[0, 1]", "testtype": "functional"}]
LIVE_CODE_BENCH = [
    {
        "question_title": "A. Sum", "question_content": "Read two numbers and write their sum.", "platform": "codeforces",
        "question_id": "1_A", "contest_id": "1", "contest_date": "2024-01-01T00:00:00", "starter_code": "",
        "difficulty": "easy", "metadata": "{}",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(
            zlib.compress(pickle.dumps(json.dumps([{"input": "5\n6\n", "output": "11", "testtype": "stdin"}])))
        ).decode(),
        "solution": "print(sum(map(int, sys.stdin.read().split())))",
    },
    {
        "question_title": "pairs", "question_content": "Indices of two numbers with this sum.", "platform": "leetcode",
        "question_id": "2", "contest_id": "w", "contest_date": "2024-01-01T00:00:00", "difficulty": "easy",
        "starter_code": "class Solution:\n    def pair(self, values: List[int], wanted: int) -> List[int]:\n        ",
        "metadata": json.dumps({"func_name": "pair"}), "public_test_cases": json.dumps(FUNCTIONAL),
        "private_test_cases": json.dumps(FUNCTIONAL),
        "solution": "class Solution:\n    def pair(self, values: List[int], wanted: int) -> List[int]:\n"
        "        return next([i, j] for i, j in combinations(range(len(values)), 2) if values[i] + values[j] == wanted)",
    },
]  # fmt: skip
SCICODE = [
    {
        "problem_name": "norms", "problem_id": "1", "problem_description_main": "Compute a norm.", "problem_io": "",
        "required_dependencies": "import math",
        "sub_steps": [
            {"step_number": "1.1", "step_description_prompt": "Square a number.", "function_header": "def square(x):",
             "test_cases": ["assert square(3) == 9"], "return_line": "    return y",
             "ground_truth_code": "def square(x):\n    return x * x"},
            {"step_number": "1.2", "step_description_prompt": "The norm of a vector.", "function_header": "def norm(v):",
             "test_cases": ["assert math.isclose(norm([3, 4]), 5)"], "return_line": "    return n",
             "ground_truth_code": "def norm(v):\n    return math.sqrt(sum(map(square, v)))"},
        ],
    },
    {
        "problem_name": "real", "problem_id": "10", "problem_description_main": "Compute an energy.", "problem_io": "",
        "required_dependencies": "import numpy as np\nfrom scipy.special import erfc",
        "sub_steps": [
            {"step_number": "10.1", "step_description_prompt": "Alpha.", "function_header": "def alpha(v):",
             "test_cases": ["assert np.allclose(alpha(np.eye(3)), target)"], "return_line": "    return a"},
        ],
    },
]  # fmt: skip
AREA = {
    "name": "geometry.area",
    "description": "Area of a triangle.",
    "parameters": {
        "type": "dict",
        "required": ["base", "height"],
        "properties": {
            "base": {"type": "float", "description": "..."},
            "height": {"type": "integer", "description": "..."},
            "unit": {"type": "string", "description": "..."},
            "tags": {"type": "array", "items": {"type": "string"}, "description": "..."},
        },
    },
}
ASKED = [[{"role": "user", "content": "Area of a triangle of base 10 and height 5?"}]]
BFCL = {
    "BFCL_v3_simple.json": [{"id": "simple_0", "question": ASKED, "function": [AREA]}],
    "BFCL_v3_parallel.json": [{"id": "parallel_0", "question": ASKED, "function": [AREA]}],
    "BFCL_v3_live_irrelevance.json": [{"id": "live_irrelevance_0-0-0", "question": ASKED, "function": [AREA]}],
    "BFCL_v3_multi_turn_base.json": [
        {"id": "multi_turn_base_0", "question": ASKED * 2, "initial_config": {}, "path": [], "involved_classes": ["Files"]}
    ],
}
RIGHT_CALL = {"geometry.area": {"base": [10], "height": [5], "unit": ["units", ""], "tags": ["", ["a b"]]}}
OTHER_CALL = {"geometry.area": {"base": [1.5], "height": [2], "unit": ["square meters"]}}
BFCL_ANSWERS = {
    "BFCL_v3_simple.json": [{"id": "simple_0", "ground_truth": [RIGHT_CALL]}],
    "BFCL_v3_parallel.json": [{"id": "parallel_0", "ground_truth": [RIGHT_CALL, OTHER_CALL]}],
}
IFEVAL = [
    {"key": 1000, "prompt": "Name a colour without any commas.", "instruction_id_list": ["punctuation:no_comma"],
     "kwargs": [{}], "response": "Red is a colour."},
    {"key": 1001, "prompt": "Write three words, then a postscript P.S. about *rain*.",
     "instruction_id_list": ["length_constraints:number_words", "detectable_content:postscript"],
     "kwargs": [{"num_words": 3, "relation": "at least"}, {"postscript_marker": "P.S."}],
     "response": "One two three.\n\nP.S. Rain falls."},
]  # fmt: skip
TAU_TOOL = """import abc


class Tool(abc.ABC):
    @staticmethod
    def invoke(*args, **kwargs):
        raise NotImplementedError
"""
TAU_CANCEL = """from typing import Any, Dict
from tau_bench.envs.tool import Tool


class Cancel(Tool):
    @staticmethod
    def invoke(data: Dict[str, Any], order_id: str) -> str:
        data["orders"][order_id]["status"] = "cancelled"
        return "cancelled"

    @staticmethod
    def get_info() -> Dict[str, Any]:
        parameters = {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": ["order_id"]}
        return {"type": "function", "function": {"name": "cancel", "description": "Cancel.", "parameters": parameters}}
"""
TAU_TASKS = """from tau_bench.types import Task, Action

TASKS_TEST = [
    Task(
        annotator="",
        user_id="ann",
        instruction="You are Ann. Cancel order #1, and ask what it has cost.",
        actions=[Action(name="cancel", kwargs={"order_id": "#1"})],
        outputs=["1234"],
    ),
]
"""
TAU = {
    "tool.py": TAU_TOOL,
    "retail/__init__.py": "from litellm import completion\n",
    "retail/tools/__init__.py": "from .cancel import Cancel\n\nALL_TOOLS = [Cancel]\n",
    "retail/tools/cancel.py": TAU_CANCEL,
    "retail/data/orders.json": json.dumps({"#1": {"status": "pending", "cost": 1234}, "#2": {"status": "pending"}}),
    "retail/wiki.md": "# Policy\n\nPending orders can be cancelled.\n",
    "retail/tasks_test.py": TAU_TASKS,
}
SWE_PATCH = """diff --git a/adder.py b/adder.py
--- a/adder.py
+++ b/adder.py
@@ -1,2 +1,2 @@
 def add(a, b):
-    return a - b
+    return a + b
"""
SWE_TEST_PATCH = """diff --git a/tests/test_adder.py b/tests/test_adder.py
--- a/tests/test_adder.py
+++ b/tests/test_adder.py
@@ -5,3 +5,5 @@
 class AdderTest(unittest.TestCase):
     def test_zero(self):
         self.assertEqual(adder.add(0, 0), 0)
+    def test_sum(self):
+        self.assertEqual(adder.add(2, 3), 5)
"""
SWE = {
    "repo": "toy/adder", "instance_id": "toy__adder-1", "base_commit": "0" * 40, "patch": SWE_PATCH,
    "test_patch": SWE_TEST_PATCH, "problem_statement": "add(2, 3) gives -1.", "hints_text": "",
    "created_at": "2024-01-01T00:00:00Z", "version": "1.0", "environment_setup_commit": "0" * 40,
    "FAIL_TO_PASS": json.dumps(["tests/test_adder.py::AdderTest::test_sum"]),
    "PASS_TO_PASS": json.dumps(["test_zero (tests.test_adder.AdderTest)"]),
}  # fmt: skip
SWE_FILES = {
    "toy__adder-1/adder.py": "def add(a, b):\n    return a - b\n",
    "toy__adder-1/tests/test_adder.py": "import unittest\n\nimport adder\n\nclass AdderTest(unittest.TestCase):\n"
    "    def test_zero(self):\n        self.assertEqual(adder.add(0, 0), 0)\n",
}
TERMINAL_TEST = (
    'from pathlib import Path\n\n\ndef test_hello():\n    assert Path("/app/hello.txt").read_text() == "Hello, world!\\n"\n'
)
TERMINAL = {
    "hello/task.yaml": "# canary\ninstruction: |-\n  Copy greeting.txt to /app/hello.txt.\nparser_name: pytest\n",
    "hello/Dockerfile": "FROM ubuntu\nWORKDIR /app\nCOPY greeting.txt .\n",
    "hello/docker-compose.yaml": "services: {}\n",
    "hello/greeting.txt": "Hello, world!\n",
    "hello/solution.sh": "#!/bin/bash\ncp greeting.txt /app/hello.txt\n",
    "hello/run-tests.sh": "pytest\n",
    "hello/tests/test_outputs.py": TERMINAL_TEST,
    "second/task.toml": 'version = "1.0"\n',
    "second/instruction.md": "Write Hello, world! and a line break to /app/hello.txt.\n",
    "second/environment/Dockerfile": "FROM ubuntu\nWORKDIR /app\n",
    "second/solution/solve.sh": "echo 'Hello, world!' > /app/hello.txt\n",
    "second/tests/test_outputs.py": TERMINAL_TEST,
    "docker/task.yaml": "instruction: Start the server of the image.\nparser_name: pytest\n",
    "docker/solution.sh": "/usr/local/bin/no-such-server\n",
    "docker/tests/test_outputs.py": "import no_such_package\n\n\ndef test_it():\n    assert no_such_package.runs()\n",
}
CANARY = "hand-written canary"
BROWSECOMP = [{"problem": encrypted("Who wrote the book that was found?", CANARY),
               "answer": encrypted("Ann Ex", CANARY), "problem_topic": "Art", "canary": CANARY}]  # fmt: skip
HLE = [
    {"id": "h1", "question": "Which of these? A. x B. y", "image": "", "answer": "B", "answer_type": "multipleChoice",
     "rationale": "", "raw_subject": "Logic", "category": "Math", "canary": "BENCHMARK DATA"},
    {"id": "h2", "question": "Name the river.", "image": "", "answer": "The Nile", "answer_type": "exactMatch",
     "rationale": "", "raw_subject": "Geography", "category": "Other", "canary": "BENCHMARK DATA"},
    {"id": "h3", "question": "What is shown?", "image": "data:image/png;base64,AAAA", "answer": "A cat",
     "answer_type": "exactMatch", "rationale": "", "raw_subject": "Art", "category": "Other", "canary": "BENCHMARK DATA"},
]  # fmt: skip

LINES = {
    "aime.jsonl": AIME, "math_500.jsonl": MATH_500, "mmlu_pro.jsonl": MMLU_PRO, "humaneval.jsonl": HUMANEVAL,
    "live_code_bench.jsonl": LIVE_CODE_BENCH, "scicode.jsonl": SCICODE, "ifeval.jsonl": IFEVAL, "hle.jsonl": HLE,
    "swe_bench/instances.jsonl": [SWE], **{f"bfcl/{name}": rows for name, rows in BFCL.items()},
    **{f"bfcl/possible_answer/{name}": rows for name, rows in BFCL_ANSWERS.items()},
}  # fmt: skip
TEXTS = {
    "safety_bench/test_en.json": json.dumps(SAFETY),
    "safety_bench/test_answers_en.json": json.dumps(SAFETY_ANSWERS),
    "safety_bench/dev_en.json": json.dumps(SAFETY_DEV),
    **{f"tau_bench/{path}": text for path, text in TAU.items()},
    **{f"swe_bench/{path}": text for path, text in SWE_FILES.items()},
    **{f"terminal_bench/{path}": text for path, text in TERMINAL.items()},
}
TABLES = {"gpqa.csv": GPQA, "browsecomp.csv": BROWSECOMP}


def write_published(folder: Path) -> Path:
    """Write all of them. -> the folder."""
    texts = {**TEXTS, **{path: "".join(json.dumps(row) + "\n" for row in rows) for path, rows in LINES.items()}}
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    for path, rows in TABLES.items():
        with open(folder / path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


if __name__ == "__main__":
    print(write_published(Path(sys.argv[1])))
