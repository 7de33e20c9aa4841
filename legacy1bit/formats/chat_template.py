"""Chat templates: from the messages of a conversation to the text that a model continues.

A template comes with a model, as a program in Jinja, and is a stranger's. It is rendered in a
process of its own, where jinja2's sandbox gives it plain data, and neither attributes nor anything
to call but what is listed here; where its time and memory are limited; and whose output is cut off.
The environment is that of transformers' ``apply_chat_template``: blocks are trimmed, and templates
may call ``raise_exception`` and ``strftime_now``.
"""

import contextlib
import datetime
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from legacy1bit.system.child import end_child, ready_line, start_child, why_ended
from legacy1bit.system.optional import load_extra

# What ``PlainTemplate`` writes.
PLAIN = (
    "{% for message in messages %}"
    "{{ message.role | title ~ ': ' ~ message.content | trim ~ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)

Messages = Sequence[Mapping[str, str]]

_MODULE = "legacy1bit.formats.chat_template"

# The longest template, and the most text that one may write where its messages are shorter.
_MOST_SOURCE = 1 << 18
_MOST_TEXT = 1 << 20

# What rendering may take: seconds of a core, seconds in which the process must answer however busy
# the machine is, and bytes.
_CPU_SECONDS, _SECONDS, _MEMORY = 1.0, 15.0, 1 << 28

_LENGTH_BYTES = 4


class Template(Protocol):
    """What makes a text of messages.

    Attributes
    ----------
    source : str
        In Jinja.
    stop : tuple of str
        Texts that end an answer, beside the stop tokens.
    ending : str
        What of these a conversation that ends with an answer does not have, if it is not in its
        text.
    names_tokens : bool
        Whether names of special tokens in the text stand for them.
    """

    source: str
    stop: tuple[str, ...]
    ending: str
    names_tokens: bool

    def render(self, messages: Messages, answer: bool = True) -> str:
        """Return the text of a conversation, and the beginning of an answer behind it.

        Each message has a ``role`` ("system", "user", "assistant") and a ``content``.
        """
        ...

    def close(self) -> None:
        """End what the template has started."""
        ...


class PlainTemplate:
    """Lines of ``User: …`` and ``Assistant: …``. For its members see ``Template``."""

    source = PLAIN
    stop: tuple[str, ...] = ("\nUser:",)
    ending = "User:"
    names_tokens = False

    def render(self, messages: Messages, answer: bool = True) -> str:
        """Return the text of a conversation."""
        said = (f"{one['role'].title()}: {one['content'].strip()}\n" for one in messages)
        return "".join(said) + ("Assistant: " if answer else "")

    def close(self) -> None:
        """Do nothing."""


class JinjaTemplate:
    """A template in Jinja, rendered in a process of its own. For its members see ``Template``.

    Parameters
    ----------
    source : str
    names : mapping of str to str
        What the template calls ``bos_token``, ``eos_token``.

    Attributes
    ----------
    source : str
    variables : dict
        Those of the template beside the messages: ``names``, and what else it may ask for.

    Raises
    ------
    ValueError
        If the template is too long, or jinja2 is not installed; and when it is rendered, if it is
        wrong, does what it must not, takes too long, or refuses the messages.
    """

    stop: tuple[str, ...] = ()
    ending = ""
    names_tokens = True

    def __init__(self, source: str, names: Mapping[str, str] | None = None) -> None:
        if len(source) > _MOST_SOURCE:
            raise ValueError(
                f"the chat template has {len(source)} characters, expected at most {_MOST_SOURCE}"
            )
        load_extra("chat templates need", "jinja2", "sandbox")
        self.source = source
        self.variables: dict[str, Any] = dict(names or {})
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()
            self._process = None

    def render(self, messages: Messages, answer: bool = True) -> str:
        """Return the text of a conversation."""
        if self._process is None:
            self._process = start_child(_MODULE)
            if self._process is None:
                raise ValueError("the chat template needs a process, which cannot be started")
            # With the last reference to the template, too.
            self._end = weakref.finalize(self, end_child, self._process)
        request = {
            "source": self.source,
            "variables": {
                **self.variables,
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": answer,
                "tools": None,
                "documents": None,
            },
        }
        finished = False
        try:
            result = self._answer(json.dumps(request).encode())
            finished = True
        finally:
            # The answer to a request that was left would be taken for that to the next one.
            if not finished:
                self.close()
        if "error" in result:
            raise ValueError(f"the chat template {result['error']}")
        return str(result["text"])

    def _answer(self, request: bytes) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(len(request).to_bytes(_LENGTH_BYTES) + request)
            process.stdin.flush()
        head = _read(process, _LENGTH_BYTES)
        data = _read(process, int.from_bytes(head)) if len(head) == _LENGTH_BYTES else b""
        if not data:
            status = process.wait()
            if status == -signal.SIGPROF:
                raise ValueError(f"the chat template takes more than {_CPU_SECONDS:g} s")
            raise ValueError(f"the chat template cannot be rendered: {why_ended(status)}")
        result: dict[str, Any] = json.loads(data)
        return result


def _read(process: subprocess.Popen[bytes], count: int) -> bytes:
    """Return the next bytes of a process; fewer if it ends. Raises ``ValueError`` if it is late."""
    assert process.stdout is not None
    # The buffer of the stream is empty: what came before was read to its last byte.
    descriptor, data = process.stdout.fileno(), b""
    end = time.monotonic() + _SECONDS
    while len(data) < count:
        if not select.select([descriptor], [], [], max(end - time.monotonic(), 0))[0]:
            raise ValueError(f"the chat template takes more than {_SECONDS:g} s")
        piece = os.read(descriptor, min(count - len(data), 1 << 16))
        if not piece:
            break
        data += piece
    return data


# --- The process that renders ---------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Attributes of plain data.
_METHODS: dict[type, frozenset[str]] = {
    str: _words(
        "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith "
        "upper lower title capitalize replace find rfind index count join removeprefix "
        "removesuffix isdigit isalpha isalnum isspace isupper islower"
    ),
    dict: _words("items keys values get"),
    list: _words("index count"),
    tuple: _words("index count"),
}

_FILTERS = _words(
    "abs batch capitalize count d default dictsort e escape first float forceescape groupby indent "
    "int items join last length list lower map max min reject rejectattr replace reverse round "
    "safe select selectattr slice sort string sum title trim truncate unique upper wordcount"
)


def _environment() -> Any:
    """Return the environment that templates are compiled in."""
    jinja2 = load_extra("chat templates need", "jinja2", "sandbox", "ext", "runtime", "utils")
    base: Any = jinja2.sandbox.ImmutableSandboxedEnvironment
    runtime, namespace = jinja2.runtime, jinja2.utils.Namespace

    def raise_exception(message: object) -> NoReturn:
        raise jinja2.TemplateError(str(message))

    def strftime_now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    functions = {
        "range": jinja2.sandbox.safe_range,
        "dict": dict,
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }

    class Environment(base):  # type: ignore[misc]
        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, (runtime.LoopContext, namespace)):
                return not attr.startswith("_")
            return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

        def is_safe_callable(self, obj: Any) -> bool:
            if isinstance(obj, (types.BuiltinMethodType, types.MethodType)):
                plain = (*_METHODS, runtime.LoopContext)
                return isinstance(obj.__self__, plain)
            # What is undefined says so itself.
            known = (runtime.Macro, runtime.LoopContext, runtime.Undefined)
            return isinstance(obj, known) or any(obj is function for function in functions.values())

        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            raise jinja2.sandbox.SecurityError(
                f"asks for the attribute {attribute!r} of a {type(obj).__name__}"
            )

        def handle_exception(self, source: str | None = None) -> NoReturn:
            """Raise it as it is: a traceback of the template's lines would need files."""
            raise

        def wrap_str_format(self, value: Any) -> None:
            """Leave ``format`` an attribute like any other."""

    class Generation(jinja2.ext.Extension):  # type: ignore[misc, name-defined]
        """The blocks that mark answers for training: their text is rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals = functions
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    environment.filters["tojson"] = tojson
    return environment


def _render(compiled: Callable[[str], Any], request: dict[str, Any], most: int) -> dict[str, str]:
    """Return the text of a template, or what it did wrong."""
    jinja2: Any = load_extra("chat templates need", "jinja2", "sandbox")
    pieces, size = [], 0
    try:
        for piece in compiled(request["source"]).generate(**request["variables"]):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                return {"error": f"writes more than {most} characters"}
        return {"text": "".join(pieces)}
    except jinja2.sandbox.SecurityError as error:
        message = str(error)
        return {"error": message if message.startswith("asks") else f"is not allowed: {message}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"is wrong in line {error.lineno}: {error.message}"}
    except jinja2.UndefinedError as error:
        return {"error": f"needs what is not there: {error}"}
    except jinja2.TemplateError as error:
        return {"error": f"refuses the conversation: {error}"}
    except MemoryError:
        return {"error": "takes too much memory"}
    except RecursionError:
        return {"error": "calls itself too often"}
    except Exception as error:
        return {"error": f"fails: {type(error).__name__}: {error}"}


def _limit_memory() -> None:
    """Limit what this process may take from now on, and keep it from opening or writing files."""
    import resource

    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY,) * 2)
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def _main() -> None:
    # A terminal's Ctrl-C comes to all of its processes; the one that asks answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Most templates render many conversations.
    compiled = functools.lru_cache(1)(_environment().from_string)
    # Rendered once, so that nothing is left to load.
    _render(compiled, {"source": "{{ [1]|tojson }}{{ 1|d }}", "variables": {}}, 100)
    strftime = "{{ strftime_now('%d %b %Y') }}{% if x %}{{ x.y }}{% endif %}"
    _render(compiled, {"source": strftime, "variables": {}}, 100)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    output.write(ready_line(_MODULE))
    output.flush()
    _limit_memory()
    while len(head := sys.stdin.buffer.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        data = sys.stdin.buffer.read(int.from_bytes(head))
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        result = _render(compiled, json.loads(data), max(_MOST_TEXT, 4 * len(data)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        if "error" in result:
            result["error"] = " ".join(result["error"][:500].split())
        answer = json.dumps(result).encode("utf-8")
        output.write(len(answer).to_bytes(_LENGTH_BYTES) + answer)
        output.flush()


if __name__ == "__main__":
    _main()
