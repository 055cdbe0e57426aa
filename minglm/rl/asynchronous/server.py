"""The exchange over HTTP, in a thread of the trainer's process.

    POST /poll               what a worker is to do now, and that it is alive
    POST /deliver            an attempt that is over; may be sent again until an answer comes
    GET  /weights/{version}  what to sample with

Where the server listens, and the token that it wants, stand in `server.json` in the run folder, for its owner alone. A worker
that has lost the trainer reads it again: the one that comes back listens elsewhere.
"""

import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from minglm.rl.asynchronous.buffer import ScheduleError
from minglm.rl.asynchronous.exchange import Exchange
from minglm.rl.asynchronous.messages import Delivery, Poll, Span
from minglm.serve.app import uvicorn_server

START_SECONDS = 30.0
CHUNK_BYTES = 2**22


class Server:
    """Owns `lock`, under which the exchange may be touched, and which wakes who waits for a change.

    weights: version -> the file that holds it. record: is told the workers' spans, under the lock.
    """

    def __init__(
        self, exchange: Exchange, weights: Callable[[int], Path], record: Callable[[list[Span]], None], host: str, address: Path
    ):
        self.exchange, self.weights, self.record, self.address = exchange, weights, record, address
        self.lock = threading.Condition()
        self.stopping = False
        self.told: set[str] = set()  # workers that know of it
        self.failure: Exception | None = None  # of a request, by a fault of ours: the journal may lack what the buffer has
        self.token = secrets.token_urlsafe(32)
        routes = [
            Route("/poll", self.poll, methods=["POST"]),
            Route("/deliver", self.deliver, methods=["POST"]),
            Route("/weights/{version:int}", self.get_weights),
        ]
        self._server = uvicorn_server(Starlette(routes=routes, exception_handlers={Exception: self._fail}), host, 0)
        self._thread = threading.Thread(target=self._server.run, name="rl-server", daemon=True)
        self._host = host

    def __enter__(self) -> "Server":
        self._thread.start()
        end = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise OSError(f"the server of rollouts did not start on {self._host}; wanted an address of this machine")
            time.sleep(0.01)
        host = f"[{self._host}]" if ":" in self._host else self._host
        port = self._server.servers[0].sockets[0].getsockname()[1]
        aside = self.address.with_name(f".{self.address.name}.writing")
        aside.touch(0o600)
        aside.write_text(json.dumps({"url": f"http://{host}:{port}", "token": self.token}) + "\n")
        os.replace(aside, self.address)
        return self

    def __exit__(self, *exception) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.address.unlink(missing_ok=True)

    def say_stop(self, seconds: float) -> None:
        """Workers are told to end: returns when all that were heard of have been, or after so many seconds."""
        with self.lock:
            self.stopping = True
            self.lock.wait_for(lambda: self.exchange.heard.keys() <= self.told, seconds)

    async def poll(self, request: Request) -> Response:
        ask = await self._read(request, Poll)
        with self.lock:
            self.record(ask.spans)
            answer = self.exchange.poll(ask.worker, ask.version, 0 if self.stopping else ask.room, ask.held)
            if self.stopping:
                self.told.add(ask.worker)
                self.lock.notify_all()
        return JSONResponse({**answer._asdict(), "stop": self.stopping})

    async def deliver(self, request: Request) -> Response:
        one = await self._read(request, Delivery)
        oldest = one.result.oldest(one.version)
        with self.lock:
            try:
                accepted = self.exchange.deliver(one.worker, one.lease, one.result.model_dump(), one.result.reward, oldest)
            except ScheduleError as error:
                raise HTTPException(400, str(error)) from error
            self.lock.notify_all()
        return JSONResponse({"accepted": accepted})

    async def get_weights(self, request: Request) -> Response:
        self._check(request)
        version = request.path_params["version"]
        try:
            file = self.weights(version).open("rb")
        except FileNotFoundError:  # replaced by a newer one, or not made anew yet by a trainer that came back
            raise HTTPException(404, f"there are no weights of version {version}") from None
        return StreamingResponse(_chunks(file))  # goes on where the file is deleted meanwhile

    async def _fail(self, request: Request, error: Exception) -> Response:
        with self.lock:
            self.failure = error
            self.lock.notify_all()
        return JSONResponse({"detail": "the trainer failed, and ends"}, 500)

    async def _read(self, request: Request, kind: type[BaseModel]) -> BaseModel:
        self._check(request)
        try:
            return kind.model_validate_json(await request.body())
        except ValidationError as error:
            raise HTTPException(400, str(error)) from error
        except ClientDisconnect as error:  # a worker that died while it spoke, which nobody hears
            raise HTTPException(400, "cut off") from error

    def _check(self, request: Request) -> None:
        found = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(found.encode(), self.token.encode()):
            raise HTTPException(401, "wanted the token of server.json as 'Authorization: Bearer ...'")


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
