"""The server under load: many clients that ask, leave in the middle, and send nonsense, for a while.

`pytest -m slow tests/test_serve_load.py -s` runs 64 clients for 60 s and prints the figures.
"""

import asyncio
import json
import random
import time
from collections import Counter

import httpx
import psutil
import pytest
from by_heart import CALL, CODE, CONCLUSION, SCRIPT, THOUGHT, WEATHER, learnt, serving
from test_serve import wait_until_idle

from minglm.engine.engine import Engine

ANSWERS = {"hello": "Hello! How are you?", "script": SCRIPT, "code": CODE, "2+2?": CONCLUSION}
NONSENSE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"messages": [{"role": "wizard", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 100000}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": -3}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    json.dumps({"messages": [{"role": "user", "content": "word " * 4000}]}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER], "tool_choice": "always"}).encode(),
]
SENT = {"Content-Type": "application/json"}


def body(question: str, **keys) -> dict:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, **keys}


class Client:
    """One of many: acts at random, and notes each outcome. `wrong` holds what must not have happened."""

    def __init__(self, http: httpx.AsyncClient, seed: int, outcomes: Counter, wrong: list[str]):
        self.http, self.draw, self.outcomes, self.wrong = http, random.Random(seed), outcomes, wrong

    async def run(self, end: float) -> None:
        acts = [self.ask, self.ask, self.stream, self.leave_stream, self.leave_early, self.call_tool, self.send_nonsense]
        while time.monotonic() < end:
            act = self.draw.choice(acts)
            outcome = await act()
            self.outcomes[f"{act.__name__}: {outcome}"] += 1

    async def post(self, **keys) -> httpx.Response | None:
        """None where the queue was full."""
        response = await self.http.post("/v1/chat/completions", json=keys)
        if response.status_code == 429:
            await asyncio.sleep(0.05)
            return None
        if response.status_code != 200:
            self.wrong.append(f"{response.status_code}: {response.text[:200]}")
        return response

    async def ask(self) -> str:
        question = self.draw.choice(sorted(ANSWERS))
        response = await self.post(**body(question, n=self.draw.choice([1, 1, 3])))
        if response is None:
            return "refused"
        for choice in response.json()["choices"]:
            self.check(question, choice["message"]["content"], choice["message"].get("reasoning_content"))
        return "answered"

    async def stream(self) -> str:
        question = self.draw.choice(sorted(ANSWERS))
        content = reasoning = ""
        async with self.http.stream("POST", "/v1/chat/completions", json=body(question, stream=True)) as response:
            if response.status_code == 429:
                return "refused"
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    content += delta.get("content") or ""
                    reasoning += delta.get("reasoning_content") or ""
        self.check(question, content, reasoning)
        return "answered"

    async def leave_stream(self) -> str:
        lines = self.draw.randrange(1, 40)
        async with self.http.stream("POST", "/v1/chat/completions", json=body("sing", stream=True)) as response:
            async for _ in response.aiter_lines():
                lines -= 1
                if lines == 0:
                    break
        return "left" if response.status_code == 200 else "refused"

    async def leave_early(self) -> str:
        try:
            await self.http.post("/v1/chat/completions", json=body("sing", n=2), timeout=self.draw.uniform(0.01, 0.3))
        except httpx.TimeoutException:
            return "left"
        return "refused"

    async def call_tool(self) -> str:
        response = await self.post(**body("rain?", tools=[WEATHER]))
        if response is None:
            return "refused"
        calls = response.json()["choices"][0]["message"]["tool_calls"]
        if [json.loads(call["function"]["arguments"]) for call in calls] != [CALL["function"]["arguments"]]:
            self.wrong.append(f"rain? gave {calls}")
        return "answered"

    async def send_nonsense(self) -> str:
        content = self.draw.choice(NONSENSE)
        response = await self.http.post("/v1/chat/completions", content=content, headers=SENT)
        if response.status_code != 400 or not response.json()["error"]["message"]:
            self.wrong.append(f"{content[:60]} gave {response.status_code}: {response.text[:200]}")
        return "refused"

    def check(self, question: str, content: str, reasoning: str | None) -> None:
        thought = THOUGHT if question == "2+2?" else ""
        if (content, reasoning or "") != (ANSWERS[question], thought):
            self.wrong.append(f"{question} gave {content!r}, {reasoning!r}")


async def load(url: str, clients: int, seconds: float) -> tuple[Counter, list[str], list[int]]:
    """Outcomes, what was wrong, and the process's memory in bytes, once a second."""
    outcomes, wrong, memory = Counter(), [], []

    async def watch() -> None:
        while True:
            memory.append(psutil.Process().memory_info().rss)
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        watching = asyncio.create_task(watch())
        end = time.monotonic() + seconds
        await asyncio.gather(*(Client(http, seed, outcomes, wrong).run(end) for seed in range(clients)))
        watching.cancel()
    return outcomes, wrong, memory


def run_load(clients: int, seconds: float) -> list[int]:
    """Memory, once everything else has been found right: answers, blocks, and that each kind of thing happened."""
    model, tokenizer = learnt()
    # Few blocks: sequences wait, and give way to one another.
    engine = Engine(model, tokenizer, max_running=16, max_batch_tokens=256, num_blocks=32)
    with serving(engine, tokenizer, max_queue=clients * 3 // 4) as served:
        outcomes, wrong, memory = asyncio.run(load(served.url, clients, seconds))
        wait_until_idle(served)
        stats, cancelled = served.worker.stats, served.worker.cancelled
        assert served.worker.failures == 0
    assert wrong == []
    for outcome in ("ask: answered", "stream: answered", "call_tool: answered", "leave_stream: left", "leave_early: left"):
        assert outcomes[outcome], f"{outcome} never happened: {outcomes}"
    assert outcomes["send_nonsense: refused"] and cancelled and stats.preemptions
    print(f"\n{clients} clients, {seconds:.0f} s: {dict(sorted(outcomes.items()))}")
    print(f"{stats.generated_tokens} tokens written, {cancelled} answers cancelled, {stats.preemptions} preemptions")
    print(f"memory of clients and server: {', '.join(f'{m / 2**20:.0f}' for m in memory[:: max(1, len(memory) // 12)])} MiB")
    return memory


def test_clients_that_leave_or_send_nonsense_disturb_nobody():
    run_load(clients=24, seconds=5)


@pytest.mark.slow
def test_64_clients_for_a_minute_with_flat_memory():
    memory = run_load(clients=64, seconds=60)
    settled, last = memory[len(memory) // 3], memory[-1]
    assert last < settled + 24 * 2**20, f"grew from {settled} to {last} bytes in {len(memory) * 2 // 3} s"
