"""A server on a free port of this machine, and an engine whose events a test decides."""

import contextlib
import http.client
import json
import threading
import time
from pathlib import Path

from legacy1bit.generator import TextStream
from legacy1bit.serve.engine import Stats
from legacy1bit.serve.requests import Embedding, Finished, Piece


class SlowTicket:
    def __init__(self):
        self.ended = threading.Event()

    def cancel(self):
        self.ended.set()


class SlowEngine:
    """Answers each request with the text of ``Generator.complete``, a token at a time.

    Attributes
    ----------
    seconds : float
        Between two tokens.
    fault : Exception or str or None
        What ``submit`` raises, or the message of an error after the first token.
    cancelled, sampled : int
        Requests that were cancelled before their end, and tokens of all.
    """

    def __init__(self, generator):
        self.generator = generator
        self.seconds, self.fault = 0.0, None
        self.cancelled, self.sampled = 0, 0
        self.requests = []

    def submit(self, request, on_event):
        self.requests.append(request)
        if isinstance(self.fault, Exception):
            raise self.fault
        if request.tokens.size >= self.generator.context:
            raise ValueError(f"the prompt has {request.tokens.size} tokens")
        return self._begin(self._generate, request, on_event)

    def submit_embedding(self, tokens, on_event):
        if tokens.size >= self.generator.context:
            raise ValueError(f"the text has {tokens.size} tokens")
        return self._begin(self._embed, tokens, on_event)

    def stats(self):
        return Stats(1, 2, 4, len(self.requests), 5, 3, self.sampled, 0.5, 1.5)

    @staticmethod
    def _begin(work, asked, on_event):
        ticket = SlowTicket()
        threading.Thread(target=work, args=(asked, on_event, ticket), daemon=True).start()
        return ticket

    def _embed(self, tokens, on_event, _):
        on_event(Embedding(self.generator.decoder(len(tokens)).prefill_states(tokens)))
        on_event(Finished("stop", len(tokens)))

    def _generate(self, request, on_event, ticket):
        text, count, reason = TextStream(self.generator.tokenizer, request.stop), 0, "length"
        tokens = self.generator.tokens(
            request.tokens, request.max_tokens, request.sampling, request.seed
        )
        for token in tokens:
            if ticket.ended.wait(self.seconds) if self.seconds else ticket.ended.is_set():
                reason = "cancelled"
                self.cancelled += 1
                break
            count += 1
            self.sampled += 1
            piece = text.feed(token)
            if count == request.max_tokens:
                piece += text.finish()
            likely = None if request.logprobs is None else -1.5
            top = tuple((one, -1.0 - one) for one in range(request.logprobs or 0))
            on_event(Piece(piece, token, likely, top))
            if isinstance(self.fault, str):
                time.sleep(self.seconds)
                on_event(Finished("error", len(request.tokens), 0, count, self.fault))
                return
            if text.stopped:
                reason = "stop"
                break
        on_event(Finished(reason, len(request.tokens), 1, count))


class Held:
    def __init__(self, models, name, engine, path):
        self._models, self.name, self.engine, self.path = models, name, engine, path
        models.held += 1

    def release(self):
        self._models.held -= 1


class SomeModels:
    """Models that are in memory already: engines by their names."""

    def __init__(self, **engines):
        self._engines, self.names, self.held = engines, list(engines), 0
        self.path = Path("nowhere")

    def acquire(self, name):
        return Held(self, name, self._engines[name], self.path)

    def card(self, name):
        return {"loaded": True}

    def stats(self):
        return {name: engine.stats() for name, engine in self._engines.items()}


@contextlib.contextmanager
def serving(models, **settings):
    """A running server of models; ends with the block."""
    from legacy1bit.serve.app import Application, ServeSettings
    from legacy1bit.serve.server import Server

    application = Application(models, ServeSettings(port=0, **settings))
    server, ready = Server(application), threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"signals": False, "ready": ready.set})
    thread.start()
    assert ready.wait(20)
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        application.close()
        assert not thread.is_alive()


def port_of(server):
    return int(server.url.rpartition(":")[2])


def connect(server):
    return http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=30)


def ask(server, path, body=None, method=None, **headers):
    """The status and the answer to a request: JSON, or bytes where it is none."""
    with contextlib.closing(connect(server)) as connection:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named = {"content-type": "application/json", **named}
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, named)
        answer = connection.getresponse()
        data = answer.read()
        kind = answer.headers["content-type"]
        return answer.status, json.loads(data) if kind == "application/json" else data


def events_of(data):
    """The events of a stream, whose end is checked."""
    *events, end, rest = data.decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]
