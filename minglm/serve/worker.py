"""The engine in a thread of its own, and answers that handlers of an event loop can await.

The thread is the only one that touches the engine. It does what it is asked between two steps (add, cancel, new weights),
then a step, and hands what the step wrote to the event loop in one call.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.engine.sequence import RequestOutput
from minglm.serve.protocol import ApiError

logger = logging.getLogger(__name__)

Prompt = tuple[list[int], SamplingParams]


class Batch:
    """The answers to one HTTP request: `n` choices, or several prompts. Made by `EngineWorker.submit`.

    `unfinished`, the indices still being written, is the event loop's; `request_ids`, the engine's, is the thread's.
    """

    def __init__(self, prompts: Sequence[Prompt]):
        self.prompts = prompts
        self.unfinished = set(range(len(prompts)))
        self.request_ids: list[int] = []
        self._outputs: asyncio.Queue[tuple[int, RequestOutput] | ApiError] = asyncio.Queue()

    def deliver(self, index: int, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self.unfinished.discard(index)
        self._outputs.put_nowait((index, output))

    def fail(self, error: ApiError) -> None:
        self.unfinished.clear()
        self._outputs.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(index of the prompt, what was written), until all are finished. Raises `ApiError` if the engine failed."""
        while self.unfinished or not self._outputs.empty():
            item = await self._outputs.get()
            if isinstance(item, ApiError):
                raise item
            yield item


class EngineWorker:
    """Runs an engine. `start` and all coroutines belong to one event loop.

    Args:
        max_queue: answers being written or waiting at a time; more are refused with 429.
    """

    def __init__(self, engine: Engine, max_queue: int):
        self.max_queue = max_queue
        self.stats = engine.stats  # after the last step
        self.weights_version = engine.weights_version
        self.failures = 0
        self.cancelled = 0
        self._engine = engine
        self._open: set[Batch] = set()  # the event loop's
        self._live: dict[int, tuple[Batch, int]] = {}  # the thread's, by the engine's id
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step that it is in. What is being written is given up."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        self._fail_open()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_answers(self) -> int:
        return sum(len(batch.unfinished) for batch in self._open)

    async def submit(self, prompts: Sequence[Prompt]) -> Batch:
        """Queue the prompts. Raises `ApiError`: 429 if there is no room, 400 for what the engine can never run."""
        self._check_alive()
        if self.open_answers + len(prompts) > self.max_queue:
            message = f"{self.open_answers} answers are being written and {self.max_queue} is the limit; try again later."
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        batch = Batch(prompts)
        self._open.add(batch)
        try:
            await self.call(lambda engine: self._add(engine, batch))
        except BaseException as error:  # also when the handler is cancelled while it waits here
            self.close(batch)
            if isinstance(error, ValueError):
                raise ApiError(400, _sentence(error)) from error
            raise
        return batch

    def close(self, batch: Batch) -> None:
        """The handler is done with `batch`: what is unfinished is cancelled. Must be called for every batch."""
        self._open.discard(batch)
        if batch.unfinished:
            self.cancelled += len(batch.unfinished)
            self._commands.put(lambda: self._cancel(batch))

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """What `function(engine)` returns or raises, run in the thread between two steps. Raises ApiError if that has ended."""
        self._check_alive()
        loop, future = self._loop, asyncio.get_running_loop().create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():  # the handler has gone
                return
            future.set_result(result) if error is None else future.set_exception(error)

        def command() -> None:
            try:
                result, error = function(self._engine), None
            except Exception as caught:
                result, error = None, caught
            loop.call_soon_threadsafe(settle, result, error)

        self._commands.put(command)
        return await future

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise ApiError(503, "The engine has stopped; restart the server.")

    def _fail_open(self) -> None:
        for batch in self._open:
            batch.fail(ApiError(503, "The engine has stopped."))

    # ------------------------------------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        try:
            while self._do_commands():
                if not self._engine.has_work:
                    continue
                try:
                    self._publish(self._engine.step())
                except Exception as error:
                    logger.exception("the engine failed in a step; all answers under way are given up")
                    self.failures += 1
                    self._fail_all(error)
        except Exception:  # even cancelling failed
            logger.exception("the engine's thread ends; the server needs a restart")
            self._loop.call_soon_threadsafe(self._fail_open)

    def _do_commands(self) -> bool:
        """Do what is asked, waiting for something where there is no other work; False: to stop."""
        try:
            command = self._commands.get(block=not self._engine.has_work)
            while command is not None:
                command()
                self._refresh()
                command = self._commands.get_nowait()
            return False
        except queue.Empty:
            return True

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        self._refresh()
        ready = []
        for output in outputs:
            if output.request_id in self._live:  # else cancelled
                ready.append((*self._live[output.request_id], output))
                if output.finish_reason is not None:
                    del self._live[output.request_id]

        def deliver() -> None:
            for batch, index, output in ready:
                batch.deliver(index, output)

        if ready:
            self._loop.call_soon_threadsafe(deliver)

    def _refresh(self) -> None:
        self.stats = self._engine.stats
        self.weights_version = self._engine.weights_version

    def _add(self, engine: Engine, batch: Batch) -> None:
        for index, (prompt_ids, params) in enumerate(batch.prompts):
            request_id = engine.add(prompt_ids, params)
            batch.request_ids.append(request_id)
            self._live[request_id] = (batch, index)

    def _cancel(self, batch: Batch) -> None:
        for request_id in batch.request_ids:
            if self._live.pop(request_id, None) is not None:
                self._engine.cancel(request_id)

    def _fail_all(self, error: Exception) -> None:
        live, self._live = self._live, {}
        for request_id in live:
            self._engine.cancel(request_id)
        failure = ApiError(500, f"The engine failed: {type(error).__name__}. The server's log has the details.")
        batches = {batch for batch, _ in live.values()}
        self._loop.call_soon_threadsafe(lambda: [batch.fail(failure) for batch in batches])


def _sentence(error: BaseException) -> str:
    text = str(error)
    return text if text.endswith(".") else text + "."
