"""``serve``: answer requests in the form of OpenAI's API, until a signal ends it.

Logs go to standard error, a line of JSON for each request.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from legacy1bit.commands.options import (
    ALL_CORES,
    check_above_zero,
    latest_run,
    path_of,
    size_of,
    threads_of,
)
from legacy1bit.generator import MOST_CONTEXT
from legacy1bit.packed import HEADS
from legacy1bit.system.files import read_regular
from legacy1bit.system.optional import load_extra

# The shortest key: shorter ones could be guessed.
_SHORTEST_KEY = 16

_HOST, _PORT, _SLOTS, _TIMEOUT = "127.0.0.1", 8080, 4, 600.0


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    command.description = (
        "Answer requests in the form of OpenAI's API (/v1/chat/completions and others), and show a "
        "page to chat at /. SIGTERM and Ctrl-C end it when running requests are answered; SIGHUP "
        "reads models and keys again."
    )
    add = command.add_argument
    add(
        "--model",
        metavar="[NAME=]PATH",
        action="append",
        default=[],
        help="a run's folder (default: the latest), a GGUF file, or a folder of Hugging Face, and "
        "what requests call it; may be given several times: each is loaded when it is asked for",
    )
    add(
        "--adapter",
        metavar="[NAME=]PATH[:SCALE]",
        action="append",
        default=[],
        help="a LoRA adapter on the model of that name",
    )
    add("--host", default=_HOST, help=f"the address to listen on (default: {_HOST})")
    add(
        "--port",
        type=int,
        default=_PORT,
        metavar="N",
        help=f"its port, 0: a free one (default: {_PORT})",
    )
    add(
        "--slots",
        type=int,
        default=_SLOTS,
        metavar="N",
        help=f"texts of a model that are generated side by side (default: {_SLOTS})",
    )
    add(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of each text, its prompt included (default: the model's, at most "
        f"{MOST_CONTEXT})",
    )
    add("--threads", type=int, metavar="N", help=f"number of threads (default: {ALL_CORES})")
    add(
        "--head",
        choices=HEADS,
        default="int8",
        help="how a float embedding and output matrix are stored; with float, a text may depend on "
        "what runs beside it (default: int8)",
    )
    add(
        "--template",
        metavar="FILE",
        type=path_of,
        help="a chat template in Jinja; plain: lines of User: and Assistant: "
        "(default: the model's own)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        type=path_of,
        help="keys that let clients in, one on each line; needed beyond this machine",
    )
    add(
        "--memory-limit",
        metavar="N",
        type=size_of,
        help="bytes of all loaded models, as 4G: those not used for longest make room",
    )
    add(
        "--timeout",
        type=float,
        default=_TIMEOUT,
        metavar="X",
        help=f"seconds in which a request must be answered (default: {_TIMEOUT:g})",
    )
    add("--log-prompts", action="store_true", help="write prompts and texts to the log, too")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    load_extra("serve needs", "starlette")
    # Loaded here, so that the options are parsed without them.
    from legacy1bit.serve.app import Application, ServeSettings, is_local
    from legacy1bit.serve.models import Models, named_sources
    from legacy1bit.serve.server import Server

    for name, low, high in (("port", 0, 65535), ("slots", 1, 128), ("context", 2, 1 << 31)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} is {value}, expected {low} to {high}")
    check_above_zero(arguments, "timeout", "memory_limit")
    if not is_local(arguments.host) and arguments.api_key_file is None:
        raise ValueError(
            f"--host {arguments.host} lets other machines in: --api-key-file FILE says whom"
        )
    # An engine that has passed a token gets the interpreter back sooner than after 5 ms.
    sys.setswitchinterval(0.0005)
    settings = ServeSettings(
        host=arguments.host,
        port=arguments.port,
        keys=_keys(arguments.api_key_file),
        template=arguments.template,
        request_seconds=arguments.timeout,
        log_prompts=arguments.log_prompts,
    )
    sources = named_sources(arguments.model or [str(latest_run())], arguments.adapter)
    threads = None if arguments.threads is None else threads_of(arguments)
    named: dict[str, Any] = {"memory": arguments.memory_limit, "head": arguments.head}
    with Models(sources, arguments.slots, arguments.context, threads=threads, **named) as models:
        # What is wrong with it is told at once.
        models.acquire(models.names[0]).release()
        application = Application(models, settings)

        def reload() -> None:
            keys = _keys(arguments.api_key_file)
            models.reload()
            application.settings = replace(settings, keys=keys)

        def ready() -> None:
            names = ", ".join(models.names)
            print(f"{names}: {server.url} (Ctrl-C ends)", file=sys.stderr, flush=True)

        try:
            server = Server(application, reload)
            server.run(ready=ready)
        finally:
            application.close()
    return 0


def _keys(file: Path | None) -> tuple[bytes, ...]:
    """Return the SHA-256 of each key of a file."""
    if file is None:
        return ()
    try:
        lines: Sequence[str] = read_regular(file).decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} has a key with other characters than ASCII") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{file} has no key, expected one on each line")
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST_KEY or not key.isprintable():
            raise ValueError(
                f"key {number} of {file} has {len(key)} characters, expected at least "
                f"{_SHORTEST_KEY}, as openssl rand -hex 24 writes them"
            )
    return tuple(hashlib.sha256(key.encode("ascii")).digest() for key in keys)
