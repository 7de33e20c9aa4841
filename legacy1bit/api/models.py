"""A model from Python: text, conversations, measures, files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from legacy1bit.api.arguments import arguments_of, check_names, naming_arguments
from legacy1bit.api.output import output_of
from legacy1bit.commands import evaluate as evaluate_command
from legacy1bit.commands.export import ADAPTER_FORMATS, FORMATS, export_model
from legacy1bit.data.published_tokenizer import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from legacy1bit.data.tokenizer import TOKENIZER_FILE, Tokenizer
from legacy1bit.formats.adapters import resolve
from legacy1bit.formats.c_v1 import copy_with_provenance
from legacy1bit.formats.conversation import Conversation, choose_template
from legacy1bit.formats.gguf_file import is_gguf
from legacy1bit.formats.native import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    model_folder,
)
from legacy1bit.formats.published import is_hugging_face
from legacy1bit.generator import Completion, Generator, Stream
from legacy1bit.hyperparams import ModelConfig, SamplingConfig
from legacy1bit.system.files import atomic_copies, atomic_copy
from legacy1bit.training.evaluation import Metrics

StrPath = str | os.PathLike[str]


def load(
    path: StrPath,
    *,
    threads: int | None = None,
    form: str = "2bit",
    head: str | None = None,
    activations: str = "int8",
    context: int | None = None,
    adapters: Sequence[StrPath] = (),
) -> "Model":
    """Load a model of any known format.

    Parameters
    ----------
    path : path-like
        The folder of a run, of which the best model is taken; a GGUF file; a folder of Hugging
        Face; a file of the C original.
    threads : int, optional
        By default one for a small model, else ``default_threads()``.
    form : {"2bit", "trits"}
        How weights are packed; see ``PackedModel``.
    head : {"float", "int8"}, optional
        How float matrices are stored; see ``PackedModel``.
    activations : {"int8", "float32"}
        See ``Decoder``.
    context : int, optional
        The tokens that are kept; by default the model's context, at most 8192.
    adapters : sequence of path-like
        LoRA adapters on it: runs, folders of PEFT, GGUF files; ``"PATH:SCALE"`` multiplies one by a
        factor. They are added.

    Raises
    ------
    ModelFileError
        If it is not a complete, valid model. It is a ``ValueError``.
    OSError
        If a file cannot be read.
    ValueError
        If the tokenizer is damaged, or an option does not fit.
    """
    if not os.fspath(path):
        raise ValueError("path is empty, expected a model")
    if isinstance(adapters, (str, os.PathLike, Mapping)):
        raise TypeError(f"adapters is {adapters!r}, expected a list of paths")
    path, named = Path(path), tuple(os.fspath(adapter) for adapter in adapters)
    stamps = _stamps(path, named)
    generator = Generator.load(path, threads, form, head, activations, context, named)
    return Model(path, generator, stamps, named)


class Model:
    """A model that generates and measures text; ``legacy1bit.load`` makes it.

    Parameters
    ----------
    path : Path
        What it was loaded from.
    generator : Generator
    stamps : dict
        When the model's files were written.
    adapters : tuple of str
        On the model.

    Attributes
    ----------
    path : Path
    generator : Generator
        What generates; docs/PYTHON.md shows what else it can do.

    Notes
    -----
    Thread-safe, except for ``close``: threads may call methods of one model side by side, and each
    gets what it would get alone. A stream or a conversation is for one thread at a time.

    ``close``, or the end of a ``with``, releases the weights; streams keep them until they end.
    """

    def __init__(
        self, path: Path, generator: Generator, stamps: "_Stamps", adapters: Sequence[str] = ()
    ) -> None:
        self.path, self.generator, self._stamps = path, generator, stamps
        self._adapters = tuple(adapters)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<legacy1bit.Model of {self.path}>"

    def close(self) -> None:
        """Release the weights."""
        self.generator.close()

    @property
    def config(self) -> ModelConfig:
        """The settings of the model. Raises ``ValueError`` after ``close``."""
        return self.generator.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.generator.tokenizer

    # --- Text

    def generate(
        self,
        prompt: str | bytes = "",
        max_tokens: int = 250,
        *,
        seed: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Completion:
        """Return the continuation of a prompt.

        Parameters
        ----------
        prompt : str or bytes
        max_tokens : int
        seed : int, optional
            By default another one each time; the result has it.
        stop : sequence of str
            The text ends before the first of these.
        **sampling
            ``temperature``, ``top_k`` and the other fields of ``SamplingConfig``.

        Raises
        ------
        TypeError
            If an argument is unknown, with the nearest name, or a value is of another kind.
        ValueError
            If a value is out of range, the model is closed, or the prompt is empty and the model
            has no beginning-of-text token.
        IndexError
            If a byte of the prompt is not a token of the model.
        """
        return self.generator.complete(prompt, max_tokens, _sampling(sampling), seed, stop)

    def stream(
        self,
        prompt: str | bytes = "",
        max_tokens: int = 250,
        *,
        seed: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Stream:
        """Return the text of ``generate`` as an iterator of its pieces, as they come.

        Parameters and errors are those of ``generate``.
        """
        return self.generator.stream(prompt, max_tokens, _sampling(sampling), seed, stop)

    def batch(
        self,
        prompts: Sequence[str | bytes],
        max_tokens: int = 250,
        *,
        seed: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> list[Completion]:
        """Continue several prompts side by side, which reads the weights once for all of them.

        Prompt i has the seed ``seed + i``. Parameters and errors are those of ``generate``.
        """
        return self.generator.batch(prompts, max_tokens, _sampling(sampling), seed, stop)

    def chat(
        self,
        system: str = "",
        *,
        template: StrPath | None = None,
        max_tokens: int = 1024,
        seed: int | None = None,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Conversation:
        """Return a conversation; its ``answer`` and ``stream`` take the messages of the user.

        Parameters
        ----------
        system : str
            How the model is to answer.
        template : path-like, optional
            A chat template in Jinja; "plain": lines of User: and Assistant:. By default the
            model's own.
        max_tokens : int
            The longest answer.
        seed : int, optional
            Of the first answer; each later one has the next.
        stop : sequence of str
            Texts that end an answer, beside those of the template.
        **sampling
            As for ``generate``.

        Raises
        ------
        TypeError, ValueError
            As ``generate``; or if the model has no template, or it is damaged.
        OSError
            If the template cannot be read.
        """
        settings = _sampling(sampling)
        wanted = None if template is None else Path(template)
        with naming_arguments():
            model, named = resolve(self.path, self._adapters)
            adapters = [adapter for adapter, _ in named]
            chosen = choose_template(wanted, model, self.tokenizer, adapters)
        conversation = Conversation(self.generator, chosen, settings, max_tokens)
        conversation.system = system
        conversation.stop += tuple(stop)
        if seed is not None:
            conversation.seed = seed
        return conversation

    # --- Measures

    def embed(self, text: str | bytes) -> npt.NDArray[np.float32]:
        """Return the last hidden state of each token of a text: float32[T, C].

        Raises
        ------
        ValueError
            If the text is empty, or longer than the context.
        IndexError
            If a byte of the text is not a token of the model.
        """
        return self.generator.embed(text)

    def log_probabilities(self, text: str | bytes) -> npt.NDArray[np.float64]:
        """Return log p of each token of a text, given those before it: float64[T], in nats.

        The first is NaN if the model has no beginning-of-text token. Errors are those of ``embed``;
        a text may be longer than the context.
        """
        return self.generator.log_probabilities(text)

    def evaluate(self, data: StrPath | Iterable[StrPath] | None = None, **settings: Any) -> Metrics:
        """Measure how well the model predicts a text, in float32, as ``legacy1bit evaluate`` does.

        The float weights are read from the model's file again.

        Parameters
        ----------
        data : path-like or sequence of path-like, optional
            By default the validation set of the model's run.
        **settings
            The options of ``legacy1bit evaluate`` by their names with underscores.

        Raises
        ------
        TypeError
            If an argument is unknown, with the nearest name, or a value is of another kind.
        ValueError
            If the text cannot be read or is too short, there is no run that has one, or the model's
            file has changed since it was loaded.
        OSError
            If a file cannot be read.
        """
        self._check_unchanged()
        arguments = arguments_of(evaluate_command, settings | {"data": data}, ("model", "adapter"))
        arguments.model, arguments.adapter = self.path, list(self._adapters)
        with naming_arguments(arguments):
            return evaluate_command.measure(arguments, output_of()).metrics

    # --- Files

    def save(self, path: StrPath, format: str | None = None) -> None:
        """Save the model; ``legacy1bit.load`` of the result is the same, to the bit.

        Parameters
        ----------
        path : path-like
            A file, or a new or empty folder for a model that is a folder.
        format : {"gguf", "c", "safetensors", "c-v1", "peft", "gguf-adapter"}, optional
            A form for other programs, as ``legacy1bit export`` writes it. Without one the model's
            own files are copied, as hard links where the file system has them.

        Raises
        ------
        ValueError
            If the folder is not empty, the model has no such form, its file has changed since it
            was loaded, or another file has the name of its provenance.
        OSError
            If a file cannot be read or written.
        """
        target = Path(path)
        self._check_unchanged()
        with naming_arguments():
            if format is not None:
                if format not in (*FORMATS, *ADAPTER_FORMATS):
                    expected = ", ".join((*FORMATS, *ADAPTER_FORMATS))
                    raise ValueError(f"format is {format!r}, expected one of {expected}")
                export_model(self.path, target, format, adapters=self._adapters)
            elif self._adapters:
                raise ValueError("the model has adapters: format says how they are saved with it")
            elif self.path.is_dir():
                if target.exists() and not (target.is_dir() and not any(target.iterdir())):
                    raise ValueError(f"{target} is not an empty folder: name another")
                atomic_copies(_files(self.path), target)
            elif is_gguf(self.path):
                atomic_copy(self.path, target)
            else:
                copy_with_provenance(self.path, target)

    def _check_unchanged(self) -> None:
        if _stamps(self.path, self._adapters) != self._stamps:
            raise ValueError(f"{self.path} has changed since it was loaded: load it again")


def _sampling(settings: dict[str, Any]) -> SamplingConfig:
    check_names(settings, [setting.name for setting in fields(SamplingConfig)])
    return SamplingConfig(**settings)


# When each file of a model was written, and which of several of its name it is.
_Stamps = dict[Path, tuple[int, int, int]]


def _stamps(path: Path, adapters: Sequence[str]) -> _Stamps:
    base, named = resolve(path, adapters)
    stamps = {}
    for place in (path, base, *(adapter for adapter, _ in named)):
        for file in _files(place):
            about = file.stat()
            stamps[file] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return stamps


def _files(path: Path) -> list[Path]:
    """Return the files of a model, of which those of a run's best one; of others' folders all."""
    if not path.is_dir():
        return [path]
    if is_hugging_face(path):
        return sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    names = (
        *(TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE),
        *(WEIGHTS_FILE, CONFIG_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE),
    )
    files = (model_folder(path) / name for name in names)
    return [file for file in files if file.exists()]
