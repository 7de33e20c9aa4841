"""The command line: train a model, let it write, measure it, look inside (C: ``main.c``).

Standard output belongs to what was asked for: the text that ``generate`` writes, the report that
the other commands print. Progress and remarks go to standard error.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

from legacy1bit.system.errors import INTERRUPTED, SettingError, describe

# The commands, the module of each, and what they are for. Only that of the command which is called
# is loaded, so that writing does not wait for what training needs.
COMMANDS = {
    "train": ("train", "train a model (what happens without a command, too)"),
    "generate": ("generate", "let a model write"),
    "tune": ("tune", "find the best settings within a time and a size"),
    "data": ("data", "look at a text, make tokens or a tokenizer of it"),
    "cache": ("cache", "show what is kept of texts, or clear it"),
    "evaluate": ("evaluate", "measure a model on a text"),
    "info": ("info", "tell what a model is made of"),
    "plot": ("plot", "draw curves, weights or attention of runs"),
    "report": ("report", "write a page about a run"),
    "export": ("export", "write a model as a file for other programs"),
    "import": ("import_model", "read a model from a file of another program"),
}


# What other programs call options, and what those are called here that come nearest.
_ELSEWHERE = {
    **dict.fromkeys(("lr", "max-lr", "rate"), ("learning-rate",)),
    **dict.fromkeys(("wd", "decay"), ("weight-decay",)),
    **dict.fromkeys(("epochs", "epoch", "max-iters", "iterations", "max-steps"), ("steps",)),
    **dict.fromkeys(("time", "max-time"), ("minutes",)),
    **dict.fromkeys(("batch", "bs"), ("batch-size",)),
    **dict.fromkeys(("accumulate", "grad-accum"), ("gradient-accumulation",)),
    **dict.fromkeys(("warmup",), ("warmup-steps",)),
    **dict.fromkeys(("dim", "width", "n-embd", "d-model", "hidden-size"), ("model-dim",)),
    **dict.fromkeys(("layers", "n-layer", "num-layers", "depth"), ("blocks",)),
    **dict.fromkeys(("n-head", "num-attention-heads"), ("heads",)),
    **dict.fromkeys(
        ("ctx", "ctx-size", "context", "context-length", "block-size", "seq-len", "max-length"),
        ("sequence-length", "max-tokens"),
    ),
    **dict.fromkeys(("vocab", "vocabulary"), ("vocab-size",)),
    **dict.fromkeys(("dtype",), ("precision", "type")),
    **dict.fromkeys(("quantization", "quant"), ("scheme", "type")),
    **dict.fromkeys(("workers", "cores", "cpus", "num-threads"), ("threads",)),
    **dict.fromkeys(("input", "file", "text", "dataset", "train", "corpus"), ("data", "prompt")),
    **dict.fromkeys(("val", "valid", "eval", "test"), ("validation",)),
    **dict.fromkeys(("o", "output", "save", "name"), ("out",)),
    **dict.fromkeys(("m", "model", "run", "load", "checkpoint"), ("model", "resume")),
    **dict.fromkeys(("continue", "restart"), ("resume",)),
    **dict.fromkeys(("n", "length", "tokens", "n-predict", "max-new-tokens"), ("max-tokens",)),
    **dict.fromkeys(("temp", "t"), ("temperature",)),
    **dict.fromkeys(("num-samples", "samples"), ("count",)),
    **dict.fromkeys(("chat",), ("interactive",)),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose options are written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is not known where the options are that are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = dict.fromkeys(filter(None, map(self._nearest, unknown)))
            meant = f"; did you mean {', '.join(near)}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return parsed, unknown

    def _nearest(self, word: str) -> str | None:
        """Return the option that may have been meant."""
        if not word.startswith("-"):
            return None
        name = word.partition("=")[0].lstrip("-").lower().replace("_", "-")
        options = [option[2:] for option in self._option_string_actions if option[:2] == "--"]
        known = [option for option in _ELSEWHERE.get(name, ()) if option in options]
        near = known or difflib.get_close_matches(name, options, 1)
        return f"--{near[0]}" if near else None

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")


def _fail(message: str) -> NoReturn:
    """End the program with one line on standard error and status 2."""
    line = " ".join(str(message).split())
    with contextlib.suppress(OSError):
        print(f"legacy1bit: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parser_of(command: str | None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, with the options of one command."""
    parser = _Parser(
        prog="legacy1bit",
        description="Small language models with weights of -1, 0 and 1, on any CPU.",
        epilog="Without a command: train on the bundled stories for about a minute.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for name, (module_name, meaning) in COMMANDS.items():
        parsed = commands.add_parser(name, help=meaning)
        if name == command:
            module = importlib.import_module(f"legacy1bit.commands.{module_name}")
            parsed.set_defaults(run=module.run)
            module.add_arguments(parsed)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Whatever the user can set right, wrong options, files and texts, ends in one line on standard
    error and status 2. The streams of the program that calls this are left as they were.
    """
    with _any_character():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["train", *arguments]
    try:
        parsed = parser_of(arguments[0]).parse_args(arguments)
        parsed.words = arguments
        with _tidy_end():
            status: int = parsed.run(parsed)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has had enough. A training that lost its reader is not done.
        return 1 if arguments[0] == "train" else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except ImportError as error:
        # An instruction set that LEGACY1BIT_SIMD names and the machine lacks is the user's to mend.
        if "LEGACY1BIT_SIMD" not in str(error):
            raise
        _fail(str(error))
    except SettingError as error:
        _fail(error.named(lambda name: _option_typed(parsed, name)))
    except (ValueError, TypeError, IndexError, OSError, MemoryError) as error:
        _fail(describe(error))
    return status


def _option_typed(parsed: argparse.Namespace, name: str) -> str | None:
    """Return the option of a setting, unless it comes from a file that the command line names."""
    # It is loaded: what has failed is a command.
    from legacy1bit.commands.options import option_of

    option = option_of(name) if hasattr(parsed, name) else None
    of_file = any(getattr(parsed, source, None) for source in ("config", "resume", "model"))
    if option is None or (of_file and getattr(parsed, name) is None):
        return None
    return f"--{option}"


def program() -> NoReturn:
    """Be the program that the command line is of."""
    # Before a command begins and after its end there is nothing to tidy, and Python would answer
    # Ctrl-C with a traceback.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # NumPy's BLAS, which nothing here uses, interrupts a program that cannot start its threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        sys.exit(main())
    finally:
        _flush(sys.stdout, sys.stderr)


@contextlib.contextmanager
def _any_character() -> Iterator[None]:
    """Have standard output take characters that its encoding lacks, and standard error be there."""
    output, missing = sys.stdout, sys.stderr is None
    before = output.errors if isinstance(output, io.TextIOWrapper) else None
    try:
        if missing:
            # print would take a closed one for standard output.
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
        yield
    finally:
        if isinstance(output, io.TextIOWrapper):
            # It is flushed, too, which fails where nobody reads any more.
            with contextlib.suppress(OSError, ValueError):
                output.reconfigure(errors=before)
        if missing:
            sys.stderr.close()
            sys.stderr = None


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """Have what ends a program from outside end it as an error would: files that are half-written
    are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A program that was told to survive its terminal does. None: a handler that another language
    # has installed, and Python cannot put back.
    before = {
        number: signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number in (signal.SIGTERM, signal.SIGHUP)
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
    """Write what streams still hold; where that fails, let it go nowhere, so that Python does not
    fail on it at exit."""
    for stream in streams:
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    program()
