"""Texts in the form of a JSON schema or a grammar, by masks over the vocabulary (llguidance)."""

import contextlib
import json
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from legacy1bit.data.tokenizer import Tokenizer
from legacy1bit.generator import Generator
from legacy1bit.system.optional import load_extra

# The longest schema or grammar, in characters.
_LONGEST = 1 << 16

_WHO = "response_format and grammar need"


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        texts = [tokenizer.decode([token]) for token in range(size)]
        # Tokens without text are special; another one ends texts where the model has none for that.
        self.special_token_ids = [token for token in range(size) if not texts[token]]
        self.tokens = [text or b"<%d>" % token for token, text in enumerate(texts)]
        if tokenizer.stop_tokens:
            self.eos_token_id = tokenizer.stop_tokens[0]
        else:
            self.eos_token_id = size
            self.special_token_ids.append(size)
            self.tokens.append(b"<end>")
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Raise ``ValueError`` for what the library does wrong with a stranger's grammar."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ValueError):
        raise
    # A panic of the library is no Exception.
    except BaseException as error:
        raise ValueError(f"the grammar cannot be read: {_line(str(error))}") from None


class _Constraint:
    """A text that follows a grammar; see ``requests.Constraint``."""

    def __init__(self, matcher: Any, size: int, ends: bool) -> None:
        self._matcher, self._size, self._ends = matcher, size, ends

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may be next: bool[V]."""
        with _refusing():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        if self._matcher.is_error() or not mask.any():
            raise ValueError(f"the grammar cannot be followed: {_line(self._matcher.get_error())}")
        return mask

    def advance(self, token: int) -> bool:
        """Note the sampled token; return whether the text is complete with it."""
        matcher = self._matcher
        with _refusing():
            matcher.consume_token(token)
            # A model without an end-of-text token cannot say that it has ended.
            return matcher.is_stopped() or (not self._ends and matcher.is_accepting())


class Grammars:
    """The constraints of texts, for the tokenizers of generators. For any thread."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Generator, Any] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def constraints(self, generator: Generator, form: Any, count: int) -> list[_Constraint]:
        """Return constraints of ``count`` texts.

        Parameters
        ----------
        generator : Generator
        form : dict or str
            A JSON schema, or a grammar in llguidance's form of Lark.
        count : int

        Raises
        ------
        ValueError
            If it is wrong or too large, or llguidance is not installed.
        """
        library = load_extra(_WHO, "llguidance")
        with _refusing():
            return self._constraints(library, generator, form, count)

    def _constraints(
        self, library: Any, generator: Generator, form: Any, count: int
    ) -> list[_Constraint]:
        text = form if isinstance(form, str) else json.dumps(form)
        if len(text) > _LONGEST:
            raise ValueError(f"it has {len(text)} characters, expected at most {_LONGEST}")
        if isinstance(form, str):
            grammar = library.LLMatcher.grammar_from_lark(text)
        else:
            # Small models would write spaces without an end.
            compact = {"whitespace_flexible": False}
            grammar = library.LLMatcher.grammar_from_json_schema(text, overrides=compact)
        size = generator.model.config.vocab_size
        with self._lock:
            tokenizer = self._known.get(generator)
            if tokenizer is None:
                wrapper = library.TokenizerWrapper(_Vocabulary(generator.tokenizer, size))
                tokenizer = library.LLTokenizer(wrapper)
                self._known[generator] = tokenizer
        matcher = library.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(_line(matcher.get_error()))
        ends = bool(generator.tokenizer.stop_tokens)
        # What takes time is done here, and not where other texts wait.
        _Constraint(matcher, size, ends).allowed()
        return [_Constraint(matcher.deep_copy(), size, ends) for _ in range(count)]


def _line(message: str) -> str:
    return " ".join(message.split())[:300]
