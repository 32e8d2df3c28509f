"""A proxy between us and Redis that loses what it is told to lose."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from asyncq.broker.scripts import SCRIPTS
from tests.stores import Database


class Proxy:
    """Passes everything on, but for the replies to lose and while it is cut."""

    def __init__(self, store: Database, folder: Path) -> None:
        self.path = str(folder / "proxy")
        self.url = f"unix://{self.path}?db={store.number}"
        self._upstream = store.server.socket
        self._to_lose: list[bytes] = []
        self._to_hold: bytes | None = None
        self._go_on = asyncio.Event()
        self._delivered = asyncio.Event()
        self.lost = 0
        self._pipes: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def lose_reply(self, call: str, times: int = 1, *, by_text: bool = False) -> None:
        """Let the next calls reach Redis, and cut the connection before the answer.

        `call` is the name of a script, or of a command. `by_text`: of a script that Redis lost.
        """
        name = SCRIPTS[call].sentence.encode() if by_text else _name_of(call)
        self._to_lose += [name] * times

    def hold_back(self, call: str) -> None:
        """Let the next call, named as above, reach Redis only at `deliver`."""
        self._to_hold = _name_of(call)

    async def deliver(self) -> None:
        """Deliver what was held back, unless Redis has ended that connection."""
        self._go_on.set()
        await self._delivered.wait()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def cut(self) -> None:
        """Refuse connections and drop those there are; `start` ends it."""
        if self._server is not None:
            self._server.close()
            self._server = None
        Path(self.path).unlink(missing_ok=True)
        for pipe in list(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = asyncio.current_task()
        assert pipe is not None
        try:
            if self._server is None:  # cut since the connection was accepted
                return
            self._pipes.add(pipe)
            up = await asyncio.open_unix_connection(self._upstream)
            await self._pass_on(reader, writer, *up)
        except asyncio.CancelledError:
            pass  # cut
        finally:
            writer.transport.abort()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
            self._pipes.discard(pipe)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        losing = asyncio.Event()

        async def requests() -> None:
            while data := await reader.read(2**20):
                # A call fits into one read: the tests send few tasks.
                if wanted := next((name for name in self._to_lose if name in data), None):
                    self._to_lose.remove(wanted)
                    losing.set()
                held = self._to_hold is not None and self._to_hold in data
                if held:
                    self._to_hold = None
                try:
                    if held:
                        await self._go_on.wait()
                    up_writer.write(data)
                    await up_writer.drain()
                finally:
                    if held:
                        self._delivered.set()

        async def answers() -> None:
            while data := await up_reader.read(2**20):
                if losing.is_set():
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()

        both = [asyncio.create_task(requests()), asyncio.create_task(answers())]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for half in both:
                half.cancel()
            up_writer.transport.abort()
            await asyncio.gather(*both, up_writer.wait_closed(), return_exceptions=True)


def _name_of(call: str) -> bytes:
    return (SCRIPTS[call].digest if call in SCRIPTS else f"\r\n{call}\r\n").encode()


@asynccontextmanager
async def proxied(store: Database) -> AsyncIterator[Proxy]:
    """A proxy to a store, which the scripts are known to before anything is lost."""
    folder = Path(tempfile.mkdtemp(prefix="asyncq-"))  # the path of a socket must be short
    proxy = Proxy(store, folder)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.cut()
        shutil.rmtree(folder)
