"""Servers on the mail ports that speak first, as SMTP and IMAP do, and then answer every line."""

from __future__ import annotations

import asyncio
import threading

from mailfwlib.settings import SERVICES
from support import net
from support.net import LIMIT, Host


class MailServer:
    """A server on each mail port of the host."""

    def __init__(self, host: Host):
        #: The connections that the server has open: the client's address and port -> where to write.
        self.sessions: dict[str, asyncio.StreamWriter] = {}
        self._ready = threading.Event()
        self._running = host.start(asyncio.run, self._serve())
        assert self._ready.wait(LIMIT), self._running
        net.turns.append(self._take_turn)

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        for service in SERVICES.values():
            await asyncio.start_server(self._speak, ["0.0.0.0", "::"], service.port, backlog=1000)
        self._ready.set()
        await self._stopping.wait()

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not (peer := writer.get_extra_info("peername")):  # The client is gone already.
            return writer.close()
        name = "{}:{}".format(*peer[:2])
        self.sessions[name] = writer
        try:
            writer.write(b"220 mail host\r\n")
            while await reader.readline():
                writer.write(b"250 OK\r\n")
        except OSError:
            pass
        finally:
            self.sessions.pop(name, None)
            writer.close()

    def say(self, name: str) -> None:
        """Send a line to a client that has asked for nothing, as IMAP's IDLE does."""
        self._loop.call_soon_threadsafe(self.sessions[name].write, b"* 1 EXISTS\r\n")

    def _take_turn(self) -> None:
        """Wait until each client that is connected by now has been greeted."""

        async def turn() -> None:
            for _ in range(10):  # accepting, and the tasks that follow from it
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(turn(), self._loop).result(LIMIT)

    def close(self) -> None:
        """Stop the servers."""
        net.turns.remove(self._take_turn)
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._running.result(LIMIT)
