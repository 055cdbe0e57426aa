"""TAU-bench (arXiv 2406.12045): a customer is served with the tools of a shop or an airline, by its policy.

What is read is a folder of the benchmark's own repository, `tau_bench/envs/retail` or `airline`: tasks_test.py (read, not
run), wiki.md, tools/ and data/*.json. The tools run in the sandbox, on a fresh copy of the data for each attempt. Right is an
attempt that comes to its end, leaves the data as the task's own actions do and says all of its outputs. Stricter than
published: where the task has actions, an attempt without a call is wrong, for in some tasks nothing is to be changed. More
lenient: all calls of a message are done, not its first one alone.

The customer is played by a model, behind --grader-url: the task's instruction is for it alone. Its first words are fixed.
"""

import ast
import functools
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minglm.evals.benchmarks.calls import calls_of
from minglm.evals.benchmarks.question import RIGHT, Question, Unscorable
from minglm.evals.benchmarks.records import RecordError
from minglm.evals.benchmarks.shells import files_below
from minglm.evals.endpoint import Endpoint
from minglm.tasks.sandbox import Limits, default_sandbox
from minglm.tasks.task import Episode, Message, TaskError, Verdict

LIMITS = Limits(cpu=20.0, wall=60.0, memory=1 << 30, file_bytes=32 << 20, output_bytes=4 << 20)
TURNS = 30
OVER = "###STOP###"
ENDS = "transfer_to_human_agents"
OPENING = "Hello, I need some help."
CUSTOMER = f"""You play a customer who talks to a service agent. Stay in this role, and do what it says:
{{instruction}}
Say one short thing at a time. Do not tell everything at once, make nothing up that is not given here, and do not quote these \
words. When your wish is fulfilled, or cannot be, say only {OVER}"""

_HARNESS = """
import hashlib, importlib, json, os, sys
with open("job.json", encoding="utf-8") as file:
    job = json.load(file)
os.unlink("job.json")
sys.path.insert(0, os.getcwd())
tools = {tool.get_info()["function"]["name"]: tool for tool in importlib.import_module(job["module"]).ALL_TOOLS}
data = {}
for name in job["data"]:
    with open(name, encoding="utf-8") as file:
        data[os.path.basename(name)[:-5]] = json.load(file)
results = []
for name, arguments in job["calls"]:
    if name not in tools:
        results.append(f"Unknown action {name}")
        continue
    try:
        results.append(str(tools[name].invoke(data=data, **arguments)))
    except Exception as error:
        results.append(f"Error: {error}")
state = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
told = {"results": results, "state": state, "tools": [tool.get_info() for tool in tools.values()]}
os.write(3, (job["token"] + json.dumps(told)).encode())
"""


class Shop:
    """The tools and data of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        tool = folder.parent / "tool.py"
        for needed in (tool, folder / "wiki.md", folder / "tools" / "__init__.py", folder / "data"):
            if not needed.exists():
                raise RecordError(
                    f"{folder}: found no {needed.name}; wanted tau_bench/envs/retail or airline of the repository"
                )
        package = f"tau_bench/envs/{folder.name}"
        data = {path: text for path, text in files_below(folder / "data").items() if path.endswith(".json")}
        self._files = {
            # The published packages import clients of models, which no tool needs.
            **{f"{path}/__init__.py": "" for path in ("tau_bench", "tau_bench/envs", package)},
            "tau_bench/envs/tool.py": tool.read_text(encoding="utf-8"),
            **{f"{package}/tools/{path}": text for path, text in files_below(folder / "tools").items() if path.endswith(".py")},
            **{f"{package}/data/{path}": text for path, text in data.items()},
            "run.py": _HARNESS,
        }
        self._job = {"module": package.replace("/", ".") + ".tools", "data": [f"{package}/data/{path}" for path in data]}
        self._after = functools.lru_cache(1024)(self._run)
        self.wiki = (folder / "wiki.md").read_text(encoding="utf-8")
        self.tools = self.after(())["tools"]

    def _run(self, calls: str) -> dict[str, Any]:
        token = secrets.token_hex(16)
        job = json.dumps({**self._job, "calls": json.loads(calls), "token": token})
        outcome = default_sandbox().run({**self._files, "job.json": job}, "run.py", limits=LIMITS)
        _, mark, told = outcome.report.partition(token)
        if not mark:
            why = outcome.killed_by or outcome.stderr.strip()[-300:]
            raise Unscorable(f"{self.folder}: the tools do not run in the sandbox ({why}); wanted the repository's own folder")
        return json.loads(told)

    def after(self, calls: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """Do calls on fresh data. -> their results, a hash of the data, and the descriptions of the tools."""
        usable = [(name, own if isinstance(own, dict) else {}) for name, own in calls]
        return self._after(json.dumps(usable))


class Service(Episode):
    """The shop answers calls, the customer what is said; it ends when the customer says so or is handed over."""

    def __init__(self, shop: Shop, instruction: str, customer: Endpoint | None, place: str):
        self.shop, self.customer, self.place = shop, customer, place
        self.calls: list[tuple[str, Any]] = []
        # Seen from the customer, the agent is the user.
        self.heard: list[Message] = [
            {"role": "system", "content": CUSTOMER.format(instruction=instruction)},
            {"role": "user", "content": "How can I help you?"},
            {"role": "assistant", "content": OPENING},
        ]

    def step(self, message: Message) -> list[Message]:
        if self.done:
            raise TaskError("the episode has ended: start another one")
        found = []
        for name, arguments in calls_of(message):
            self.calls.append((name, arguments))
            found.append({"role": "tool", "content": self.shop.after(self.calls)["results"][-1]})
            self.done = self.done or name == ENDS
        if found:
            return found
        if self.customer is None:
            raise Unscorable(f"{self.place}: the customer is played by a model: --grader-url and --grader-name")
        self.heard.append({"role": "user", "content": message.get("content") or "..."})
        said = self.customer.ask(self.heard).message["content"]
        self.heard.append({"role": "assistant", "content": said})
        self.done = OVER in said
        return [] if self.done else [{"role": "user", "content": said}]


def tau_bench(folder: Path, customer: Endpoint | None) -> list[Question]:
    """All test tasks of a folder, or of both folders in it. Raises RecordError for anything else."""
    if not folder.is_dir():
        raise RecordError(f"{folder}: found no folder; wanted tau_bench/envs/retail or airline of the repository")
    if not (folder / "tools").is_dir():
        found = [inner for inner in sorted(folder.iterdir()) if (inner / "tools").is_dir()]
        return [question for inner in found for question in tau_bench(inner, customer)]
    shop = Shop(folder)
    file = next((file for file in (folder / "tasks_test.py", folder / "tasks.py") if file.is_file()), None)
    if file is None:
        raise RecordError(f"{folder}: found no tasks_test.py; wanted tau_bench/envs/retail or airline of the repository")
    return [_question(shop, number, *task, customer) for number, task in enumerate(read_tasks(file))]


def read_tasks(file: Path) -> list[tuple[str, str, list[tuple[str, dict[str, Any]]], list[str]]]:
    """Place, instruction, actions and outputs of each Task(...) in a Python file, which is read, not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise RecordError(f"{file}:{error.lineno}: this is no Python: {error.msg}") from None
    tasks = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Task"]
    if not tasks:
        raise RecordError(f"{file}: found no Task(...); wanted the tasks of tau-bench")
    return [_read_task(file, node) for node in sorted(tasks, key=lambda node: node.lineno)]


def _read_task(file: Path, node: ast.Call):
    place = f"{file}:{node.lineno}"
    found = {keyword.arg: keyword.value for keyword in node.keywords}
    try:
        instruction = ast.literal_eval(found["instruction"])
        outputs = ast.literal_eval(found["outputs"]) if "outputs" in found else []
        actions = []
        for action in found["actions"].elts:
            own = {keyword.arg: ast.literal_eval(keyword.value) for keyword in action.keywords}
            actions.append((own["name"], own["kwargs"]))
    except (KeyError, ValueError, AttributeError) as error:
        raise RecordError(f"{place}: {error!r}; wanted instruction, actions of name and kwargs, outputs, as literals") from None
    if not isinstance(instruction, str) or not all(isinstance(one, str) for one in outputs):
        raise RecordError(f"{place}: instruction {instruction!r:.60}, outputs {outputs!r:.60}; wanted a text, and texts")
    return place, instruction, actions, outputs


def _question(
    shop: Shop, number: int, place: str, instruction: str, actions: list, outputs: list[str], customer: Endpoint | None
) -> Question:
    messages = [{"role": "system", "content": shop.wiki}, {"role": "user", "content": OPENING}]

    def judge(response: Sequence[Message]) -> Verdict:
        turns = [message for message in response if message.get("role") == "assistant"]
        calls = [call for message in turns for call in calls_of(message)]
        # As published: what stands beside a call is heard by nobody, and an output is said within one message.
        heard = [message for message in turns if not message.get("tool_calls")]
        said = [str(message.get("content") or "").lower().replace(",", "") for message in heard]
        reasons = []
        if actions and not calls:
            reasons.append("did nothing")
        # The world has the last word only where the turns ran out, or the customer was handed over.
        if response[-1].get("role") != "assistant" and ENDS not in [name for name, _ in calls]:
            reasons.append("was not over")
        if shop.after(calls)["state"] != shop.after(actions)["state"]:
            reasons.append("left the data in another state")
        reasons += [f"did not say {output}" for output in outputs if not any(output.lower() in one for one in said)]
        return Verdict(0.0, tuple(reasons)) if reasons else RIGHT

    gold: list[Message] = []
    for (name, own), result in zip(actions, shop.after(actions)["results"], strict=True):
        call = {"type": "function", "function": {"name": name, "arguments": own}}
        gold += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": result}]
    gold.append({"role": "assistant", "content": " ".join(["Done.", *outputs])})
    return Question(
        "tau_bench", f"{shop.folder.name}-{number}", messages, judge, gold, tools=shop.tools, turns=TURNS,
        world=lambda: Service(shop, instruction, customer, place), place=place, published=instruction,
    )  # fmt: skip
