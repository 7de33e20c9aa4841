"""The command line: train a model, generate text, measure, look inside (C: ``main.c``).

Standard output has the results: the text of ``generate``, the reports of the other commands.
Progress and remarks go to standard error.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

from legacy1bit.commands.names import nearest_option
from legacy1bit.commands.streams import unfailing
from legacy1bit.system.errors import END_SIGNALS, INTERRUPTED, SettingError, describe
from legacy1bit.version import __version__

# The commands: the module of each, its purpose, and examples of its use. Only the module of the
# command that is called is loaded, so that text does not wait for the imports of training.
COMMANDS = {
    "train": (
        "train",
        "train a model (the default command)",
        ("train --data mytext.txt --minutes 10", "train --resume runs/mine --steps 3000"),
    ),
    "generate": (
        "generate",
        "generate text",
        ('generate --prompt "It was a dark night" --temperature 0.7', "generate --interactive"),
    ),
    "chat": (
        "chat",
        "talk with a model",
        ("chat --model bitnet-b1.58-2B-4T.gguf", "chat --model runs/mine --template plain"),
    ),
    "serve": (
        "serve",
        "answer requests in the form of OpenAI's API, and show a page to chat",
        ("serve --model bitnet-b1.58-2B-4T.gguf", "serve --model a=runs/a --model b=b.gguf"),
    ),
    "tune": (
        "tune",
        "search for the best settings within a time and a size",
        (
            "tune --data mytext.txt --minutes 20 --out studies/mine",
            "tune --data mytext.txt --max-bytes 500kB --trials 40",
        ),
    ),
    "data": (
        "data",
        "inspect a text, tokenize it, or train a tokenizer on it",
        (
            "data inspect mytext.txt --tokenizer bpe",
            "data tokenize texts/ --tokenizer bpe --out tokens",
        ),
    ),
    "cache": (
        "cache",
        "show the cached tokens of texts, or clear them",
        ("cache", "cache clear --older-than 30"),
    ),
    "evaluate": (
        "evaluate",
        "measure a model on a text",
        ("evaluate --model runs/mine", "evaluate --model runs/mine --data other.txt"),
    ),
    "info": ("info", "show a model's settings and weights", ("info --model runs/mine",)),
    "plot": (
        "plot",
        "draw curves, weights or attention of runs",
        ("plot loss runs/a runs/b --out loss.svg",),
    ),
    "report": (
        "report",
        "write a page about a run or a study",
        ("report runs/mine --out report.html",),
    ),
    "export": (
        "export",
        "write a model as a file for other programs",
        ("export --model runs/mine --format gguf --out mine.gguf",),
    ),
    "import": (
        "import_model",
        "read a model from a file of another program",
        ("import --model mine.gguf --out runs/mine",),
    ),
}

# Options that are not those of train, where there is no command.
_OF_PROGRAM = ("-h", "--help", "--version")

# A folder with one of these holds a run or a model.
_OF_MODELS = ("training.json", "config.json")


class _Formatter(argparse.HelpFormatter):
    """Wraps texts, but keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose options are not abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options in the parser that has the known ones."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = dict.fromkeys(filter(None, (self._named(unknown), *map(self._nearest, unknown))))
            meant = f"; did you mean {', '.join(near)}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return parsed, unknown

    def _nearest(self, word: str) -> str | None:
        """Return the option that is probably meant: of an earlier version, or the nearest."""
        if not word.startswith("-"):
            return None
        near = nearest_option(word.partition("=")[0].lstrip("-"), self._options())
        return None if near is None else f"--{near}"

    def _named(self, words: Sequence[str]) -> str | None:
        """Return words without an option behind the one that probably takes them."""
        paths = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
        if not paths:
            return None
        if any(os.path.isfile(os.path.join(paths[0], name)) for name in _OF_MODELS):
            takers = ["model", "resume"]
        else:
            takers = ["data", "prompt-file" if os.path.isfile(paths[0]) else "prompt", "model"]
        taker = next((one for one in takers if one in self._options()), None)
        if taker is None:
            return None
        # Only --data takes several words; a prompt of several has lost its quotes.
        values = {"data": paths, "prompt": [" ".join(paths)]}.get(taker, paths[:1])
        return f"--{taker} {shlex.join(values)}"

    def _options(self) -> list[str]:
        """Return the names of the options, without their dashes."""
        return [option[2:] for option in self._option_string_actions if option[:2] == "--"]

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")


def _fail(message: str) -> NoReturn:
    """End the program with one line on standard error and status 2."""
    line = " ".join(str(message).split())
    with contextlib.suppress(OSError):
        print(f"legacy1bit: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parser_of(*commands: str) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the options of some commands."""
    parser = _Parser(
        prog="legacy1bit",
        description="Small language models with weights of -1, 0 and 1, on any CPU.",
        epilog="Without a command: train on the bundled stories for about a minute. "
        "legacy1bit COMMAND --help has the options of a command, and examples.",
    )
    parser.add_argument("--version", action="version", version=f"legacy1bit {__version__}")
    parsers = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for name, (module_name, purpose, examples) in COMMANDS.items():
        lines = "".join(f"\n  legacy1bit {example}" for example in examples)
        parsed = parsers.add_parser(name, help=purpose, epilog=f"examples:{lines}")
        if name in commands:
            module = importlib.import_module(f"legacy1bit.commands.{module_name}")
            parsed.set_defaults(run=module.run)
            module.add_arguments(parsed)
            if not any(one.required for one in parsed._actions):
                # There are screens full of options.
                parsed.usage = "%(prog)s [OPTION ...]"
    return parser


def full_parser() -> argparse.ArgumentParser:
    """Return the parser with all options, as shell completion needs it (see README.md)."""
    return parser_of(*COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Errors that the user can correct (wrong options, files and texts) end in one line on standard
    error and status 2. The streams of the calling program stay as they were.
    """
    with _any_character():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in _OF_PROGRAM):
        arguments = ["train", *arguments]
    try:
        parsed = parser_of(arguments[0]).parse_args(arguments)
        parsed.words = arguments
        with _tidy_end():
            status: int = parsed.run(parsed)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has closed it. A training without its reader is not done.
        return 1 if arguments[0] == "train" else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except ImportError as error:
        # The user can correct a LEGACY1BIT_SIMD that this machine does not support.
        if "LEGACY1BIT_SIMD" not in str(error):
            raise
        _fail(str(error))
    except SettingError as error:
        # It is loaded already: a command has failed.
        from legacy1bit.commands.options import option_typed

        _fail(error.named(lambda name: option_typed(parsed, name)))
    except (ValueError, TypeError, IndexError, OSError, MemoryError) as error:
        _fail(describe(error))
    return status


def program() -> NoReturn:
    """Run the program ``legacy1bit``, and exit."""
    # Before a command begins and after its end there is nothing to clean up, and Python would
    # answer Ctrl-C with a traceback.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # NumPy's BLAS is not used here; without threads to start, it would interrupt the program.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        sys.exit(main())
    finally:
        _flush(sys.stdout, sys.stderr)


# The commands that threads of a program run at this moment, and what puts its streams back.
_streams_lock = threading.Lock()
_commands: list[object] = []
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def _any_character() -> Iterator[None]:
    """Let standard output take characters that its encoding lacks, and standard error anything.

    Of commands that run side by side, the first changes the streams, and the last to end puts them
    back.
    """
    command = object()
    with _streams_lock:
        if not _commands:
            _change_streams()
        _commands.append(command)
    try:
        yield
    finally:
        with _streams_lock:
            _commands.remove(command)
            if not _commands:
                _undo.close()


def _change_streams() -> None:
    output = sys.stdout
    _undo.callback(setattr, sys, "stderr", sys.stderr)
    sys.stderr = unfailing(sys.stderr)
    if isinstance(output, io.TextIOWrapper) and not output.closed:
        _undo.callback(_set_errors, output, output.errors)
        output.reconfigure(errors="backslashreplace")


def _set_errors(output: io.TextIOWrapper, errors: str | None) -> None:
    # It is flushed, too, which fails where nobody reads any more.
    with contextlib.suppress(OSError, ValueError):
        output.reconfigure(errors=errors)


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """Turn signals that end the program into exceptions, so that partial files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Signals that are ignored (nohup) stay so. None: a handler installed by another language, which
    # Python cannot restore.
    before = {
        number: signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number in END_SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flush(*streams: TextIO | None) -> None:
    """Flush streams; redirect those that fail to the null device, so that Python exits cleanly."""
    for stream in streams:
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    program()
