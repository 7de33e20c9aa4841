"""The server: its connections and their limits, signals, the end."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

from legacy1bit.serve.app import Application, log
from legacy1bit.system.optional import load_extra

# Bytes of the request line and the headers of a request.
_MOST_HEADERS = 1 << 14

# Connections that the system holds until they are accepted; as many are accepted at once, before
# any gives its place to another.
_BACKLOG = 128

# Seconds for which a connection without a request is kept.
_IDLE_SECONDS = 10


def protocol_of(application: Application) -> Any:
    """Return the protocol of uvicorn with limits on the time and the number of connections.

    A connection without a complete request has no claim: it is closed when its time is over, and
    the oldest one gives its place to a new connection when all places are taken.
    """
    uvicorn = load_extra("serve needs", "uvicorn", "protocols.http.h11_impl")
    h11 = load_extra("serve needs", "h11")
    base: Any = uvicorn.protocols.http.h11_impl.H11Protocol
    settings = application.settings
    # In the order in which they began to wait.
    waiting: dict[Any, None] = {}
    open_now: set[Any] = set()
    application.connections = lambda: len(open_now)

    class Connection(h11.Connection):  # type: ignore[misc, name-defined]
        """h11's, which takes most of a token's time to look at each chunk of an answer."""

        _chunked = False

        def send(self, event: Any) -> bytes | None:
            if self._chunked and type(event) is h11.Data:
                return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
            data: bytes | None = super().send(event)
            if type(event) is h11.Response:
                self._chunked = b"\r\ntransfer-encoding: chunked" in (data or b"").lower()
            return data

    class Protocol(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.conn = Connection(h11.SERVER, _MOST_HEADERS)
            self._deadline: asyncio.TimerHandle | None = None
            self._answering = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(open_now) >= settings.most_connections:
                if not waiting:
                    transport.abort()
                    return
                next(iter(waiting))._abort()
            open_now.add(self)
            self._begin(False)

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def _watch(self) -> None:
            """Begin another time limit when a request is complete, and when its answer is."""
            cycle = self.cycle
            answering = cycle is not None and not cycle.response_complete and not cycle.more_body
            if answering != self._answering and self in open_now:
                self._begin(answering)

        def _begin(self, answering: bool) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            self._answering = answering
            waiting.pop(self, None)
            if not answering:
                waiting[self] = None
            seconds = settings.request_seconds if answering else settings.receive_seconds
            self._deadline = self.loop.call_later(seconds, self._abort)

        def _abort(self) -> None:
            self._forget()
            self.transport.abort()

        def _forget(self) -> None:
            open_now.discard(self)
            waiting.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()

    return Protocol


class Server:
    """An application on a port.

    Parameters
    ----------
    application : Application
    reload : callable, optional
        What SIGHUP does, on a thread of its own.

    Attributes
    ----------
    url : str
        Where it is found, once it listens.

    Raises
    ------
    ValueError
        If uvicorn is not installed.
    OSError
        If the port is taken, or the host is not this machine's.
    """

    def __init__(self, application: Application, reload: Callable[[], None] | None = None) -> None:
        uvicorn = load_extra("serve needs", "uvicorn", "server")
        settings = application.settings
        self._application, self._reload = application, reload
        self._socket = _listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            application,
            http=protocol_of(application),
            ws="none",
            lifespan="off",
            interface="asgi3",
            loop="asyncio",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=settings.stop_seconds,
            backlog=_BACKLOG,
        )

        class Uvicorn(uvicorn.Server):  # type: ignore[misc, name-defined]
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                """Leave signals to ``run``."""
                yield

        self._uvicorn = Uvicorn(config)

    def run(self, signals: bool = True, ready: Callable[[], None] | None = None) -> None:
        """Answer requests until SIGTERM or SIGINT, or ``stop``.

        Running requests are answered to their end then; a second signal ends them, too.
        """
        asyncio.run(self._run(signals, ready))

    def stop(self) -> None:
        """End ``run``, from its loop; a second time without waiting for requests."""
        again, self._application.stopping = self._application.stopping, True
        self._uvicorn.should_exit = True
        if again:
            self._uvicorn.force_exit = True
            for connection in list(self._uvicorn.server_state.connections):
                connection.transport.abort()

    async def _run(self, signals: bool, ready: Callable[[], None] | None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_tell_fault)
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
            if self._reload is not None:
                loop.add_signal_handler(signal.SIGHUP, self._begin_reload)
        serving = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._socket]))
        if ready is not None:
            loop.call_soon(ready)
        await serving

    def _begin_reload(self) -> None:
        assert self._reload is not None
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, self._reload).add_done_callback(_tell)


def _tell(reloaded: "asyncio.Future[None]") -> None:
    error = None if reloaded.cancelled() else reloaded.exception()
    log({"reload": "done" if error is None else f"failed, all is as before: {error}"})


def _tell_fault(loop: asyncio.AbstractEventLoop, about: dict[str, Any]) -> None:
    """Log in one line what a connection did wrong that uvicorn does not expect."""
    log({"error": f"{about['message']}: {about.get('exception')!r}"[:300]})


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise OSError(f"--host {host} is no address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener
