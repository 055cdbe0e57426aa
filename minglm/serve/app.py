"""The endpoints: OpenAI's chat completions, completions and models; health, metrics, new weights, and the chat page."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from minglm.chat import ChatError, render_tokens, tool_grammar
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.serve.answers import END_OF_EVENTS, ChatChoice, CompletionChoice, Envelope, event, usage
from minglm.serve.metrics import Metrics
from minglm.serve.protocol import ApiError, ChatRequest, CompletionRequest, WeightsRequest, parse_body
from minglm.serve.worker import Batch, EngineWorker
from minglm.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page.html")
KEEP_ALIVE_SECONDS = 15.0
BODY_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        model_name: what `/v1/models` lists and requests name.
        api_key: wanted as `Authorization: Bearer KEY` for all but the page and /health; None: everybody may ask.
        weights_token: turns on POST /v1/weights, which wants it in the same way; None: there is no such endpoint.
        max_body_bytes: larger bodies are refused with 413.
        max_queue: answers being written or waiting at a time; more are refused with 429.
        max_context: tokens of prompt and answer together; None: as many as model and cache can hold.
        local_only: the server listens on this machine alone. Without a key, requests must then name it in `Host`: else any
            web page could let its own name point here and read the answers.
    """

    model_name: str
    api_key: str | None = None
    weights_token: str | None = None
    max_body_bytes: int = 4 * 2**20
    max_queue: int = 256
    max_context: int | None = None
    local_only: bool = True


def build_app(engine: Engine, tokenizer: Tokenizer, settings: Settings) -> ASGIApp:
    """The ASGI application. Its lifespan starts and ends the engine's thread; nobody else may use `engine` meanwhile."""
    server = _Server(engine, tokenizer, settings)
    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/metrics", server.metrics_text),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
    ]
    if settings.weights_token is not None:
        routes.append(Route("/v1/weights", server.update_weights, methods=["POST"]))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await server.worker.stop()

    handlers = {ApiError: _answer_error, HTTPException: _answer_http_error, Exception: _answer_failure}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.state.worker = server.worker
    return _Guard(app, server.metrics, settings)


def run(app: ASGIApp, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; then answers under way have three seconds."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
        uvicorn_server(app, host, port).run()


def uvicorn_server(app: ASGIApp, host: str, port: int) -> uvicorn.Server:
    """What `run` runs; port 0 takes a free one."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="on",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
        # Longer than clients keep idle connections (5 s in OpenAI's): else one may send just when we hang up.
        timeout_keep_alive=75,
    )
    return uvicorn.Server(config)


def context_of(engine: Engine) -> int:
    """Tokens of a prompt and its answer together: the model has positions for them, and the cache has room."""
    return min(engine.model.config.max_position_embeddings, engine.stats.num_blocks * engine.blocks.block_size)


def is_local(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings):
        self.worker = EngineWorker(engine, settings.max_queue)
        self.metrics = Metrics(self.worker)
        self._tokenizer, self._settings = tokenizer, settings
        self._max_context = min(context_of(engine), settings.max_context or context_of(engine))
        self._page, self._page_headers = _load_page()
        self._started = int(time.time())

    # ------------------------------------------------------------------------------------------------------- small ones

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=self._page_headers)

    async def health(self, request: Request) -> Response:
        alive = self.worker.is_alive
        content = {
            "status": "ok" if alive else "the engine has stopped; restart the server",
            "model": self._settings.model_name,
            "weights_version": self.worker.weights_version,
        }
        return JSONResponse(content, 200 if alive else 503)

    async def metrics_text(self, request: Request) -> Response:
        text, content_type = self.metrics.text()
        return Response(text, headers={"Content-Type": content_type})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_card())

    async def update_weights(self, request: Request) -> Response:
        """Waits for the step under way; what is being written goes on with the new weights."""
        _check_bearer(request.headers, self._settings.weights_token, "the weights token")
        wanted = parse_body(WeightsRequest, await self._body(request))
        folder = Path(wanted.folder)
        if not (folder / "config.json").is_file():
            raise ApiError(400, f"folder: {wanted.folder!r:.200} holds no config.json; wanted a checkpoint.", param="folder")
        try:
            await self.worker.call(lambda engine: engine.update_weights(folder))
        except (ValueError, OSError) as error:  # of a checkpoint that does not fit; the old weights stay
            raise ApiError(400, f"folder: {error}", param="folder") from error
        return JSONResponse({"weights_version": self.worker.weights_version})

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "minglm",
            "max_model_len": self._max_context,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.model_name:
            message = f"There is no model {name!r:.200} here; this server has {self._settings.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    # ------------------------------------------------------------------------------------------------------ the two ways

    async def chat(self, request: Request) -> Response:
        wanted = parse_body(ChatRequest, await self._body(request))
        self._check_model(wanted.model)
        # Long conversations take a while to render; the others must not wait for it.
        ids, grammar, opens_thinking = await asyncio.to_thread(self._read_conversation, wanted)
        most = wanted.max_completion_tokens or wanted.max_tokens
        logprobs = wanted.top_logprobs if wanted.logprobs else None
        more = {"thinking_budget": wanted.thinking_budget, "grammar": grammar, "must_think": opens_thinking}
        params = self._params(wanted, len(ids), most, logprobs, **more)
        choices = [ChatChoice(index, wanted, self._tokenizer, opens_thinking) for index in range(wanted.n)]
        batch = await self.worker.submit([(ids, one) for one in params])
        return self._answer(request, batch, wanted, choices, "chat.completion", [ids])

    async def complete(self, request: Request) -> Response:
        wanted = parse_body(CompletionRequest, await self._body(request))
        self._check_model(wanted.model)
        prompts = [await asyncio.to_thread(self._read_prompt, index, prompt) for index, prompt in enumerate(wanted.prompt)]
        jobs = []
        for ids in prompts:
            jobs += [(ids, one) for one in self._params(wanted, len(ids), wanted.max_tokens, wanted.logprobs)]
        choices = [CompletionChoice(index, wanted, self._tokenizer) for index in range(len(jobs))]
        batch = await self.worker.submit(jobs)
        return self._answer(request, batch, wanted, choices, "text_completion", prompts)

    def _read_conversation(self, wanted: ChatRequest) -> tuple[list[int], str | None, bool]:
        """Ids of the prompt, the grammar of the answer, and whether the prompt opens the thinking."""
        messages = [_as_ours(index, message) for index, message in enumerate(wanted.messages)]
        tools, thinking = wanted.usable_tools, wanted.chat_template_kwargs.enable_thinking
        try:
            grammar = tool_grammar(tools, wanted.choice_of_tool, thinking, wanted.parallel_tool_calls) if tools else None
            # The template leaves <think> to the model, which may then choose not to think. Where thinking is asked for, the
            # grammar of calls makes it write <think>; where there is none, the prompt does.
            opens = bool(thinking) and grammar is None
            ids = render_tokens(
                self._tokenizer, messages, tools, thinking, add_generation_prompt=True, opens_thinking=opens
            ).ids
        except ChatError as error:
            raise ApiError(400, _sentence(error), param=_param_of(error), code="invalid_message") from error
        except ValueError as error:  # a character that the vocabulary lacks
            raise ApiError(400, _sentence(error), param="messages", code="invalid_message") from error
        return ids, grammar, opens

    def _read_prompt(self, index: int, prompt: str | list[int]) -> list[int]:
        param = f"prompt[{index}]"
        try:
            ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        except ValueError as error:
            raise ApiError(400, f"{param}: {_sentence(error)}", param=param) from error
        if not ids:
            raise ApiError(400, f"{param} is empty; wanted one token at least.", param=param)
        if unknown := [id for id in ids if not 0 <= id < self._tokenizer.vocab_size]:
            message = f"{param}: id {unknown[0]} is not in the vocabulary; wanted 0 to {self._tokenizer.vocab_size - 1}."
            raise ApiError(400, message, param=param)
        return ids

    def _params(
        self, wanted: ChatRequest | CompletionRequest, prompt: int, most: int | None, logprobs: int | None, **more: Any
    ) -> list[SamplingParams]:
        """One for each choice: their seeds count up from the request's, so that choices differ and can be repeated."""
        room = self._max_context - prompt
        if room < 1 or (most or 1) > room:
            asked = f" and max_tokens {most}" if most else ""
            message = f"The prompt has {prompt} tokens{asked}; together wanted at most {self._max_context}."
            raise ApiError(400, message, param="messages" if more else "prompt", code="context_length_exceeded")
        seed = wanted.seed if wanted.seed is not None else secrets.randbits(62)
        return [
            SamplingParams(
                temperature=wanted.temperature,
                top_k=wanted.top_k,
                top_p=wanted.top_p,
                min_p=wanted.min_p,
                seed=(seed + choice) % 2**63,
                max_tokens=most or room,
                stop_ids=tuple(wanted.stop_token_ids),  # beside those that end a turn
                stop=tuple(wanted.stop),
                logprobs=logprobs,
                return_experts=wanted.return_experts,
                ignore_stop=wanted.ignore_eos,
                **more,
            )
            for choice in range(wanted.n)
        ]

    # ----------------------------------------------------------------------------------------------------------- answers

    def _answer(
        self,
        request: Request,
        batch: Batch,
        wanted: ChatRequest | CompletionRequest,
        choices: Sequence[ChatChoice | CompletionChoice],
        kind: str,
        prompts: list[list[int]],
    ) -> Response:
        """Streamed or whole. Either way, what is unfinished is cancelled when the client goes."""
        envelope = Envelope(kind, self._settings.model_name, self.worker.weights_version)
        prompt_tokens = sum(map(len, prompts))
        more = {"prompt_token_ids": prompts} if wanted.return_token_ids else {}
        news = self._news(batch, choices)

        def used() -> dict[str, int]:
            return usage(prompt_tokens, sum(choice.tokens for choice in choices))

        async def whole() -> str:
            async for _ in news:
                continue
            return json.dumps(envelope.whole([choice.whole() for choice in choices], used(), **more), ensure_ascii=False)

        async def events() -> AsyncIterator[str]:
            options, first = wanted.stream_options, more
            if kind == "chat.completion":
                for choice in choices:
                    opening = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield envelope.event([opening], **first)
                    first = {}
            async for new in news:
                yield envelope.event([new], **first, **({"usage": used()} if options.continuous_usage_stats else {}))
                first = {}
            if options.include_usage:
                yield envelope.event([], usage=used())
            yield END_OF_EVENTS

        def close() -> None:
            self.worker.close(batch)

        return _Stream(events(), close) if wanted.stream else _Whole(whole(), close)

    async def _news(self, batch: Batch, choices: Sequence[ChatChoice | CompletionChoice]) -> AsyncIterator[dict[str, Any]]:
        begun, first = time.perf_counter(), True
        async for index, output in batch:
            new = choices[index].take(output)
            self.metrics.new_tokens.inc(len(output.new_ids))
            if first and output.new_ids:
                self.metrics.first_token.observe(time.perf_counter() - begun)
                first = False
            yield new
        self.metrics.prompt_tokens.inc(sum(len(ids) for ids, _ in batch.prompts))

    async def _body(self, request: Request) -> bytes:
        # Browsers send any other type to any address without asking it first.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type is {kind!r:.80}; wanted 'application/json'.")
        limit = self._settings.max_body_bytes
        too_large = ApiError(413, f"The body is too large; wanted at most {limit} bytes.", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except ClientDisconnect:  # there is nobody to read this; it is for the metrics
            raise ApiError(499, "The client went.") from None
        except TimeoutError:
            raise ApiError(408, f"The body was not complete after {BODY_SECONDS:.0f} s.") from None
        return bytes(body)


def _as_ours(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's newer name of the system role is taken; parts that are not text are refused, which the template drops."""
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else []):
        if isinstance(part, dict) and message.get("role") != "tool" and part.get("type") != "text":
            param = f"messages[{index}].content[{number}]"
            raise ApiError(400, f"{param} is of type {part.get('type')!r:.80}; this model reads text.", param=param)
    return message | {"role": "system"} if message.get("role") == "developer" else message


# --------------------------------------------------------------------------------------------------- responses and errors


async def _unless_gone(receive: Receive, work: Coroutine) -> tuple[bool, Any]:
    """(True, what `work` returns), or (False, None) if the client goes before; then `work` is cancelled."""

    async def wait_until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_until_gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return (True, await working) if working.done() else (False, None)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Whole(Response):
    """JSON once it is all there."""

    def __init__(self, content: Coroutine, close: Callable[[], None]):
        self._content, self._close = content, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            is_there, text = await _unless_gone(receive, self._content)
        finally:
            self._close()
        if is_there:
            await Response(text, media_type="application/json")(scope, receive, send)


class _Stream(Response):
    """Server-sent events, each sent when it is there; comments in between, so that proxies do not lose patience."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await _unless_gone(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        sent = time.monotonic()

        async def send_text(text: str, more: bool = True) -> None:
            nonlocal sent
            sent = time.monotonic()
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(KEEP_ALIVE_SECONDS / 3)
                if time.monotonic() - sent > KEEP_ALIVE_SECONDS:
                    await send_text(": still working\n\n")

        keeping = asyncio.ensure_future(keep_alive())
        try:
            async for text in self._events:
                await send_text(text)
        except ApiError as error:  # the status has been sent already
            await send_text(event(error.body()))
        except Exception:
            logger.exception("a stream failed")
            await send_text(event(ApiError(500, "The server failed; its log has the details.").body()))
        finally:
            keeping.cancel()
            await self._events.aclose()
        await send_text("", more=False)


def _param_of(error: ChatError) -> str:
    """The key in OpenAI's notation."""
    if error.key in ("tools", "enable_thinking"):
        return error.key if error.index is None else f"{error.key}[{error.index}]"
    where = "messages" if error.index is None else f"messages[{error.index}]"
    return where if error.key is None else f"{where}.{error.key}"


def _sentence(error: BaseException) -> str:
    text = str(error)
    return text if text.endswith(".") else text + "."


async def _answer_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    message = {404: f"There is nothing at {request.url.path}.", 405: f"{request.method} is not for {request.url.path}."}
    answer = ApiError(error.status_code, message.get(error.status_code, str(error.detail)), headers=error.headers)
    return await _answer_error(request, answer)


async def _answer_failure(request: Request, error: Exception) -> Response:
    return await _answer_error(request, ApiError(500, "The server failed; its log has the details."))


class _Guard:
    """Before every request: is it allowed? After it: count it."""

    def __init__(self, app: Starlette, metrics: Metrics, settings: Settings):
        self.app, self._metrics, self._settings = app, metrics, settings

    @property
    def state(self) -> Any:
        return self.app.state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 499  # the client went before it had an answer

        async def counting_send(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await (await _answer_error(Request(scope), error))(scope, receive, counting_send)
        else:
            await self.app(scope, receive, counting_send)
        finally:
            self._metrics.count(scope["path"], status, time.perf_counter() - begun)

    def _check(self, path: str, headers: Headers) -> None:
        key = self._settings.api_key
        if key is not None:
            if path not in ("/", "/health", "/v1/weights"):  # weights have a token of their own
                _check_bearer(headers, key, "the API key")
        elif self._settings.local_only:
            name = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]")
            if not is_local(name):
                message = f"Host is {name!r:.80}; wanted this machine's (localhost), or a server with an API key."
                raise ApiError(403, message, code="wrong_host")


def _check_bearer(headers: Headers, wanted: str, name: str) -> None:
    found = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # the bytes that came
    if not hmac.compare_digest(found, wanted.encode()):
        message = f"Wanted {name} as 'Authorization: Bearer ...'."
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _load_page() -> tuple[str, dict[str, str]]:
    """The page, and headers that let the browser run only what is in it and ask only this server."""
    text = PAGE.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
