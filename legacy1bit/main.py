"""The command line: train a model, let it write, measure it, look inside (C: ``main.c``).

Standard output belongs to what was asked for: the text that ``generate`` writes, the report that
the other commands print. Progress and remarks go to standard error.
"""

import argparse
import contextlib
import hashlib
import io
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

try:
    from legacy1bit.math_ops import simd_level
except ImportError as error:
    # An instruction set that LEGACY1BIT_SIMD names and the machine lacks is the user's to mend.
    print(f"legacy1bit: error: {error}", file=sys.stderr)
    raise SystemExit(2) from None

from legacy1bit import stories
from legacy1bit.data_utils import (
    TOKENIZER_FILE,
    ByteTokenizer,
    load_text_from_file,
    tokenize_text,
)
from legacy1bit.dataset import Corpus, TokenDataset, story_corpus, text_corpus
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.inference import check_sampling, generate
from legacy1bit.logger import EVENTS_FOLDER, METRICS_FILE, MetricsLogger, check_tensorboard
from legacy1bit.model import LegacyLLM, TernaryMatrix, load_model
from legacy1bit.packed import PackedModel
from legacy1bit.threads import available_cores, default_threads
from legacy1bit.trainer import (
    RUN_FILES,
    SETTINGS_FILE,
    Metrics,
    Trainer,
    evaluate,
    read_checkpoint_header,
    read_settings,
    recall_of_heroes,
    weight_shares,
)

RUNS = Path("runs")
STORIES = "stories"

_STORIES = 20000
_MOST_STORIES = 10_000_000
_HELD_OUT_STORIES = 256
_LINE_BREAK = b"\n"
_INTERRUPTED = 130

# How a finished run is sampled: warm enough to vary, cool enough to keep to what it knows.
_SAMPLES = 20
_TEMPERATURE = 0.8

# What is kept of where a corpus came from: of a text, and of the stories.
_SOURCE_KINDS = ({"name": str, "path": str, "sha256": str}, {"stories": int, "seed": int})

console = Console(stderr=True, highlight=False)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose options are written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        _fail(f"{message} (see {self.prog} --help)")


def _fail(message: str) -> NoReturn:
    """End the program with one line on standard error and status 2."""
    line = " ".join(str(message).split())
    print(f"legacy1bit: error: {line}", file=sys.stderr)
    raise SystemExit(2)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names[-1:], error.strerror])
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}" if str(error) else "not enough memory"
    return str(error)


# ---------------------------------------------------------------------------------------------
# Arguments


# Settings whose options are not named like them; None: the command line has none.
_OPTIONS = {"vocab_size": None, "num_blocks": "blocks", "num_heads": "heads"}

_ALL_CORES = "LEGACY1BIT_THREADS, or the cores there are"

# Below so many bytes of weights a token is written faster than a second thread wakes up.
_SMALL = 1 << 20

# What a run that goes on may be told anew.
_CHANGEABLE = ("steps", "threads", "precision")


def _option(name: str) -> str | None:
    """Return the command line's name of a setting, without its dashes."""
    option = _OPTIONS.get(name, name)
    return None if option is None else option.replace("_", "-")


def _add_settings(command: argparse.ArgumentParser, title: str, record: type[Any]) -> None:
    """Give a command an option for each field of a record of settings."""
    group = command.add_argument_group(title)
    for setting in fields(record):
        option, meta = _option(setting.name), setting.metadata
        if option is None:
            continue
        default = _ALL_CORES if setting.name == "threads" else setting.default
        meaning = meta["meaning"] + ("" if default is None else f" (default: {default})")
        settings: dict[str, Any] = {"dest": setting.name, "help": meaning}
        if meta["kind"] is bool:
            settings["action"] = argparse.BooleanOptionalAction
            settings["default"] = None
        elif "choices" in meta:
            settings["choices"] = meta["choices"]
        else:
            settings["type"] = meta["kind"]
            settings["metavar"] = "N" if meta["kind"] is int else "X"
        group.add_argument(f"--{option}", **settings)


def _add_training(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train a model (what happens without a command, too)",
        description="Train a model on a text, or on the bundled stories. Without options it takes "
        "about a minute on two cores.",
    )
    command.add_argument("--data", metavar="FILE", help="any text file (default: the stories)")
    command.add_argument("--out", metavar="DIR", type=Path, help="the run's folder (default: new)")
    command.add_argument("--resume", metavar="DIR", type=Path, help="go on with an earlier run")
    command.add_argument("--stories", type=int, metavar="N", help="how many to learn from")
    command.add_argument(
        "--tensorboard", action="store_true", help="write TensorBoard's events, too"
    )
    _add_settings(command, "the model", ModelConfig)
    _add_settings(command, "the training", TrainingConfig)
    command.set_defaults(run=run_training)


def _add_generation(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="let a model write",
        description="Write the prompt and its continuation to standard output.",
    )
    _add_model(command)
    command.add_argument("--prompt", default="", help="what the text begins with")
    command.add_argument("--max-tokens", type=int, default=250, metavar="N", help="default: 250")
    command.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest; default: 0.8"
    )
    command.add_argument("--top-k", type=int, default=0, metavar="N", help="default: no limit")
    command.add_argument("--top-p", type=float, default=1.0, metavar="X", help="default: no limit")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    command.add_argument(
        "--threads", type=int, metavar="N", help=f"default: 1 for a small model, else {_ALL_CORES}"
    )
    command.set_defaults(run=run_generation)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="PATH", type=Path, help="a run's folder (default: the latest)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="legacy1bit",
        description="Small language models with weights of -1, 0 and 1, on any CPU.",
        epilog="Without a command: train on the bundled stories for about a minute.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    _add_training(commands)
    _add_generation(commands)
    command = commands.add_parser("evaluate", help="measure a model on a text")
    _add_model(command)
    command.add_argument(
        "--data", metavar="FILE", help="any text file (default: the run's validation set)"
    )
    command.add_argument("--threads", type=int, metavar="N", help=f"default: {_ALL_CORES}")
    command.set_defaults(run=run_evaluation)
    command = commands.add_parser("info", help="tell what a model is made of")
    _add_model(command)
    command.set_defaults(run=run_info)
    return parser


# ---------------------------------------------------------------------------------------------
# Runs and corpora


def latest_run() -> Path:
    """Return the run under ``runs/`` that was saved last.

    Raises
    ------
    ValueError
        If there is none.
    """
    found = list(RUNS.glob(f"*/{SETTINGS_FILE}")) if RUNS.is_dir() else []
    if not found:
        raise ValueError(
            f"there is no run in {RUNS}/ yet: train one first, or name one with --model"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def _make_folder(wanted: Path | None) -> Path:
    """Make the folder of a new run: the one wanted, or one named by the time."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    name, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


def _check_folder(wanted: Path | None) -> None:
    """Raise ``ValueError`` for a folder in which a run would write over something."""
    if wanted is None or not wanted.exists():
        return
    if (wanted / SETTINGS_FILE).exists():
        raise ValueError(f"{wanted} holds a run already: name another folder, or --resume it")
    # What a run leaves that ended before it was saved as a whole is not in the way: a record, and
    # beside it some of its files.
    names = {path.name for path in wanted.iterdir()} if wanted.is_dir() else {wanted.name}
    found = {name for name in names if not (name.startswith(".") and name.endswith(".tmp"))}
    ours = METRICS_FILE in found and found <= {METRICS_FILE, EVENTS_FOLDER, *RUN_FILES}
    if found and not ours:
        raise ValueError(f"{wanted} is no empty folder: name another")


def _source(data: str | None, count: int | None, seed: int) -> dict[str, Any]:
    """Return where a corpus comes from, so that it can be made again."""
    if data is None:
        return {"name": STORIES, "stories": _STORIES if count is None else count, "seed": seed}
    if count is not None:
        raise ValueError("--stories and --data exclude each other")
    text = load_text_from_file(data)
    return {
        "name": Path(data).name,
        "path": str(Path(data).resolve()),
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }


def _corpus(source: dict[str, Any], config: ModelConfig) -> Corpus:
    """Return the corpus that ``_source`` described.

    Raises
    ------
    ValueError
        If the text has changed since, or is too short.
    """
    told = source.get("name") == STORIES and "path" not in source
    for key, kind in _SOURCE_KINDS[told].items():
        if type(source.get(key)) is not kind:
            raise ValueError(f"the run's source has {key} {source.get(key)!r}, which is damaged")
    if told:
        if not 1 <= source["stories"] <= _MOST_STORIES:
            raise ValueError(f"stories is {source['stories']}, expected 1 to {_MOST_STORIES}")
        return story_corpus(
            source["stories"],
            _HELD_OUT_STORIES,
            source["seed"],
            config.sequence_length,
            config.pad_token,
        )
    text = load_text_from_file(source["path"])
    if hashlib.sha256(text).hexdigest() != source["sha256"]:
        raise ValueError(f"{source['path']} has changed since the run began")
    return text_corpus(text, source["name"], config.sequence_length, config.pad_token)


# ---------------------------------------------------------------------------------------------
# train


class _Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; the second acts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_Interrupts":
        self._before = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _given(arguments: argparse.Namespace, record: type[Any]) -> dict[str, Any]:
    """Return the settings of a record that the command line names."""
    values = {setting.name: getattr(arguments, setting.name, None) for setting in fields(record)}
    return {name: value for name, value in values.items() if value is not None}


def _configs(arguments: argparse.Namespace) -> tuple[ModelConfig, TrainingConfig]:
    """Return the settings that the command line asks for."""
    training = _given(arguments, TrainingConfig)
    training["threads"] = _threads(arguments)
    return ModelConfig(**_given(arguments, ModelConfig)), TrainingConfig(**training)


def _start(arguments: argparse.Namespace) -> tuple[Trainer, MetricsLogger]:
    """Return a new run, or an old one where its checkpoint was written."""
    if arguments.resume is not None:
        return _resume(arguments)
    model_config, config = _configs(arguments)
    if arguments.tensorboard:
        check_tensorboard()
    _check_folder(arguments.out)
    source = _source(arguments.data, arguments.stories, config.seed)
    corpus = _corpus(source, model_config)
    # The folder last: what fails before leaves nothing behind.
    trainer = Trainer(RUNS, model_config, config, corpus, source)
    trainer.folder = _make_folder(arguments.out)
    return trainer, MetricsLogger(trainer.folder, tensorboard=arguments.tensorboard)


def _resume(arguments: argparse.Namespace) -> tuple[Trainer, MetricsLogger]:
    """Return an old run. What it was started with holds; only its end and its threads may move."""
    folder = arguments.resume
    model_config, config, source = read_settings(folder)
    places = ("data", "out", "stories")
    given = [name for name in places if getattr(arguments, name) is not None]
    given += [*_given(arguments, ModelConfig), *_given(arguments, TrainingConfig)]
    fixed = [_option(name) for name in given if name not in _CHANGEABLE]
    if fixed:
        raise ValueError(
            f"--{fixed[0]} cannot change in a run that goes on: only --steps, --threads and "
            "--precision can"
        )
    changes = {name: getattr(arguments, name) for name in given}
    if "threads" in changes:
        changes["threads"] = _threads(arguments)
    config = replace(config, **changes)
    done = read_checkpoint_header(folder, model_config).step
    if done >= config.steps:
        raise ValueError(f"{folder} has had its {done} steps: give more with --steps to go on")
    trainer = Trainer(folder, model_config, config, _corpus(source, model_config), source)
    trainer.restore()
    print(f"going on with {folder} at step {trainer.step}", file=sys.stderr)
    return trainer, MetricsLogger(folder, trainer.step, arguments.tensorboard)


def run_training(arguments: argparse.Namespace) -> int:
    """Train, with a progress bar, and report."""
    trainer, logger = _start(arguments)
    config = trainer.model.config
    print(
        f"training {trainer.model.num_parameters:,} parameters ({config.scheme}, "
        f"{config.num_blocks} blocks of {config.model_dim}) on {trainer.corpus.name}, "
        f"{trainer.config.threads} threads, {simd_level()}, {trainer.config.precision}",
        file=sys.stderr,
    )
    with _Interrupts() as interrupts, _progress() as progress:
        task = progress.add_task(
            "", total=trainer.config.steps, completed=trainer.step, loss=float("nan"), speed=0.0
        )

        def on_step(loss: float, speed: float) -> None:
            progress.update(task, completed=trainer.step, loss=loss, speed=speed)

        def on_report(record: dict[str, Any]) -> None:
            progress.console.print(
                f"step {record['step']:>6}  train loss {record['train_loss']:.4f}  "
                f"validation loss {record['val_loss']:.4f}  "
                f"{record['tokens_per_second']:,.0f} tokens/s"
            )

        with contextlib.closing(logger):
            done = trainer.train(logger, on_step, on_report, lambda: interrupts.requested)
    if not done:
        print(
            f"stopped at step {trainer.step} of {trainer.config.steps}; go on with:\n"
            f"  python -m legacy1bit.main train --resume {shlex.quote(str(trainer.folder))}",
            file=sys.stderr,
        )
        return _INTERRUPTED
    _report(trainer)
    return 0


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _report(trainer: Trainer) -> None:
    """Print what a finished run has come to."""
    model, corpus, threads = trainer.model, trainer.corpus, trainer.config.threads
    metrics = trainer.metrics or evaluate(model, corpus.validation, threads)
    _print_metrics(metrics)
    if corpus.floor is not None:
        print(
            f"{'entropy floor':<18}{corpus.floor:.4f} nats a character "
            f"(the loss is {metrics.loss / corpus.floor - 1:.1%} above)"
        )
    if corpus.stories:
        _print_recall(recall_of_heroes(model, corpus.stories, threads))
        written = [_write_story(model, seed) for seed in range(_SAMPLES)]
        whole = sum(stories.is_story(story) for story in written)
        print(f"{'whole stories':<18}{whole} of {_SAMPLES} that it wrote obey the grammar")
        print("\nsample:\n  " + "\n  ".join(written[:3]))
    else:
        text = bytes(generate(model, list(_LINE_BREAK), 300, temperature=_TEMPERATURE))
        print("\nsample:\n" + text.decode("utf-8", "replace"))
    folder, prompt = shlex.quote(str(trainer.folder)), "Kim was a" if corpus.stories else "The"
    print(f"\nthe run is in {trainer.folder} ({model.stored_bytes():,} bytes of weights); next:")
    print(f'  python -m legacy1bit.main generate --model {folder} --prompt "{prompt}"')


def _write_story(model: LegacyLLM, seed: int) -> str:
    """Return the first story that a model writes."""
    text = bytearray()
    longest = model.config.sequence_length
    for token in generate(model, list(_LINE_BREAK), longest, seed, _TEMPERATURE):
        if token == _LINE_BREAK[0]:
            break
        text.append(token)
    return text.decode("utf-8", "replace")


def _print_recall(share: float) -> None:
    print(f"{'right hero':<18}{share:.1%} of endings")


def _print_metrics(metrics: Metrics) -> None:
    print(f"{'validation loss':<18}{metrics.loss:.4f} nats a character")
    print(f"{'perplexity':<18}{metrics.perplexity:.4f}")
    print(f"{'bits per byte':<18}{metrics.bits_per_byte:.4f}")
    print(f"{'top 1 / 3 / 5':<18}{metrics.top1:.1%} / {metrics.top3:.1%} / {metrics.top5:.1%}")


# ---------------------------------------------------------------------------------------------
# generate, evaluate, info


def run_generation(arguments: argparse.Namespace) -> int:
    """Write the prompt and its continuation, as bytes, as they come."""
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    if arguments.seed < 0:
        raise ValueError(f"--seed is {arguments.seed}, expected 0 or more")
    if arguments.max_tokens < 0:
        raise ValueError(f"--max-tokens is {arguments.max_tokens}, expected 0 or more")
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    threads = _threads(arguments)
    model, tokenizer, _ = _load(arguments)
    packed = PackedModel(model)
    del model
    if arguments.threads is None and packed.nbytes < _SMALL:
        threads = 1
    prompt = os.fsencode(arguments.prompt)
    tokens = tokenize_text(prompt, packed.config.vocab_size)
    reach = packed.config.sequence_length
    if tokens.size > reach:
        print(
            f"the prompt has {tokens.size} tokens and the model sees {reach}: its newest count",
            file=sys.stderr,
        )
    # A prompt is the beginning of a line: what the model has learned of beginnings, it has learned
    # behind a line break.
    tokens = np.concatenate([tokenize_text(_LINE_BREAK), tokens])
    output = sys.stdout.buffer
    output.write(prompt)
    output.flush()
    for token in generate(
        packed,
        tokens,
        arguments.max_tokens,
        arguments.seed,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        threads,
    ):
        output.write(tokenizer.decode([token]))
        output.flush()
    if sys.stdout.isatty():
        print(file=sys.stderr)
    return 0


def run_evaluation(arguments: argparse.Namespace) -> int:
    """Print how well a model predicts a text."""
    threads = _threads(arguments)
    model, _, folder = _load(arguments)
    if arguments.data is None:
        _, _, source = read_settings(folder)
        corpus = _corpus(source, model.config)
        _print_metrics(evaluate(model, corpus.validation, threads))
        if corpus.stories:
            _print_recall(recall_of_heroes(model, corpus.stories, threads))
        return 0
    tokens = tokenize_text(load_text_from_file(arguments.data), model.config.vocab_size)
    if tokens.size < 2:
        raise ValueError(f"{arguments.data} has one byte, expected at least two")
    whole = TokenDataset(
        tokens, min(model.config.sequence_length, tokens.size - 1), model.config.pad_token
    )
    _print_metrics(evaluate(model, whole, threads))
    return 0


def run_info(arguments: argparse.Namespace) -> int:
    """Print what a model is made of."""
    model, _, folder = _load(arguments)
    print(f"{'model':<18}{folder}")
    for name, value in model.config.to_dict().items():
        print(f"{name:<18}{value}")
    print(f"{'parameters':<18}{model.num_parameters:,}")
    print(f"{'stored':<18}{model.stored_bytes():,} bytes of weights")
    matrices = weight_shares(model)
    if matrices:
        width = max(map(len, matrices))
        levels = " ".join(f"{level:>6}" for level in next(iter(matrices.values())))
        print(f"\n{'matrix':<{width}}  {'shape':>11}  {'scale':>9}  {levels}")
    for name, shares in matrices.items():
        matrix = model.parameters[name]
        assert isinstance(matrix, TernaryMatrix)
        print(
            f"{name:<{width}}  {'x'.join(map(str, matrix.shape)):>11}  {matrix.scale:>9.6f}  "
            + " ".join(f"{share:>6.1%}" for share in shares.values())
        )
    return 0


def _load(arguments: argparse.Namespace) -> tuple[LegacyLLM, ByteTokenizer, Path]:
    """Return the model that is asked for, its tokenizer, and where it lies."""
    folder = arguments.model or latest_run()
    model = load_model(folder)
    has_tokenizer = (folder / TOKENIZER_FILE).exists()
    tokenizer = ByteTokenizer.load(folder) if has_tokenizer else ByteTokenizer()
    if model.config.vocab_size > tokenizer.vocab_size:
        raise ValueError(
            f"{folder} has {model.config.vocab_size} tokens, expected bytes: "
            f"{tokenizer.vocab_size} at most"
        )
    return model, tokenizer, folder


def _threads(arguments: argparse.Namespace) -> int:
    """Return how many threads to use: never more than there are cores."""
    if arguments.threads is None:
        return default_threads()
    if not 1 <= arguments.threads <= 256:
        raise ValueError(f"--threads is {arguments.threads}, expected 1 to 256")
    return min(int(arguments.threads), available_cores())


# ---------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Whatever the user can set right, wrong options, files and texts, ends in one line on standard
    error and status 2.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["train", *arguments]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has had enough. A training that lost its reader is not done.
        _silence(sys.stdout, sys.stderr)
        return 1 if parsed.run is run_training else 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (ValueError, TypeError, IndexError, OSError, MemoryError) as error:
        if isinstance(error, OSError):
            _silence(sys.stdout)
        _fail(_describe(error))
    return status


def _silence(*streams: TextIO | None) -> None:
    """Let what streams still hold go nowhere, so that Python does not fail on it at exit."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
