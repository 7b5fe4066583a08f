"""Playing an answer to the client as its script says: with delays, gates and faults."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galley.mock_engine.answers import Answer
    from galley.mock_engine.gates import Gates
    from galley.mock_engine.script import Script

from galley.mock_engine.script import Fault

_BEFORE_ANSWER = frozenset({Fault.HANG, Fault.ERROR, Fault.CLOSE, Fault.RESET, Fault.GARBAGE})
_RST_ON_CLOSE = struct.pack("ii", 1, 0)
TRANSPORT = "galley.mock.transport"


class Broken(Exception):  # noqa: N818
    """The connection was broken on purpose."""


@dataclass
class Playback:
    """One answer on its way.

    Attributes:
        sent: bytes of the body sent so far.
    """

    scope: Any
    send: Any
    script: Script
    gates: Gates
    sent: int = 0

    async def play(self, answer: Answer) -> None:
        """Send the answer.

        Raises:
            Broken: the script broke the connection.
        """
        if self.script.delay:
            await asyncio.sleep(self.script.delay)
        await self._gate("headers")
        if self.script.fault in _BEFORE_ANSWER:
            await self._fail_before()
        elif answer.is_stream:
            await self._play_stream(answer)
        else:
            await self.play_body(200, answer.body + b" " * self.script.pad)

    async def play_body(self, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
        """Send a unary answer."""
        await self._start(status, content_type, len(body))
        script = self.script
        if script.fault is Fault.RESET_AFTER_HEADERS:
            self._break(reset=True)
        middle = len(body) // 2
        if script.fault is Fault.RESET_MID_BODY or "body" in script.gates:
            await self._write(body[:middle], more=True)
            await self._gate("body")
            if script.fault is Fault.RESET_MID_BODY:
                self._break(reset=True)
            body = body[middle:]
        await self._gate("end")
        await self._write_cut(body)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _play_stream(self, answer: Answer) -> None:
        script = self.script
        await self._start(200, b"text/event-stream; charset=utf-8", None)
        if script.fault is Fault.RESET_AFTER_HEADERS:
            self._break(reset=True)
        if answer.head:
            await self._write_cut(answer.head)
        for number, token in enumerate(answer.tokens, 1):
            if script.token_delay:
                await asyncio.sleep(script.token_delay)
            await self._gate(f"token-{number}")
            if number > script.fault_after:
                await self._fail_within(token)
            await self._write_cut(token)
        await self._gate("end")
        await self._write_cut(answer.tail)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _gate(self, point: str) -> None:
        name = self.script.gates.get(point)
        if name is not None:
            await self.gates.pass_through(name)

    async def _fail_before(self) -> None:
        fault = self.script.fault
        if fault is Fault.HANG:
            await asyncio.get_running_loop().create_future()
        elif fault is Fault.ERROR:
            error = b'{"error":{"message":"scripted","type":"InternalServerError","param":null,"code":500}}'
            await self.play_body(500, error)
        else:
            if fault is Fault.GARBAGE:
                self._transport.write(b"\x00\x01 this is not HTTP\r\n\r\n")
            self._break(reset=fault is Fault.RESET)

    async def _fail_within(self, token: bytes) -> None:
        if self.script.fault is Fault.HALF_EVENT:
            await self._write(token[: len(token) // 2], more=True)
            self._break(reset=True)
        if self.script.fault is Fault.RESET_MID_STREAM:
            self._break(reset=True)

    async def _start(self, status: int, content_type: bytes, length: int | None) -> None:
        headers = [(b"content-type", content_type)]
        headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.script.headers]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _write_cut(self, data: bytes) -> None:
        """Write the bytes in the pieces that the script asks for, each in a turn of the loop of its own."""
        if self.script.fault is Fault.DRIP:
            for position in range(len(data)):
                await self._write(data[position : position + 1], more=True)
                await asyncio.sleep(0)
        elif self.script.fault is Fault.SPLIT_CHARACTER:
            cut = next((position for position, byte in enumerate(data) if byte >= 0xC0), len(data) - 1) + 1
            await self._write(data[:cut], more=True)
            await asyncio.sleep(0)
            await self._write(data[cut:], more=True)
        else:
            await self._write(data, more=True)

    async def _write(self, data: bytes, *, more: bool) -> None:
        self.sent += len(data)
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    @property
    def _transport(self) -> asyncio.Transport:
        transport: asyncio.Transport = self.scope["extensions"][TRANSPORT]["transport"]
        return transport

    def _break(self, *, reset: bool) -> None:
        transport = self._transport
        if reset:
            plain: socket.socket = transport.get_extra_info("socket")
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            transport.abort()
        else:
            transport.close()
        raise Broken
