"""The HTTP application: routes, who may ask for what, and answers as they come about.

It is an ASGI application without a framework: ten paths need none. Nothing of a request becomes the
name of a file, and no request is answered with an exception.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import math
import re
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from legacy1bit.data_utils import Tokens
from legacy1bit.formats.chat_template import Template
from legacy1bit.formats.chat_tokens import chat_text, chat_tokens, without_thoughts
from legacy1bit.formats.conversation import choose_template
from legacy1bit.generator import Generator
from legacy1bit.inference import check_tokens
from legacy1bit.serve import openai
from legacy1bit.serve.engine import Ticket
from legacy1bit.serve.metrics import CONTENT_TYPE, Metrics
from legacy1bit.serve.models import Lease, Models
from legacy1bit.serve.openai import ApiError, Json, Limits, TextRequest
from legacy1bit.serve.requests import Closed, Constraint, Embedding, Event, Finished, QueueFull
from legacy1bit.serve.structured import Grammars

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_Result = TypeVar("_Result")

# Threads for what takes time and is no generation: templates, tokens, files of models.
_THREADS = 8

# The status in logs and metrics of a request whose client was gone before its answer (nginx's).
_GONE = 499

# Bodies up to this many times the limit are read before they are refused.
_PATIENCE = 4

_OF_ALL = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


@dataclass(frozen=True)
class ServeSettings:
    """Who may ask, and for how much.

    Attributes
    ----------
    host : str
        The address that is listened on.
    port : int
    keys : tuple of bytes
        SHA-256 of each key that lets in; empty: nobody needs one.
    template : Path, optional
        In place of the models' own chat templates; see ``choose_template``.
    limits : Limits
        Of one request.
    most_body : int
        Bytes of a body.
    most_connections : int
    receive_seconds : float
        In which a request must have arrived, from its first byte to its last.
    request_seconds : float
        In which it must be answered.
    stop_seconds : float
        That running requests get when the server ends.
    log_prompts : bool
        Whether logs have the prompts and the texts.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keys: tuple[bytes, ...] = ()
    template: Path | None = None
    limits: Limits = field(default_factory=Limits)
    most_body: int = 1 << 21
    most_connections: int = 512
    receive_seconds: float = 20.0
    request_seconds: float = 600.0
    stop_seconds: float = 30.0
    log_prompts: bool = False

    @property
    def local(self) -> bool:
        """Whether only programs on this machine reach the server."""
        return is_local(self.host)


def is_local(host: str) -> bool:
    """Return whether the name or address of a host is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def log(record: Mapping[str, Any]) -> None:
    """Write a line of JSON to standard error."""
    if sys.stderr is not None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"
        print(json.dumps({"time": stamp, **record}), file=sys.stderr, flush=True)


class _Gone(Exception):
    """The client has closed the connection."""


class _Exchange:
    """A request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method, self.path = str(scope["method"]), str(scope["path"])
        self.headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        self.client = (scope.get("client") or ("",))[0]
        self.route = "other"
        self.about: Json = {}
        self.begin = time.perf_counter()
        self.status, self.started, self.ended = _GONE, False, False
        self._receive, self._send = receive, send

    async def read(self, most: int) -> bytes:
        """Return the body. Raises ``ApiError`` if it is too long."""
        fault = f"the body has more than {most} bytes"
        # A client that still sends when the connection is closed does not see why: what is not much
        # too long is read to its end.
        patience = _PATIENCE * max(most, 1 << 12)
        far = ApiError(fault, 413, headers={"connection": "close"})
        length = self.headers.get("content-length", "0")
        if len(length) > 18 or not length.isdecimal() or int(length) > patience:
            raise far
        body, size = bytearray(), 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            size += len(part)
            if size > patience:
                raise far
            if size <= most:
                body += part
            if not message.get("more_body", False):
                if size > most:
                    raise ApiError(fault, 413)
                return bytes(body)

    async def until_gone(self) -> None:
        """Return when the client has closed the connection, or the answer is complete."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, kind: str, headers: Mapping[str, str] | None = None) -> None:
        """Send what an answer begins with."""
        named = {"content-type": kind, **(headers or {})}
        encoded = [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()
        ]
        self.status, self.started = status, True
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*_OF_ALL, *encoded]}
        )

    async def write(self, data: bytes, more: bool = True) -> None:
        """Send a part of an answer, or its end."""
        self.ended = not more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(
        self, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole answer."""
        await self.start(status, kind, {"content-length": str(len(body)), **(headers or {})})
        await self.write(body, False)

    async def json(
        self, record: Json, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole answer in JSON."""
        await self.answer(status, openai.to_bytes(record), "application/json", headers)

    async def refuse(self, error: ApiError) -> None:
        """Send an error; in a stream, as its last event."""
        if not self.started:
            await self.json(error.record(), error.status, error.headers)
        elif not self.ended:
            self.status = error.status
            await self.write(openai.event_of(error.record()), False)


class _Jobs:
    """Requests on their way through an engine, and their events in the order of time."""

    def __init__(
        self, submits: Sequence[Callable[[Callable[[Event], None]], Ticket]], fault: int = 500
    ) -> None:
        self._fault = fault
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}

        def deliver(index: int, event: Event) -> None:
            # The loop may have ended before the engine.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            for index, submit in enumerate(submits):
                self._tickets[index] = submit(partial(deliver, index))
        except QueueFull as error:
            self.cancel()
            after = {"retry-after": str(max(math.ceil(error.seconds), 1))}
            raise ApiError(str(error), 429, code="queue_full", headers=after) from None
        except Closed:
            self.cancel()
            raise _stopping() from None
        except (IndexError, TypeError, ValueError) as error:
            self.cancel()
            raise ApiError(str(error), code="invalid_value") from None
        except BaseException:
            self.cancel()
            raise

    async def batches(self) -> AsyncGenerator[list[tuple[int, Event]], None]:
        """Yield what has happened, until all requests are finished. Raises ``ApiError``."""
        while self._tickets:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            for index, event in batch:
                if isinstance(event, Finished):
                    del self._tickets[index]
                    if event.reason == "error":
                        raise ApiError(event.message, self._fault, code="generation_failed")
                    if event.reason == "cancelled":
                        raise _stopping()
            yield batch

    def cancel(self) -> None:
        """Stop what is not finished."""
        for ticket in self._tickets.values():
            ticket.cancel()


def _stopping() -> ApiError:
    return ApiError("the server is stopping", 503, code="stopping", headers={"retry-after": "5"})


class _Chat:
    """The chat template of a model, for one thread at a time."""

    def __init__(self, template: Template) -> None:
        self.template, self.lock = template, threading.Lock()


class Application:
    """The server's ASGI application.

    Parameters
    ----------
    models : Models
    settings : ServeSettings

    Attributes
    ----------
    settings : ServeSettings
        May be replaced while requests run.
    connections : callable
        Returns the number of open connections.
    stopping : bool
        Whether the server ends, and refuses new requests.
    """

    def __init__(self, models: Models, settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        self.connections: Callable[[], int] = lambda: 0
        self.stopping = False
        self._metrics = Metrics()
        self._pool = ThreadPoolExecutor(_THREADS, "legacy1bit-serve")
        self._chats: weakref.WeakKeyDictionary[Generator, _Chat] = weakref.WeakKeyDictionary()
        self._grammars = Grammars()
        self._created = int(time.time())
        self._page, self._policy = read_page()
        self._routes: dict[str, tuple[str, Callable[[_Exchange, bytes], Awaitable[None]]]] = {
            "/": ("GET", self._show_page),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._show_metrics),
            "/v1/models": ("GET", self._list_models),
            "/v1/completions": ("POST", partial(self._texts, openai.parse_completion)),
            "/v1/chat/completions": ("POST", partial(self._texts, openai.parse_chat)),
            "/v1/embeddings": ("POST", self._embed),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
        }

    def close(self) -> None:
        """End the threads and the processes of templates."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for chat in list(self._chats.values()):
            chat.template.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, receive, send)
        try:
            await self._answer(exchange)
        except ApiError as error:
            await exchange.refuse(error)
        except _Gone:
            pass
        except Exception as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = (
                f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
            )
            exchange.about["error"] = f"{type(error).__name__}: {error} ({where})"
            await exchange.refuse(ApiError("the server has failed", 500, code="internal_error"))
        finally:
            seconds = time.perf_counter() - exchange.begin
            status = exchange.status if exchange.ended else _GONE
            self._metrics.answered(exchange.route, status, seconds)
            if exchange.route not in ("/health", "/metrics"):
                log(
                    {
                        "method": exchange.method[:16],
                        "path": exchange.route,
                        "status": status,
                        "seconds": round(seconds, 4),
                        "client": exchange.client,
                        **exchange.about,
                    }
                )

    async def _answer(self, exchange: _Exchange) -> None:
        """Answer a request, unless its client is gone before."""
        name = None
        if exchange.path.startswith("/v1/models/"):
            exchange.route, name = "/v1/models", exchange.path.removeprefix("/v1/models/")
        elif exchange.path in self._routes:
            exchange.route = exchange.path
        self._admit(exchange)
        if exchange.route == "other":
            raise ApiError(f"there is no {exchange.path[:200]!a}", 404, code="unknown_url")
        method, handler = self._routes[exchange.route]
        if name is not None:
            handler = partial(self._show_model, name)
        if exchange.method != method and (method, exchange.method) != ("GET", "HEAD"):
            raise ApiError(
                f"{exchange.route} takes {method}", 405, code="method_not_allowed",
                headers={"allow": method},
            )  # fmt: skip
        if method == "POST":
            # A page of another site cannot send this type without asking first.
            kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError("the content-type of a request is application/json", 415)
            if self.stopping:
                raise _stopping()
        body = await exchange.read(self.settings.most_body if method == "POST" else 0)
        work = asyncio.ensure_future(handler(exchange, body))
        gone = asyncio.ensure_future(exchange.until_gone())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not exchange.ended:
                raise _Gone
            await work
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    def _admit(self, exchange: _Exchange) -> None:
        """Raise ``ApiError`` unless the client may ask."""
        settings, headers = self.settings, exchange.headers
        # A page of another site whose name was made to lead here (DNS rebinding) has its own name.
        if settings.local and not is_local(_name_of(headers.get("host", ""))):
            raise ApiError("the server is for this machine alone", 403, code="host_not_allowed")
        if settings.keys:
            if exchange.route in ("/", "/health"):
                return
            scheme, _, key = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
            # All are compared, so that the time says nothing.
            same = [hmac.compare_digest(digest, known) for known in settings.keys]
            if scheme.lower() != "bearer" or not any(same):
                raise ApiError(
                    "a key is needed: Authorization: Bearer KEY", 401, code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
            return
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise ApiError("pages of other sites may not ask", 403, code="origin_not_allowed")

    async def _in_thread(self, call: Callable[..., _Result], *arguments: Any) -> _Result:
        """Return what a call returns that takes time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(call, *arguments))

    # Models

    @contextlib.asynccontextmanager
    async def _lease(self, name: str | None) -> AsyncIterator[Lease]:
        """Hold a model, which is loaded if it must be, until the end of the block."""
        names = self.models.names
        name = names[0] if name is None else name
        if name not in names:
            raise ApiError(
                f"the model {name[:200]!a} does not exist", 404, "model", "model_not_found"
            )
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, self.models.acquire, name)
        try:
            lease = await asyncio.shield(future)
        except asyncio.CancelledError:
            # The client is gone while the model is loaded.
            future.add_done_callback(_release)
            raise
        except Closed:
            raise _stopping() from None
        except (OSError, ValueError, MemoryError) as error:
            # The message may have a path.
            log({"model": name, "error": f"it cannot be loaded: {error}"})
            message = "the model cannot be loaded now"
            raise ApiError(message, 503, "model", "model_unavailable") from None
        try:
            yield lease
        finally:
            lease.release()

    def _chat_of(self, lease: Lease) -> _Chat:
        generator = lease.engine.generator
        chat = self._chats.get(generator)
        if chat is None:
            template = choose_template(self.settings.template, lease.path, generator.tokenizer)
            chat = self._chats.setdefault(generator, _Chat(template))
        return chat

    def _prompts(self, lease: Lease, request: TextRequest) -> tuple[list[Tokens], tuple[str, ...]]:
        """Return the tokens of all prompts, and what ends texts beside the request's own."""
        generator = lease.engine.generator
        if not request.messages:
            return [_encode(generator, prompt) for prompt in request.prompts], ()
        chat, tokenizer = self._chat_of(lease), generator.tokenizer
        messages = []
        for message in request.messages:
            content = message["content"]
            if message["role"] == "assistant":
                # As ``Conversation`` takes answers in.
                content = (without_thoughts(content) or "").strip()
            messages.append({"role": message["role"], "content": content})
        with chat.lock:
            text = chat_text(chat.template, tokenizer, messages)
        tokens = chat_tokens(chat.template, tokenizer, text)
        if not tokens.size:
            raise ValueError("the chat template makes no text of the conversation")
        return [tokens], chat.template.stop

    async def _list_models(self, exchange: _Exchange, body: bytes) -> None:
        await exchange.json(
            {"object": "list", "data": [self._card(name) for name in self.models.names]}
        )

    async def _show_model(self, name: str, exchange: _Exchange, body: bytes) -> None:
        if name not in self.models.names:
            raise ApiError(
                f"the model {name[:200]!a} does not exist", 404, "model", "model_not_found"
            )
        await exchange.json(self._card(name))

    def _card(self, name: str) -> Json:
        """Return a model as OpenAI's API describes it, and behind that what is known of it."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "legacy1bit",
            **self.models.card(name),
        }

    # Texts

    async def _texts(
        self, parse: Callable[[Json, Limits], TextRequest], exchange: _Exchange, body: bytes
    ) -> None:
        request = parse(openai.parse_json(body), self.settings.limits)
        async with self._lease(request.model) as lease:
            exchange.about["model"] = lease.name
            if self.settings.log_prompts:
                exchange.about["prompt"] = request.messages or request.prompts
            param = "messages" if request.messages else "prompt"
            try:
                prompts, stops = await self._in_thread(self._prompts, lease, request)
            except (IndexError, TypeError, ValueError) as error:
                raise ApiError(str(error), param=param) from None
            engine, settings = lease.engine, request.settings
            constraints: Sequence[Constraint | None] = [None] * (len(prompts) * request.count)
            if request.form is not None:
                try:
                    constraints = await self._in_thread(
                        self._grammars.constraints, engine.generator, request.form, len(constraints)
                    )
                except ValueError as error:
                    raise ApiError(str(error), param="response_format") from None
            asked = [
                replace(
                    settings,
                    tokens=tokens,
                    stop=(*settings.stop, *stops),
                    seed=settings.seed + i,
                    constraint=constraints[i],
                )
                for i, tokens in enumerate(one for one in prompts for _ in range(request.count))
            ]
            jobs = _Jobs(
                [partial(engine.submit, one) for one in asked],
                # A grammar of the request may turn out to be one that cannot be followed.
                fault=500 if request.form is None else 400,
            )
            reply = openai.Reply(request, lease.name, engine.generator.tokenizer)
            try:
                await self._deliver(exchange, request, jobs, reply)
            finally:
                jobs.cancel()
                exchange.about |= reply.usage()
                if self.settings.log_prompts:
                    exchange.about["texts"] = [about.text for about in reply.texts]

    async def _deliver(
        self, exchange: _Exchange, request: TextRequest, jobs: _Jobs, reply: openai.Reply
    ) -> None:
        """Send texts as they come about, or when they are complete."""
        first = True
        async with contextlib.aclosing(jobs.batches()) as batches:
            async for batch in batches:
                said = [reply.take(index, event) for index, event in batch]  # type: ignore[arg-type]
                if first:
                    self._metrics.first_token(time.perf_counter() - exchange.begin)
                if request.stream:
                    if first:
                        await exchange.start(
                            200, "text/event-stream; charset=utf-8", {"x-accel-buffering": "no"}
                        )
                        said = [*reply.beginning(), *said]
                    if data := b"".join(openai.event_of(one) for one in said if one is not None):
                        await exchange.write(data)
                first = False
        if not request.stream:
            await exchange.json(reply.whole())
            return
        rest = openai.event_of(reply.usage_chunk()) if request.usage else b""
        await exchange.write(rest + openai.DONE, False)

    async def _embed(self, exchange: _Exchange, body: bytes) -> None:
        request = openai.parse_embedding(openai.parse_json(body), self.settings.limits)
        async with self._lease(request.model) as lease:
            exchange.about["model"] = lease.name
            generator = lease.engine.generator
            size = generator.model.config.model_dim
            if request.dimensions not in (None, size):
                raise ApiError(f"dimensions is not {size}, that of the model", param="dimensions")
            begin = generator.tokenizer.bos_token

            def encoded() -> list[Tokens]:
                return [_encode(generator, one) for one in request.inputs]

            try:
                texts = await self._in_thread(encoded)
            except (IndexError, TypeError, ValueError) as error:
                raise ApiError(str(error), param="input") from None
            if any(tokens.size == 1 and tokens[0] == begin for tokens in texts):
                raise ApiError("input has an empty text", param="input")
            jobs = _Jobs([partial(lease.engine.submit_embedding, tokens) for tokens in texts])
            vectors: dict[int, npt.NDArray[np.float32]] = {}
            try:
                async for batch in jobs.batches():
                    for index, event in batch:
                        if isinstance(event, Embedding):
                            behind = int(texts[index][0] == begin)
                            vectors[index] = _unit_mean(event.states[behind:])
            finally:
                jobs.cancel()
            count = sum(tokens.size for tokens in texts)
            exchange.about["prompt_tokens"] = count
            found = [vectors[index] for index in range(len(texts))]
            reply = await self._in_thread(openai.embedding_reply, request, lease.name, found, count)
            await exchange.json(reply)

    async def _tokenize(self, exchange: _Exchange, body: bytes) -> None:
        name, text, special = openai.parse_tokenize(openai.parse_json(body))
        async with self._lease(name) as lease:
            generator = lease.engine.generator
            encode = generator.encode if special else generator.tokenizer.encode
            try:
                tokens = await self._in_thread(encode, text)
            except (IndexError, ValueError) as error:
                raise ApiError(str(error), param="content") from None
            await exchange.json({"tokens": tokens.tolist()})

    async def _detokenize(self, exchange: _Exchange, body: bytes) -> None:
        name, tokens = openai.parse_detokenize(openai.parse_json(body))
        async with self._lease(name) as lease:
            generator = lease.engine.generator
            try:
                given: Tokens | list[int] = _check(generator, tokens) if tokens else []
                data = await self._in_thread(generator.tokenizer.decode, given)
            except (IndexError, TypeError, ValueError) as error:
                raise ApiError(str(error), param="tokens") from None
            await exchange.json({"content": data.decode("utf-8", "replace")})

    # The server itself

    async def _health(self, exchange: _Exchange, body: bytes) -> None:
        if self.stopping:
            raise _stopping()
        await exchange.json({"status": "ok"})

    async def _show_metrics(self, exchange: _Exchange, body: bytes) -> None:
        numbers = {}
        for name, stats in self.models.stats().items():
            gauges = ("running", "waiting", "slots")
            numbers[name] = {
                key if key in gauges else f"{key}_total": value
                for key, value in asdict(stats).items()
            }
        text = self._metrics.text(numbers, self.connections())
        await exchange.answer(200, text.encode(), CONTENT_TYPE)

    async def _show_page(self, exchange: _Exchange, body: bytes) -> None:
        headers = {"content-security-policy": self._policy, "x-frame-options": "DENY"}
        await exchange.answer(200, self._page, "text/html; charset=utf-8", headers)


def read_page() -> tuple[bytes, str]:
    """Return the page, and a policy that lets its own script and style run, and nothing else."""
    page = files("legacy1bit.serve").joinpath("page.html").read_bytes()
    hashes = {}
    for tag in ("script", "style"):
        [inside] = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode("ascii")
        hashes[tag] = f"{tag}-src 'sha256-{digest}'"
    rest = "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return page, f"default-src 'none'; {hashes['script']}; {hashes['style']}; {rest}"


def _release(future: "asyncio.Future[Lease]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()


def _name_of(host: str) -> str:
    """Return the name or address of a Host header, without its port."""
    if match := re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](:\d*)?", host):
        return match[1]
    return host.partition(":")[0]


def _check(generator: Generator, tokens: list[int]) -> Tokens:
    return check_tokens(tokens, generator.model.config.vocab_size, "tokens")


def _encode(generator: Generator, prompt: str | list[int]) -> Tokens:
    return generator.encode(prompt) if isinstance(prompt, str) else _check(generator, prompt)


def _unit_mean(states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the mean of hidden states [T, C], with length 1."""
    mean = states.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    return np.asarray(mean / length if length > 0 else mean, np.float32)
