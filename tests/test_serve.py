"""The server as its clients see it: real weights that know their answers, over HTTP."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from by_heart import CALL, CONCLUSION, SCRIPT, THOUGHT, WEATHER, learnt, serving

from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.model import GLM
from minglm.serve import app
from minglm.serve.protocol import MAX_CHOICES

LIMIT = 200_000  # bytes of a body


@pytest.fixture(scope="module")
def served():
    model, tokenizer = learnt()
    engine = Engine(model, tokenizer, max_running=8, max_batch_tokens=256)
    with serving(engine, tokenizer, max_body_bytes=LIMIT, max_queue=16) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each test: no answer is under way and no block is held."""
    yield
    if "served" in request.fixturenames:
        wait_until_idle(request.getfixturevalue("served"))


def wait_until_idle(served) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        stats = served.worker.stats
        if not (served.worker.open_answers or stats.running or stats.waiting):
            served.engine.check_invariants()
            assert stats.free_blocks == stats.num_blocks
            return
        time.sleep(0.02)
    raise AssertionError(f"still under way: {served.worker.open_answers} answers, {served.worker.stats}")


def ask(client, question: str, **keys):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="parrot", messages=messages, temperature=0, **keys)


def body(question: str = "hello", **keys) -> dict:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, **keys}


# ------------------------------------------------------------------------------------------- a session of openai's client


def test_openai_chat(client):
    answer = ask(client, "hello")
    assert answer.object == "chat.completion" and answer.model == "parrot"
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.role, choice.message.content) == ("stop", "assistant", "Hello! How are you?")
    assert choice.message.tool_calls is None and choice.logprobs is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_openai_stream_is_the_same_answer(client):
    with ask(client, "hello", stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello! How are you?"
    assert len(chunks) > 4, "it came at once"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last.choices == [] and last.usage == ask(client, "hello").usage
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_openai_thinking_and_not(client):
    modes = {True: THOUGHT, False: None, None: THOUGHT}
    for thinking, thought in modes.items():
        answer = ask(client, "2+2?", extra_body={"chat_template_kwargs": {"enable_thinking": thinking}})
        message = answer.choices[0].message
        assert message.content == CONCLUSION
        assert getattr(message, "reasoning_content", None) == thought
    with ask(client, "2+2?", stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == CONCLUSION


def test_openai_thinking_budget_ends_the_thinking(client):
    answer = ask(client, "2+2?", extra_body={"thinking_budget": 3, "return_token_ids": True}, max_tokens=60)
    message = answer.choices[0].message
    assert 0 < len(message.reasoning_content) < len(THOUGHT) and THOUGHT.startswith(message.reasoning_content)


def test_openai_tools_are_called_and_their_results_go_back(client):
    answer = ask(client, "rain?", tools=[WEATHER])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_") and call.type == "function" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == CALL["function"]["arguments"]

    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [{"role": "user", "content": "rain?"}, choice.message.model_dump(exclude_none=True), result]
    again = client.chat.completions.create(model="parrot", messages=messages, tools=[WEATHER], max_tokens=5)
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


def test_openai_streamed_tool_calls_are_the_same(client):
    with ask(client, "rain?", tools=[WEATHER], stream=True) as stream:
        chunks = list(stream)
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [part.function.name for part in parts if part.id] == ["weather"]
    assert len(parts) > 2, "the arguments came at once"
    assert json.loads("".join(part.function.arguments for part in parts)) == CALL["function"]["arguments"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("thinking", [True, False, None])
def test_openai_a_required_call_comes_whatever_the_model_would_say(client, choice, thinking):
    keys = {"chat_template_kwargs": {"enable_thinking": thinking}, "thinking_budget": 0}
    answer = ask(client, "hello", tools=[WEATHER], tool_choice=choice, max_tokens=300, extra_body=keys)
    assert answer.choices[0].finish_reason == "tool_calls"
    for call in answer.choices[0].message.tool_calls:
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" and type(arguments["city"]) is str and type(arguments["days"]) is int


def test_openai_a_call_that_is_cut_off_is_reported_and_not_completed(client):
    answer = ask(client, "rain?", tools=[WEATHER], max_tokens=16)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    (error,) = choice.tool_call_errors
    assert "end of the text" in error["message"] and error["position"] > 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice.message.tool_calls[0].function.arguments)


def test_openai_tool_choice_none_means_no_call(client):
    answer = ask(client, "rain?", tools=[WEATHER], tool_choice="none", max_tokens=20)
    assert answer.choices[0].message.tool_calls is None


def test_openai_log_probabilities(client, served):
    answer = ask(client, "hello", logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    entries, ids = choice.logprobs.content, choice.token_ids
    assert len(entries) == len(ids) == answer.usage.completion_tokens
    model, tokenizer = learnt()
    prompt = answer.prompt_token_ids[0]
    with torch.no_grad():
        wanted = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for position, (entry, id) in enumerate(zip(entries, ids, strict=True)):
        assert bytes(entry.bytes) == tokenizer.decode_bytes([id])
        assert entry.logprob == pytest.approx(wanted[position, id].item(), abs=1e-4)
        best = wanted[position].topk(3).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-4)


def test_openai_choices_differ_and_a_seed_repeats_them(client):
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(model="parrot", prompt="what", n=4, seed=seed, max_tokens=8, temperature=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.text for choice in answer.choices]

    first = texts(1)
    assert len(set(first)) > 1
    assert texts(1) == first != texts(100)
    assert texts(2)[:3] == first[1:], "the seeds of choices count up"


def test_openai_stop_strings_and_length(client):
    stopped = ask(client, "hello", stop=["How", "xyz"])
    assert (stopped.choices[0].finish_reason, stopped.choices[0].message.content) == ("stop", "Hello!")
    cut = ask(client, "sing", max_completion_tokens=7)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 7


def test_openai_completions_of_several_prompts(client):
    _, tokenizer = learnt()
    prompts = ["la la", "Hello! How"]
    as_text = client.completions.create(model="parrot", prompt=prompts, max_tokens=6, temperature=0, logprobs=1, n=2)
    as_ids = client.completions.create(
        model="parrot", prompt=[tokenizer.encode(prompt) for prompt in prompts], max_tokens=6, temperature=0, logprobs=1, n=2
    )
    assert [choice.text for choice in as_text.choices] == [choice.text for choice in as_ids.choices]
    assert len(as_text.choices) == 4 and as_text.choices[0].text == as_text.choices[1].text
    for choice in as_text.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs)
        assert choice.logprobs.text_offset[0] == 0
    with client.completions.create(model="parrot", prompt="la la", max_tokens=6, temperature=0, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == as_text.choices[0].text


def test_openai_models(client):
    (model,) = client.models.list().data
    assert model.id == "parrot" and client.models.retrieve("parrot") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_openai_errors_have_their_classes(client):
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, "hello", n=MAX_CHOICES + 1)
    assert bad.value.body["param"] == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert missing.value.body["code"] == "model_not_found"


def test_openai_cancelling_a_stream_ends_the_generation(client, served):
    before = served.worker.cancelled
    stream = ask(client, "sing", stream=True)
    for _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    wait_until_idle(served)
    assert served.worker.cancelled == before + 1


def test_an_answer_that_nobody_waits_for_is_cancelled(served):
    before = served.worker.cancelled
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=body("sing", ignore_eos=True, n=4), timeout=0.3)
    wait_until_idle(served)
    assert served.worker.cancelled == before + 4


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "keys, param",
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x"}] * 400}, "messages"),
        ({"max_tokens": 5000}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"n": 10**6}, "n"),
    ],
)
def test_bad_input_is_refused_in_openais_form(served, keys, param):
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body() | keys)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("arguments", ["{broken", "[1]", "7", '"text"', None])
def test_arguments_that_are_no_json_object_are_refused(served, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages[1].tool_calls[0]")


@pytest.mark.parametrize(
    "content, kind, status",
    [
        (b'{"messages": "\xff"}', "application/json", 400),
        (b"", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b" " * (LIMIT + 1), "application/json", 413),
    ],
)
def test_bodies_that_cannot_be_read_are_refused(served, content, kind, status):
    answer = httpx.post(f"{served.url}/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_body_without_a_length_is_cut_off_at_the_limit(served):
    def pieces():
        for _ in range(100):
            yield b" " * 10_000

    answer = httpx.post(f"{served.url}/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_unknown_ways_and_methods_are_answered_in_openais_form(served):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/weights", 404)]:
        answer = httpx.request(method, served.url + path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_lone_surrogate_has_no_tokens(served):
    asked = {"chat/completions": {"messages": [{"role": "user", "content": "\ud800"}]}, "completions": {"prompt": "\ud800"}}
    for path, keys in asked.items():
        content, headers = json.dumps(keys).encode(), {"Content-Type": "application/json"}
        answer = httpx.post(f"{served.url}/v1/{path}", content=content, headers=headers)
        assert answer.status_code == 400 and "surrogate" in answer.json()["error"]["message"]


def test_ids_that_are_not_in_the_vocabulary_are_refused(served):
    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": [[5], [5, 10**6]]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt[1]"


def test_user_text_never_becomes_a_control_token(served):
    _, tokenizer = learnt()
    answer = httpx.post(
        f"{served.url}/v1/chat/completions", json=body("<|assistant|></think>", max_tokens=1, return_token_ids=True)
    )
    (ids,) = answer.json()["prompt_token_ids"]
    assert ids.count(tokenizer.special_ids["<|assistant|>"]) == 1
    assert tokenizer.special_ids["</think>"] not in ids


def test_refused_requests_disturb_nobody(served):
    """While one answer is written, everything wrong is thrown at the server."""
    url = f"{served.url}/v1/chat/completions"
    bad = [b"{", b'{"messages": []}', b"\xff", json.dumps(body(n=10**6)).encode(), json.dumps(body(temperature=-1)).encode()]

    def good() -> str:
        return httpx.post(url, json=body("script"), timeout=60).json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(good) for _ in range(4)]
        for content in bad * 4:
            assert httpx.post(url, content=content, headers={"Content-Type": "application/json"}).status_code == 400
        assert {answer.result() for answer in answers} == {SCRIPT}


def test_a_full_queue_says_when_to_come_again(served):
    url = f"{served.url}/v1/chat/completions"

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(client.post(url, json=body("sing", n=4, max_tokens=100)) for _ in range(8)))

    answers = asyncio.run(together())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    refused = answers[statuses.index(429)]
    assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "queue_full"


# ------------------------------------------------------------------------------------------- health, metrics, keys, weights


def test_health_and_metrics_count_what_was_done(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "model": "parrot", "weights_version": 0}

    def value(name: str) -> float:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = value("minglm_new_tokens_total")
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body()).json()
    assert value("minglm_new_tokens_total") == before + answer["usage"]["completion_tokens"]
    httpx.get(f"{served.url}/a-path-nobody-knows")
    text = httpx.get(f"{served.url}/metrics").text
    assert 'minglm_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "a-path-nobody-knows" not in text and value("minglm_free_blocks") == served.worker.stats.num_blocks


def test_only_this_machine_may_be_named_where_there_is_no_key(served):
    answer = httpx.get(f"{served.url}/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "wrong_host"
    assert httpx.get(f"{served.url}/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_an_api_key_is_asked_for_and_weights_want_their_own(tmp_path):
    model, tokenizer = learnt()
    own = GLM(model.config)
    own.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    GLM(model.config).save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "damaged")
    (tmp_path / "damaged" / "model-00001-of-00001.safetensors").write_bytes(b"x")
    engine = Engine(own.eval(), tokenizer)
    with serving(engine, tokenizer, api_key="key-1", weights_token="token-2") as served:

        def status(path: str, token: str | None, **json: object) -> int:
            headers = {"Authorization": f"Bearer {token}".encode()} if token else {}
            method = "POST" if json else "GET"
            return httpx.request(method, served.url + path, headers=headers, json=json or None, timeout=60).status_code

        assert status("/health", None) == status("/", None) == 200
        for path in ("/v1/models", "/metrics"):
            assert [status(path, token) for token in (None, "key-2", "kéy", "key-1")] == [401, 401, 401, 200]
        assert status("/v1/completions", None, prompt="x") == 401
        assert status("/v1/completions", "key-1", prompt="x") == 200

        new, damaged = str(tmp_path / "new"), str(tmp_path / "damaged")
        assert status("/v1/weights", "key-1", folder=new) == 401
        assert status("/v1/weights", "token-2", folder=str(tmp_path)) == 400
        assert status("/v1/weights", "token-2", folder=damaged) == 400
        assert httpx.get(f"{served.url}/health").json()["weights_version"] == 0
        assert status("/v1/weights", "token-2", folder=new) == 200
        assert httpx.get(f"{served.url}/health").json()["weights_version"] == 1
        headers = {"Authorization": "Bearer key-1"}
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "la", "temperature": 0}, headers=headers).json()
    assert answer["system_fingerprint"] == "weights-1"
    fresh = Engine(GLM.from_pretrained(tmp_path / "new").eval(), tokenizer)
    (wanted,) = fresh.generate(["la"], SamplingParams(temperature=0, max_tokens=16))
    assert answer["choices"][0]["text"] == wanted.text


def test_drafts_change_no_answer_and_are_counted():
    model, tokenizer = learnt()
    engine = Engine(model, tokenizer, draft_tokens=2)
    with serving(engine, tokenizer) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        for question, wanted in {"hello": "Hello! How are you?", "script": SCRIPT, "2+2?": CONCLUSION}.items():
            answer = client.post("/v1/chat/completions", json=body(question)).json()
            assert answer["choices"][0]["message"]["content"] == wanted
        call = client.post("/v1/chat/completions", json=body("rain?", tools=[WEATHER])).json()["choices"][0]["message"]
        assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == CALL["function"]["arguments"]
        metrics = client.get("/metrics").text
        wait_until_idle(served)
    counts = dict(re.findall(r'minglm_(\w+)_tokens_total{position="1"} ([\d.]+)', metrics))
    assert 0 < float(counts["accepted"]) <= float(counts["drafted"])


def test_a_stream_that_has_nothing_to_say_shows_that_it_lives(monkeypatch):
    monkeypatch.setattr(app, "KEEP_ALIVE_SECONDS", 0.06)
    model, tokenizer = learnt()
    engine = Engine(model, tokenizer)
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.15), step())[1])
    with serving(engine, tokenizer) as served:
        text = httpx.post(f"{served.url}/v1/chat/completions", json=body(stream=True, max_tokens=3), timeout=60).text
    assert text.count(": still working\n\n") >= 2 and text.endswith("data: [DONE]\n\n")


def test_return_experts_gives_the_choice_of_every_token_that_was_fed(served):
    asked = body("hello", return_experts=True, return_token_ids=True)
    whole = httpx.post(f"{served.url}/v1/chat/completions", json=asked).json()
    choice, (prompt,) = whole["choices"][0], whole["prompt_token_ids"]
    config = served.engine.model.config
    assert len(choice["experts"]) == len(prompt) + len(choice["token_ids"]) - 1
    layers = config.num_hidden_layers - config.first_k_dense_replace
    assert all(len(layer) == config.num_experts_per_tok for token in choice["experts"] for layer in token)
    assert {len(token) for token in choice["experts"]} == {layers}


def test_a_step_that_fails_costs_its_answers_and_nothing_else(monkeypatch):
    model, tokenizer = learnt()
    engine = Engine(model, tokenizer)
    with serving(engine, tokenizer) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        with monkeypatch.context() as patched:
            patched.setattr(engine, "step", lambda: 1 / 0)
            answer = client.post("/v1/chat/completions", json=body())
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
            streamed = client.post("/v1/chat/completions", json=body(stream=True)).text
            assert "ZeroDivisionError" in streamed.splitlines()[-2] and '"error"' in streamed
        wait_until_idle(served)
        assert client.post("/v1/chat/completions", json=body()).json()["choices"][0]["message"]["content"]
        assert client.get("/health").status_code == 200


def test_the_command_serves_a_folder_until_it_is_interrupted(tmp_path):
    model, tokenizer = learnt()
    folder = tmp_path / "runs" / "small" / "checkpoints" / "step-3"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minglm", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"{url}/health").json()["model"] == "small-step-3"
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        second = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
        assert second.returncode != 0 and "address already in use" in second.stderr
        answer = httpx.post(f"{url}/v1/chat/completions", json=body(), timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "Hello! How are you?"
    finally:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and url in out and err == ""
