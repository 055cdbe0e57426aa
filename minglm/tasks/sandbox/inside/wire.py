"""Messages between caller, nursery and guards: JSON with its length in front."""

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(connection: socket.socket, message: Any) -> None:
    text = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def receive(connection: socket.socket) -> Any | None:
    """None where the other side has gone."""
    head = _exactly(connection, _LENGTH.size)
    body = head and _exactly(connection, _LENGTH.unpack(head)[0])
    return json.loads(body) if body else None


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
