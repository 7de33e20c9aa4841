"""The HTTP application: routes, who may ask for what, and answers as they come about.

Nothing of a request becomes the name of a file, and no request is answered with an exception.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
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
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from legacy1bit.data_utils import Tokens
from legacy1bit.formats.chat_template import Template
from legacy1bit.formats.chat_tokens import chat_text, chat_tokens, without_thoughts
from legacy1bit.formats.conversation import choose_template
from legacy1bit.generator import Generator
from legacy1bit.inference import check_tokens
from legacy1bit.serve import openai
from legacy1bit.serve.errors import ApiError
from legacy1bit.serve.jobs import Jobs, Mailbox, stopping
from legacy1bit.serve.metrics import CONTENT_TYPE, Metrics
from legacy1bit.serve.models import Lease, Models
from legacy1bit.serve.openai import Limits, TextRequest
from legacy1bit.serve.openapi import describe
from legacy1bit.serve.parameters import Json
from legacy1bit.serve.requests import Closed, Constraint, Embedding
from legacy1bit.serve.structured import Grammars

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


@dataclass
class _Exchange:
    """What metrics and the log say of a request; ``request.state.exchange``."""

    status: int = _GONE
    ended: bool = False
    about: Json = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)

    def failed(self, error: Exception) -> None:
        """Note a fault of the server."""
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        self.status, self.ended = 500, True
        self.about["error"] = f"{type(error).__name__}: {error} ({where})"


class _JsonResponse(JSONResponse):
    def render(self, content: Any) -> bytes:
        return openai.to_bytes(content)


class _EventsResponse(Response):
    """Server-sent events. It begins with the first, so that what fails before has its own status.

    Starlette's response would also look for clients that go, which the application does for all
    requests.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events, self.status_code, self.background = events, 200, None
        self.init_headers({"x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with contextlib.aclosing(self._events) as events:
            async for data in events:
                if not started:
                    started = True
                    await send(
                        {
                            "type": "http.response.start",
                            "status": self.status_code,
                            "headers": self.raw_headers,
                        }
                    )
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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
        self._mailbox: Mailbox | None = None
        self._pool = ThreadPoolExecutor(_THREADS, "legacy1bit-serve")
        self._chats: weakref.WeakKeyDictionary[Generator, _Chat] = weakref.WeakKeyDictionary()
        self._grammars = Grammars()
        self._created = int(time.time())
        self._page, self._policy = read_page()
        routes = [
            Route("/", self._show_page),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/openapi.json", self._describe),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            self._post("/v1/completions", partial(self._texts, openai.parse_completion)),
            self._post("/v1/chat/completions", partial(self._texts, openai.parse_chat)),
            self._post("/v1/embeddings", self._embed),
            self._post("/tokenize", self._tokenize),
            self._post("/detokenize", self._detokenize),
        ]
        self._paths = frozenset(route.path for route in routes)
        self._starlette = Starlette(
            routes=routes,
            exception_handlers={
                ApiError: _refuse,
                HTTPException: _refuse_url,
                ClientDisconnect: _forget,
                Exception: _fail,
            },
        )
        self._starlette.router.redirect_slashes = False

    def _post(self, path: str, handler: Callable[[Request, Json], Awaitable[Response]]) -> Route:
        """Return the route of a handler that takes JSON."""

        async def endpoint(request: Request) -> Response:
            # A page of another site cannot send this type without asking first.
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError("the content-type of a request is application/json", 415)
            if self.stopping:
                raise stopping()
            body = await _read(request, self.settings.most_body)
            return await handler(request, openai.parse_json(body))

        return Route(path, endpoint, methods=["POST"])

    def close(self) -> None:
        """End the threads and the processes of templates."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for chat in list(self._chats.values()):
            chat.template.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, unless its client is gone before; count it, and write it to the log."""
        if scope["type"] != "http":
            return
        exchange = _Exchange()
        scope["state"] = {"exchange": exchange}
        read = asyncio.Event()

        async def receive_until_read() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                read.set()
            return message

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*_OF_ALL, *message["headers"]]
            elif not message.get("more_body", False):
                exchange.ended = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None

        async def end_when_gone() -> None:
            await read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            if not exchange.ended:
                task.cancel("the client is gone")

        watch = asyncio.ensure_future(end_when_gone())
        try:
            await self._answer(scope, receive_until_read, send_noting)
        except asyncio.CancelledError:
            # Of the server's end, if the client is still there.
            if not watch.done():
                raise
            task.uncancel()
        except Exception as error:
            exchange.failed(error)
        finally:
            watch.cancel()
            self._note(scope, exchange)

    def _note(self, scope: Scope, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.begin
        status = exchange.status if exchange.ended else _GONE
        path = scope["path"] if scope["path"] in self._paths else "other"
        if scope["path"].startswith("/v1/models/"):
            path = "/v1/models/{name}"
        self._metrics.answered(path, status, seconds)
        if path not in ("/health", "/metrics"):
            log(
                {
                    "method": scope["method"][:16],
                    "path": path,
                    "status": status,
                    "seconds": round(seconds, 4),
                    "client": (scope.get("client") or ("",))[0],
                    **exchange.about,
                }
            )

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._admit(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await _response_of(error)(scope, receive, send)
        else:
            await self._starlette(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> None:
        """Raise ``ApiError`` unless the client may ask."""
        settings = self.settings
        # A page of another site whose name was made to lead here (DNS rebinding) has its own name.
        if settings.local and not is_local(_name_of(headers.get("host", ""))):
            raise ApiError("the server is for this machine alone", 403, code="host_not_allowed")
        if settings.keys:
            if path in ("/", "/health"):
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
            raise _no_model(name)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, self.models.acquire, name)
        try:
            lease = await asyncio.shield(future)
        except asyncio.CancelledError:
            # The client is gone while the model is loaded.
            future.add_done_callback(_release)
            raise
        except Closed:
            raise stopping() from None
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

    async def _list_models(self, request: Request) -> Response:
        cards = [self._card(name) for name in self.models.names]
        return _JsonResponse({"object": "list", "data": cards})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.models.names:
            raise _no_model(name)
        return _JsonResponse(self._card(name))

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
        self, parse: Callable[[Json, Limits], TextRequest], request: Request, body: Json
    ) -> Response:
        asked, exchange = parse(body, self.settings.limits), request.state.exchange
        if asked.stream:
            return _EventsResponse(self._stream(exchange, asked))
        async with self._generate(exchange, asked) as (jobs, reply):
            async for batch in jobs.batches():
                reply.take(batch)
            self._metrics.first_token(jobs.first - exchange.begin)
            return _JsonResponse(reply.whole())

    @contextlib.asynccontextmanager
    async def _generate(
        self, exchange: _Exchange, asked: TextRequest
    ) -> AsyncIterator[tuple[Jobs, openai.Reply]]:
        """Begin the texts of a request; end them with the block."""
        async with self._lease(asked.model) as lease:
            exchange.about["model"] = lease.name
            if self.settings.log_prompts:
                exchange.about["prompt"] = asked.messages or asked.prompts
            param = "messages" if asked.messages else "prompt"
            try:
                prompts, stops = await self._in_thread(self._prompts, lease, asked)
            except (IndexError, TypeError, ValueError) as error:
                raise ApiError(str(error), param=param) from None
            engine, settings = lease.engine, asked.settings
            constraints: Sequence[Constraint | None] = [None] * (len(prompts) * asked.count)
            if asked.form is not None:
                try:
                    constraints = await self._in_thread(
                        self._grammars.constraints, engine.generator, asked.form, len(constraints)
                    )
                except ValueError as error:
                    raise ApiError(str(error), param="response_format") from None
            requests = [
                replace(
                    settings,
                    tokens=tokens,
                    stop=(*settings.stop, *stops),
                    seed=settings.seed + i,
                    constraint=constraints[i],
                )
                for i, tokens in enumerate(one for one in prompts for _ in range(asked.count))
            ]
            jobs = Jobs(
                self._deliveries(),
                [partial(engine.submit, one) for one in requests],
                asked.stream,
                # A grammar of the request may turn out to be one that cannot be followed.
                fault=500 if asked.form is None else 400,
            )
            reply = openai.Reply(asked, lease.name, engine.generator.tokenizer)
            try:
                yield jobs, reply
            finally:
                jobs.cancel()
                exchange.about |= reply.usage()
                if self.settings.log_prompts:
                    exchange.about["texts"] = reply.texts()

    async def _stream(self, exchange: _Exchange, asked: TextRequest) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream; faults behind the first are its last."""
        first = True
        try:
            async with self._generate(exchange, asked) as (jobs, reply):
                async for batch in jobs.batches():
                    data = reply.events(batch)
                    if first:
                        first = False
                        self._metrics.first_token(jobs.first - exchange.begin)
                    if data:
                        yield data
                yield reply.end()
        except ApiError as error:
            if first:
                raise
            exchange.status = error.status
            yield openai.event_of(error.record())

    def _deliveries(self) -> Mailbox:
        """Return the mailbox of the loop that runs."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        return self._mailbox

    async def _embed(self, request: Request, body: Json) -> Response:
        asked = openai.parse_embedding(body, self.settings.limits)
        about = request.state.exchange.about
        async with self._lease(asked.model) as lease:
            about["model"] = lease.name
            generator = lease.engine.generator
            size = generator.model.config.model_dim
            if asked.dimensions not in (None, size):
                raise ApiError(f"dimensions is not {size}, that of the model", param="dimensions")
            begin = generator.tokenizer.bos_token

            def encoded() -> list[Tokens]:
                return [_encode(generator, one) for one in asked.inputs]

            try:
                texts = await self._in_thread(encoded)
            except (IndexError, TypeError, ValueError) as error:
                raise ApiError(str(error), param="input") from None
            if any(tokens.size == 1 and tokens[0] == begin for tokens in texts):
                raise ApiError("input has an empty text", param="input")
            submits = [partial(lease.engine.submit_embedding, tokens) for tokens in texts]
            jobs = Jobs(self._deliveries(), submits)
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
            about["prompt_tokens"] = count
            found = [vectors[index] for index in range(len(texts))]
            reply = await self._in_thread(openai.embedding_reply, asked, lease.name, found, count)
            return _JsonResponse(reply)

    async def _tokenize(self, request: Request, body: Json) -> Response:
        name, text, special = openai.parse_tokenize(body)
        async with self._lease(name) as lease:
            generator = lease.engine.generator
            encode = generator.encode if special else generator.tokenizer.encode
            try:
                tokens = await self._in_thread(encode, text)
            except (IndexError, ValueError) as error:
                raise ApiError(str(error), param="content") from None
            return _JsonResponse({"tokens": tokens.tolist()})

    async def _detokenize(self, request: Request, body: Json) -> Response:
        name, tokens = openai.parse_detokenize(body)
        async with self._lease(name) as lease:
            generator = lease.engine.generator
            try:
                given: Tokens | list[int] = _check(generator, tokens) if tokens else []
                data = await self._in_thread(generator.tokenizer.decode, given)
            except (IndexError, TypeError, ValueError) as error:
                raise ApiError(str(error), param="tokens") from None
            return _JsonResponse({"content": data.decode("utf-8", "replace")})

    # The server itself

    async def _health(self, request: Request) -> Response:
        if self.stopping:
            raise stopping()
        return _JsonResponse({"status": "ok"})

    async def _describe(self, request: Request) -> Response:
        return _JsonResponse(describe(self.settings.limits))

    async def _show_metrics(self, request: Request) -> Response:
        numbers = {}
        for name, stats in self.models.stats().items():
            gauges = ("running", "waiting", "slots")
            numbers[name] = {
                key if key in gauges else f"{key}_total": value
                for key, value in asdict(stats).items()
            }
        text = self._metrics.text(numbers, self.connections())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def _show_page(self, request: Request) -> Response:
        headers = {"content-security-policy": self._policy, "x-frame-options": "DENY"}
        return Response(self._page, headers=headers, media_type="text/html")


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


def _no_model(name: str) -> ApiError:
    return ApiError(f"the model {name[:200]!a} does not exist", 404, "model", "model_not_found")


def _response_of(error: ApiError) -> Response:
    return _JsonResponse(error.record(), error.status, error.headers)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response_of(error)


async def _refuse_url(request: Request, error: Exception) -> Response:
    """Answer what no route takes."""
    assert isinstance(error, HTTPException)
    allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
    if allowed:
        headers, code = {"allow": allowed}, "method_not_allowed"
        refused = ApiError(f"this path takes {allowed}", 405, code=code, headers=headers)
    else:
        path = f"{request.scope['path'][:200]!a}"
        refused = ApiError(f"there is no {path}", error.status_code, code="unknown_url")
    return _response_of(refused)


async def _forget(request: Request, error: Exception) -> Response:
    """Answer nobody: the client is gone."""
    return Response(status_code=_GONE)


async def _fail(request: Request, error: Exception) -> Response:
    return _response_of(ApiError("the server has failed", 500, code="internal_error"))


async def _read(request: Request, most: int) -> bytes:
    """Return the body. Raises ``ApiError`` if it is too long."""
    fault = f"the body has more than {most} bytes"
    # A client that still sends when the connection is closed does not see why: what is not much
    # too long is read to its end.
    patience = _PATIENCE * max(most, 1 << 12)
    far = ApiError(fault, 413, headers={"connection": "close"})
    length = request.headers.get("content-length", "0")
    if len(length) > 18 or not length.isdecimal() or int(length) > patience:
        raise far
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size > patience:
            raise far
        if size <= most:
            body += part
    if size > most:
        raise ApiError(fault, 413)
    return bytes(body)


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
