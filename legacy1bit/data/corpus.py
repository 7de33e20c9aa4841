"""From an origin, over tokens on disk, to the datasets of a run: one way for every command.

``open_corpus`` opens the stories, text or tokens that a ``DataOrigin`` names. A text is tokenized
once, into the cache; the split into training and validation parts is made of its tokens.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from legacy1bit.data import stories
from legacy1bit.data.cache import cache_errors, hold_streams, mark_used, trim
from legacy1bit.data.cache import text_of as name_of
from legacy1bit.data.chats import ChatEncoder, EncoderOf, encoded, text_of
from legacy1bit.data.origin import DataOrigin, Kind
from legacy1bit.data.shards import (
    Index,
    Integers,
    ShardWriter,
    TokenStore,
    cache_key,
    cached,
    default_cache,
    open_store,
    read_index,
    split_documents,
)
from legacy1bit.data.sources import (
    NANOGPT_TOKENS,
    PIECE_BYTES,
    Piece,
    Source,
    open_source,
    read_token_file,
    token_file_info,
)
from legacy1bit.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    UnknownTokenizer,
    character_tokenizer,
    train_bpe,
)
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.data_utils import Tokens, tokenize_text
from legacy1bit.dataset import MixedDataset, TokenDataset
from legacy1bit.hyperparams import DataConfig
from legacy1bit.system.errors import SettingError

# The one part of a folder of tokens; of conversations there is another, with 1 for each token that
# is predicted, and 0 for the others.
TEXT, PREDICTED = "text", "predicted"

# Pieces are encoded together until they have this number of bytes: enough for every core, and no
# more than a few megabytes.
_TOGETHER = 4 << 20

# The largest vocabulary of another program's tokens that a model takes.
_MOST_TOKENS = 1 << 20

# What stands between documents where they are hashed: no byte of UTF-8.
_BETWEEN = b"\xff"

# The stories that a run of stories validates on.
_HELD_OUT_STORIES = 256

# The size of a BPE vocabulary by default; the bytes are among its tokens.
_VOCABULARY = 1024

# A vocabulary is learned from the beginning of a text, where it is longer than this: more text
# hardly changes it.
_LEARNED_BYTES = 200_000_000

# Settings of texts; the stories are bytes, each from its beginning.
_OF_READING = ("tokenizer", "field", "encoding", "separator", "split")
_OF_TOKENS = (*_OF_READING, "vocabulary")
_NOISE = ("subword_splitting", "case_noise", "space_noise")
_OF_TEXTS = (*_OF_TOKENS, "validation_fraction", "order", "document_mask")

# The origin of a corpus that was not opened by its origin.
_MEMORY = DataOrigin("memory")

# Gets the name of some work and its total in bytes, and yields a function for the bytes done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_progress(name: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Return a context that reports no progress."""
    return contextlib.nullcontext(lambda done: None)


@dataclass(frozen=True)
class Corpus:
    """The data of a run, to train and to validate on.

    Attributes
    ----------
    name : str
    training, validation : TokenDataset or MixedDataset
    floor : float or None
        The lowest loss any model can reach on the validation set, in nats per token, where that is
        known.
    stories : tuple of str
        The stories of the validation set, where it is made of the bundled ones.
    sha256 : str
        Of the text of both sets, in hexadecimal digits; of one file of UTF-8, that of the file.
    tokenizer : Tokenizer
    remarks : tuple of str
        Lines about the text that its user should read.
    origin : DataOrigin
        Where it comes from, with the hash of the text.
    template : str or None
        The chat template, in Jinja, that its conversations were made of text with.
    """

    name: str
    training: TokenDataset | MixedDataset
    validation: TokenDataset | MixedDataset
    floor: float | None = None
    stories: tuple[str, ...] = ()
    sha256: str = ""
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    remarks: tuple[str, ...] = ()
    origin: DataOrigin = _MEMORY
    template: str | None = None

    @property
    def vocab_size(self) -> int:
        """The number of tokens that a model of this corpus has."""
        return self.training.pad_token


# --- Opening --------------------------------------------------------------------------------------


def open_corpus(
    origin: DataOrigin,
    data: DataConfig,
    sequence_length: int,
    cache: Path | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress = no_progress,
    encoder_of: EncoderOf | None = None,
) -> Corpus:
    """Return the corpus of an origin.

    Parameters
    ----------
    origin : DataOrigin
    data : DataConfig
    sequence_length : int
    cache : Path, optional
        The folder of tokens; the user's when not given.
    tokenizer : Tokenizer, optional
        That of a run that is resumed; made from the text when not given, or from the first one.
    progress : callable, optional
    encoder_of : callable, optional
        Returns what makes tokens of conversations, which are refused without it.

    Raises
    ------
    ValueError
        If the text has changed since a run recorded it, is too short, or cannot be read.
    OSError
        If a file cannot be read or written.
    """
    origin.check()
    kind = origin.kind
    if kind is Kind.MIX:
        return _mixed_corpus(origin, data, sequence_length, cache, tokenizer, progress, encoder_of)
    if kind is Kind.STORIES:
        _refuse(data, _OF_TEXTS, kind)
        assert origin.stories is not None
        assert origin.seed is not None
        size = tokenizer.vocab_size if tokenizer and tokenizer.kind == "bytes" else 256
        corpus = story_corpus(origin.stories, _HELD_OUT_STORIES, origin.seed, sequence_length, size)
        return replace(corpus, origin=origin)
    paths, others = origin.paths, origin.validation_paths
    if kind is Kind.TOKEN_FOLDER:
        _refuse(data, _OF_TOKENS, kind)
        corpus = shard_corpus(Path(paths[0]), data, sequence_length, tokenizer)
    elif kind is Kind.TOKEN_FILE:
        corpus = _token_file_corpus(origin, data, sequence_length, tokenizer)
    else:
        source = text_source(paths, data)
        validation = text_source(others, data) if others else None
        cache = cache or default_cache()
        with cache_errors(cache):
            tokenizer = tokenizer or tokenizer_for(source, data, cache, progress)
            encoder = _encoder_for(source, tokenizer, encoder_of)
            with contextlib.ExitStack() as ends:
                if encoder is not None:
                    ends.enter_context(contextlib.closing(encoder))
                corpus = source_corpus(
                    source, tokenizer, data, sequence_length, cache, validation, progress, encoder
                )
        hold_streams(corpus.training, source.files, cache)
    if data.subword_splitting and (corpus.tokenizer.parents < 0).all():
        raise SettingError(
            "subword_splitting splits merged tokens: expected tokenizer bpe",
            *("subword_splitting", "tokenizer"),
        )
    return replace(corpus, origin=origin.with_hash(corpus.sha256))


def _mixed_corpus(
    origin: DataOrigin,
    data: DataConfig,
    sequence_length: int,
    cache: Path | None,
    tokenizer: Tokenizer | None,
    progress: Progress,
    encoder_of: EncoderOf | None,
) -> Corpus:
    """Return the corpus of texts that are mixed, each of which has its own validation set."""
    parts: list[Corpus] = []
    for text in origin.texts:
        part = open_corpus(text, data, sequence_length, cache, tokenizer, progress, encoder_of)
        tokenizer = part.tokenizer if tokenizer is None else tokenizer
        if parts and part.vocab_size != parts[0].vocab_size:
            raise SettingError(
                f"{part.name} has {part.vocab_size:,} kinds of tokens, expected "
                f"{parts[0].vocab_size:,}, those of {parts[0].name}: vocabulary sets their number",
                "vocabulary",
            )
        parts.append(part)
    origin = replace(origin, texts=tuple(part.origin for part in parts))
    sha256 = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()

    def mixed(which: str) -> MixedDataset:
        datasets = (getattr(part, which) for part in parts)
        texts = zip(origin.texts, datasets, strict=True)
        return MixedDataset([(text.name, text.weight or 0.0, dataset) for text, dataset in texts])

    return Corpus(
        origin.name,
        mixed("training"),
        mixed("validation"),
        sha256=sha256,
        tokenizer=parts[0].tokenizer,
        remarks=tuple(dict.fromkeys(remark for part in parts for remark in part.remarks)),
        origin=origin.with_hash(sha256),
        template=next(filter(None, (part.template for part in parts)), None),
    )


def _encoder_for(
    source: Source, tokenizer: Tokenizer, encoder_of: EncoderOf | None
) -> ChatEncoder | None:
    """Return what makes tokens of a text's conversations; None if it has none."""
    if not source.has_chats:
        return None
    if encoder_of is None:
        raise ValueError(f"{source.name} holds conversations, which need a chat template")
    return encoder_of(tokenizer)


def open_chats(
    origin: DataOrigin,
    data: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    encoder_of: EncoderOf,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[TokenDataset, tuple[str, ...]] | None:
    """Return all conversations of a text, and lines about it; None if it is not made of them.

    Parameters and errors are those of ``open_corpus``.
    """
    origin.check()
    if origin.kind is not Kind.TEXT:
        return None
    source, cache = text_source(origin.paths, data), cache or default_cache()
    encoder = _encoder_for(source, tokenizer, encoder_of)
    if encoder is None:
        return None
    with cache_errors(cache), contextlib.closing(encoder):
        folder, index = tokens_of(source, tokenizer, cache, progress, encoder)
    side = _Side.of(folder, index)
    hold_streams(side.tokens, source.files, cache)
    dataset = _chat_dataset(side, sequence_length, tokenizer.vocab_size)
    _check_answers(source.name, dataset)
    return dataset, (*_remarks(source, index), *_cut_chats(source, side.tokens, sequence_length))


def open_text(
    origin: DataOrigin,
    data: DataConfig,
    tokenizer: Tokenizer,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[TokenStore, tuple[str, ...]]:
    """Return the tokens of a text as a whole, and lines about it that its user should read.

    A text of bytes begins with its first byte; any other with a boundary, as a document does.

    Parameters and errors are those of ``open_corpus``.
    """
    origin.check()
    path = Path(origin.paths[0])
    if origin.kind is Kind.TOKEN_FILE:
        tokens = read_token_file(path)
        if tokenizer.kind != "unknown":
            raise ValueError(
                f"{path} has tokens of another program, and the model's are {tokenizer.kind}: "
                "expected text"
            )
        highest, _ = _highest_and_sha256(tokens)
        if highest >= tokenizer.vocab_size:
            raise ValueError(
                f"{path} has token {highest}, expected 0 to {tokenizer.vocab_size - 1}, the model's"
            )
        return TokenStore([tokens]), ()
    if origin.kind is Kind.TOKEN_FOLDER:
        index = read_index(path)
        if index.tokenizer != tokenizer.sha256:
            raise ValueError(f"{path} has tokens of another tokenizer than the model's")
        return open_store(path, index, TEXT), ()
    source, cache = text_source(origin.paths, data), cache or default_cache()
    with cache_errors(cache):
        folder, index = tokens_of(source, tokenizer, cache, progress)
    store = open_store(folder, index, TEXT)
    # Before the first byte of a text is none that a model could know.
    store = store.window(int(tokenizer.eos_token is None), store.size - 1)
    hold_streams(store, source.files, cache)
    return store, _remarks(source, index)


def text_source(paths: Sequence[str], data: DataConfig) -> Source:
    """Return a text as settings say that it is read; errors are those of ``open_source``."""
    return open_source(paths, data.field, data.encoding, data.separator)


def _refuse(data: DataConfig, names: Sequence[str], kind: Kind) -> None:
    """Raise ``SettingError`` for settings that would be ignored."""
    for name in names:
        if getattr(data, name) != getattr(DataConfig(), name):
            raise SettingError(f"{name} goes with --data of text, and not with {kind.value}", name)


# --- Texts ----------------------------------------------------------------------------------------


def tokenize_source(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Callable[[int], None] | None = None,
    replace: bool = True,
) -> Index:
    """Turn a source's text into tokens on disk, a few megabytes at a time.

    Each document has a hash of its beginning, by which it is split later: copies of a document are
    on the same side.

    Parameters
    ----------
    source : Source
    tokenizer : Tokenizer
    folder : Path
        Where to; written as a whole or not at all.
    on_progress : callable, optional
        Gets the number of bytes of text that are done.
    replace : bool
        Whether the former content of the folder may be replaced.

    Raises
    ------
    ValueError
        If the source cannot be read as text, or has changed meanwhile.
    OSError
        If a file cannot be read or written.
    """
    fingerprint = source.fingerprint()
    begin = np.array([_boundary(tokenizer)], np.int32)
    digest, done, documents = hashlib.sha256(), 0, 0
    with ShardWriter(folder, (TEXT,), tokenizer.vocab_size, replace=replace) as writer:
        writer.put_beside(tokenizer.save)
        for pieces in _together(source.pieces()):
            encoded = tokenizer.encode_batch([piece.text for piece in pieces])
            for piece, tokens in zip(pieces, encoded, strict=True):
                if piece.begins:
                    if documents:
                        digest.update(_BETWEEN)
                    documents += 1
                    # The size of the first piece beyond this does not depend on the text alone.
                    writer.begin_document(TEXT, zlib.crc32(piece.text[:PIECE_BYTES]))
                    writer.write(TEXT, begin)
                digest.update(piece.text)
                writer.write(TEXT, tokens, len(piece.text))
                done += len(piece.text)
            if on_progress is not None:
                on_progress(done)
        # The target of the last token.
        writer.write(TEXT, begin)
        if source.fingerprint() != fingerprint:
            raise ValueError(f"{source.name} has changed while it was read")
        return writer.finish(fingerprint, tokenizer.sha256, digest.hexdigest())


def tokenize_chats(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    encoder: ChatEncoder,
    on_progress: Callable[[int], None] | None = None,
) -> Index:
    """Turn a source's conversations into tokens on disk, with what is predicted of them.

    All parts of a conversation have one hash, by which it is split later: so they, and its copies,
    are on the same side. Parameters and errors are those of ``tokenize_source``.
    """
    fingerprint = source.fingerprint()
    digest, done = hashlib.sha256(encoder.sha256.encode()), 0
    with ShardWriter(folder, (TEXT, PREDICTED), tokenizer.vocab_size) as writer:
        writer.put_beside(tokenizer.save)
        for messages, parts in encoded(source.conversations(), encoder):
            content = json.dumps(messages).encode()
            digest.update(content + _BETWEEN)
            for part in parts:
                for name, values in ((TEXT, part.tokens), (PREDICTED, part.predicted)):
                    writer.begin_document(name, zlib.crc32(content))
                    writer.write(name, values.astype(np.int32))
            done += len(text_of(messages))
            if on_progress is not None:
                on_progress(done)
        if not done:
            raise ValueError(f"{source.name} holds no text")
        # What follows the last token, and is not predicted.
        for name in (TEXT, PREDICTED):
            writer.write(name, np.zeros(1, np.int32))
        if source.fingerprint() != fingerprint:
            raise ValueError(f"{source.name} has changed while it was read")
        return writer.finish(fingerprint, tokenizer.sha256, digest.hexdigest())


def _boundary(tokenizer: Tokenizer) -> int:
    return tokenizer.bos_token or 0


def _together(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces in lists of about as many bytes as are worth being encoded at once."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        # A piece costs something, however short it is.
        size += len(piece.text) + 64
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokens_of(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress = no_progress,
    encoder: ChatEncoder | None = None,
) -> tuple[Path, Index]:
    """Return the folder of a source's tokens, written if need be, and its index.

    Parameters and errors are those of ``tokenize_source``, or of ``tokenize_chats`` where there is
    an encoder; ``cache`` is the folder of the tokens of all sources.
    """
    fingerprint = source.fingerprint()
    key = {"source": fingerprint, "tokenizer": tokenizer.sha256}
    if encoder is not None:
        key["template"] = encoder.sha256
    folder = cache / cache_key(key)

    def write(folder: Path) -> Index:
        with progress("tokens", source.nbytes) as on_progress:
            if encoder is None:
                index = tokenize_source(source, tokenizer, folder, on_progress)
            else:
                index = tokenize_chats(source, tokenizer, folder, encoder, on_progress)
        trim(cache, folder)
        return index

    index = cached(folder, write, fingerprint, tokenizer.sha256)
    mark_used(folder, name_of(source.files))
    return folder, index


def tokenizer_for(
    source: Source, data: DataConfig, cache: Path, progress: Progress = no_progress
) -> Tokenizer:
    """Return the tokenizer that settings ask for, learned from a text or read from the cache.

    Raises
    ------
    ValueError
        If the text cannot be read, or a library is missing.
    OSError
        If a file cannot be read or written.
    """
    if data.tokenizer == "bytes":
        if data.vocabulary not in (None, 256):
            raise SettingError(
                f"vocabulary is {data.vocabulary}, expected 256 for bytes", "vocabulary"
            )
        return ByteTokenizer()
    size = data.vocabulary
    if size is None and data.tokenizer == "bpe":
        size = _VOCABULARY
    fingerprint = source.fingerprint()
    known = {"source": fingerprint, "kind": data.tokenizer, "size": size}
    folder = cache / f"tokenizer-{cache_key(known)}"
    text = name_of(source.files)
    with contextlib.suppress(OSError, ValueError):
        tokenizer = load_tokenizer(folder)
        mark_used(folder, text)
        return tokenizer
    with progress("vocabulary", min(source.nbytes, _LEARNED_BYTES)) as on_progress:
        pieces = _beginning(source, on_progress)
        if data.tokenizer == "bpe":
            assert size is not None
            tokenizer = train_bpe(pieces, size)
        else:
            tokenizer = character_tokenizer(pieces, size)
    if source.fingerprint() != fingerprint:
        raise ValueError(f"{source.name} has changed while it was read")
    # The folder may be damaged, or another process has just written the same.
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    mark_used(folder, text)
    trim(cache, folder)
    return tokenizer


def _beginning(source: Source, on_progress: Callable[[int], None]) -> Iterator[bytes]:
    done = 0
    for piece in source.pieces():
        yield piece.text
        done += len(piece.text)
        on_progress(done)
        if done >= _LEARNED_BYTES:
            break


def source_corpus(
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    sequence_length: int,
    cache: Path,
    validation: Source | None = None,
    progress: Progress = no_progress,
    encoder: ChatEncoder | None = None,
) -> Corpus:
    """Return a corpus of any text.

    Parameters
    ----------
    source : Source
        The text to train on, and to validate on unless ``validation`` is given.
    tokenizer : Tokenizer
    data : DataConfig
    sequence_length : int
    cache : Path
        The folder of tokens.
    validation : Source, optional
    progress : callable, optional
    encoder : ChatEncoder, optional
        Of texts that are made of conversations.

    Raises
    ------
    ValueError
        If a text is too short, or cannot be read.
    OSError
        If a file cannot be read or written.
    """
    if validation is not None and validation.has_chats != (encoder is not None):
        raise ValueError(
            f"of {source.name} and {validation.name} one holds conversations, the other one text"
        )
    folder, index = tokens_of(source, tokenizer, cache, progress, encoder)
    sha256, remarks = index.sha256, _remarks(source, index)
    if encoder is not None:
        remarks += _cut_chats(source, open_store(folder, index, TEXT), sequence_length)
    if validation is None:
        validation_name = source.name
        split = _split if encoder is None else _split_chats
        sides = [*split(folder, index, source, data, sequence_length)]
    else:
        # Open before the other is written, which may remove what is not in use.
        validation_name, sides = validation.name, [_Side.of(folder, index)]
        folder, index = tokens_of(validation, tokenizer, cache, progress, encoder)
        sides.append(_Side.of(folder, index))
        sha256 = _sha256_of_both(sha256, index.sha256)
        remarks += _remarks(validation, index)
    if encoder is None:
        (training, _), (held_out, _) = sides
        _check_sizes(source.name, training.size, held_out.size, sequence_length, validation_name)
        datasets = _datasets(training, held_out, data, sequence_length, tokenizer.vocab_size)
    else:
        datasets = _chat_datasets(sides, data, sequence_length, tokenizer.vocab_size)
        for name, dataset in zip((source.name, validation_name), datasets, strict=True):
            _check_answers(name, dataset)
    return Corpus(
        source.name,
        *datasets,
        sha256=sha256,
        tokenizer=tokenizer,
        remarks=remarks,
        template=None if encoder is None else encoder.source,
    )


class _Side(NamedTuple):
    """The tokens to train on, or to validate on, and which of them are predicted, if not all."""

    tokens: TokenStore
    predicted: TokenStore | None = None

    @classmethod
    def of(cls, folder: Path, index: Index) -> "_Side":
        """Return all of a folder of tokens."""
        parts = (part for part in (TEXT, PREDICTED) if part in index.parts)
        return cls(*(open_store(folder, index, part) for part in parts))


def _split(
    folder: Path, index: Index, source: Source, data: DataConfig, sequence_length: int
) -> Sequence[_Side]:
    """Return the tokens of a text to train on, and those to validate on."""
    if data.split == "documents" or (data.split == "auto" and source.has_documents):
        parts = split_documents(folder, index, TEXT, data.validation_fraction)
        # A text of few documents, perhaps only one, is cut at its tail.
        if data.split == "documents" or min(part.size for part in parts) > sequence_length:
            for name, part in zip(("training", "validation"), parts, strict=True):
                if part.document_count == 0:
                    raise ValueError(
                        f"{source.name}: by chance no document is for {name}; expected more "
                        "documents, another --validation-fraction, or --split tail"
                    )
            return [_Side(part) for part in parts]
    store = open_store(folder, index, TEXT)
    return [_Side(part) for part in _cut_tail(store, source.name, data, sequence_length)]


def _split_chats(
    folder: Path, index: Index, source: Source, data: DataConfig, sequence_length: int
) -> Sequence[_Side]:
    """Return the conversations to train on, and those to validate on; none is cut."""
    names, share = (TEXT, PREDICTED), data.validation_fraction
    if data.split != "tail":
        parts = [split_documents(folder, index, name, share) for name in names]
        if all(part.document_count for part in parts[0]):
            return [_Side(*side) for side in zip(*parts, strict=True)]
    stores = [open_store(folder, index, name) for name in names]
    count = stores[0].document_count
    if data.split == "documents" or count < 2:
        raise ValueError(
            f"{source.name}: no conversation of {count:,} is left for training or validation; "
            "expected more, another --validation-fraction, or --split tail"
        )
    first = min(max(count - round(count * share), 1), count - 1)
    begins, _ = stores[0].document_bounds(np.array([first]))
    cut = int(begins[0])
    return [
        _Side(*(store.window(0, cut) for store in stores)),
        _Side(*(store.window(cut, store.size) for store in stores)),
    ]


def _check_answers(name: str, dataset: TokenDataset) -> None:
    """Raise ``ValueError`` if no row has anything of an answer."""
    if all((batch.targets == dataset.pad_token).all() for batch in dataset.sweep(1)):
        length = dataset.sequence_length
        raise SettingError(
            f"{name}: no answer begins within the first {length:,} tokens of its conversation: "
            "expected a longer sequence_length",
            "sequence_length",
        )


def _cut_chats(source: Source, store: TokenStore, sequence_length: int) -> tuple[str, ...]:
    """Return a line about conversations that are longer than a row, if there are any."""
    longer = store.longer_documents(sequence_length)
    if not longer:
        return ()
    return (
        f"{source.name}: {longer:,} of {store.document_count:,} conversations are longer than "
        f"{sequence_length:,} tokens, and are cut there: --sequence-length keeps more",
    )


def _remarks(source: Source, index: Index) -> tuple[str, ...]:
    return source.warnings(index.parts[TEXT].documents)


def shard_corpus(
    folder: Path, data: DataConfig, sequence_length: int, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Return a corpus of a folder of tokens that ``tokenize_source`` has written.

    Parameters
    ----------
    folder : Path
    data : DataConfig
    sequence_length : int
    tokenizer : Tokenizer, optional
        The one that the folder has to have.

    Raises
    ------
    ValueError
        If it is damaged, of another tokenizer, or has too few tokens.
    OSError
        If it cannot be read.
    """
    beside = load_tokenizer(folder)
    if tokenizer is not None and tokenizer.sha256 != beside.sha256:
        raise ValueError(f"{folder} has tokens of its own tokenizer, and not of another")
    index = read_index(folder)
    if index.tokenizer != beside.sha256:
        raise ValueError(f"{folder} has tokens of another tokenizer than the one beside them")
    if set(index.parts) != {TEXT}:
        raise ValueError(f"{folder} has the parts {', '.join(index.parts)}, expected {TEXT}")
    store = open_store(folder, index, TEXT)
    training, held_out = _cut_tail(store, folder.name, data, sequence_length)
    return Corpus(
        folder.name,
        *_datasets(training, held_out, data, sequence_length, beside.vocab_size),
        sha256=index.sha256,
        tokenizer=beside,
    )


def _datasets(
    training: TokenStore,
    held_out: TokenStore,
    data: DataConfig,
    sequence_length: int,
    pad_token: int,
) -> tuple[TokenDataset, TokenDataset]:
    return (
        TokenDataset(
            training, sequence_length, pad_token, order=data.order, document_mask=data.document_mask
        ),
        TokenDataset(held_out, sequence_length, pad_token, document_mask=data.document_mask),
    )


def _chat_datasets(
    sides: Sequence[_Side], data: DataConfig, sequence_length: int, pad_token: int
) -> tuple[TokenDataset, TokenDataset]:
    """Return the conversations to train on, and those to validate on, which are always packed."""
    for name in _NOISE:
        if getattr(data, name):
            raise SettingError(f"{name} changes text, and answers are marked in it", name)
    if data.order == "epochs":
        raise SettingError(
            "order is epochs, which cuts conversations: expected packed or buckets", "order"
        )
    order = "packed" if data.order == "windows" else data.order
    training, held_out = sides
    return (
        _chat_dataset(training, sequence_length, pad_token, order),
        _chat_dataset(held_out, sequence_length, pad_token),
    )


def _chat_dataset(
    side: _Side, sequence_length: int, pad_token: int, order: str = "packed"
) -> TokenDataset:
    return TokenDataset(
        *(side.tokens, sequence_length, pad_token),
        order=order,
        document_mask=True,
        predicted=side.predicted,
    )


def _token_file_corpus(
    origin: DataOrigin, data: DataConfig, sequence_length: int, tokenizer: Tokenizer | None
) -> Corpus:
    """Return a corpus of a file of tokens, and perhaps one to validate on."""
    paths = (*origin.paths, *origin.validation_paths)
    tokens, *validation = map(read_token_file, paths)
    _refuse(data, _OF_READING, Kind.TOKEN_FILE)
    if tokenizer is not None and tokenizer.kind in ("chars", "bpe"):
        raise ValueError(f"{paths[0]} has tokens of another program, and not of a tokenizer's")
    # The vocabulary of a run that is resumed is known.
    headless = tokenizer is None and any(
        token_file_info(path).format == "nanoGPT" for path in paths
    )
    most = NANOGPT_TOKENS if headless else _MOST_TOKENS
    corpus = token_corpus(
        tokens, origin.name, data, sequence_length, validation[0] if validation else None, most
    )
    # A vocabulary that is known needs no remark.
    return corpus if tokenizer is None else replace(corpus, remarks=())


def token_corpus(
    tokens: Integers,
    name: str,
    data: DataConfig,
    sequence_length: int,
    validation: Integers | None = None,
    most: int = _MOST_TOKENS,
) -> Corpus:
    """Return a corpus of tokens of another program, whose text is not known.

    Parameters
    ----------
    tokens : uint16[N] or uint32[N]
        Tokens to train on, and to validate on unless ``validation`` is given.
    name : str
    data : DataConfig
    sequence_length : int
    validation : uint16[N] or uint32[N], optional
    most : int
        The largest vocabulary that need not be named.

    Raises
    ------
    ValueError
        If there are too few, or one is outside the vocabulary.
    """
    highest, sha256 = _highest_and_sha256(tokens)
    where = name
    if validation is None:
        training, held_out = _cut_tail(TokenStore([tokens]), name, data, sequence_length)
    else:
        training, held_out = TokenStore([tokens]), TokenStore([validation])
        other, other_sha256 = _highest_and_sha256(validation)
        if other > highest:
            highest, where = other, "the validation set"
        sha256 = _sha256_of_both(sha256, other_sha256)
        _check_sizes(name, training.size, held_out.size, sequence_length)
    size = highest + 1 if data.vocabulary is None else data.vocabulary
    if highest >= _MOST_TOKENS:
        raise ValueError(f"{where} has token {highest}, expected 0 to {_MOST_TOKENS - 1}")
    if highest >= size:
        raise ValueError(f"{where} has token {highest}, expected 0 to {size - 1}: see --vocab-size")
    if data.vocabulary is None and size > most:
        raise ValueError(
            f"{where} has no header and numbers up to {highest:,}, which are hardly tokens: "
            f"expected less than {most:,}; --vocab-size {size} takes them for tokens"
        )
    named = "" if data.vocabulary else ", as the highest token says; --vocab-size names another"
    remark = f"{name}: {training.size + held_out.size:,} tokens of a vocabulary of {size:,}{named}"
    return Corpus(
        name,
        *_datasets(training, held_out, data, sequence_length, size),
        sha256=sha256,
        tokenizer=UnknownTokenizer(size),
        remarks=(remark,),
    )


def _highest_and_sha256(tokens: Integers) -> tuple[int, str]:
    """Return the highest token, and the SHA-256 of all."""
    highest, digest = 0, hashlib.sha256()
    for first in range(0, tokens.size, _TOGETHER):
        some = tokens[first : first + _TOGETHER]
        highest = max(highest, int(some.max()))
        digest.update(some.tobytes())
    return highest, digest.hexdigest()


def _sha256_of_both(training: str, held_out: str) -> str:
    return hashlib.sha256((training + held_out).encode()).hexdigest()


def _cut_tail(
    store: TokenStore, name: str, data: DataConfig, sequence_length: int
) -> tuple[TokenStore, TokenStore]:
    """Return the tokens to train on, and the tail to validate on."""
    share, cut = data.validation_fraction, _tail_of(store.size, data.validation_fraction)
    if min(cut, store.size - cut) <= sequence_length:
        needed = int((sequence_length + 0.5) / min(share, 1.0 - share))
        while min(_tail_of(needed, share), needed - _tail_of(needed, share)) <= sequence_length:
            needed += 1
        raise ValueError(
            f"{name} has {store.size} tokens, too few for sequences of {sequence_length}: "
            f"expected at least {needed}"
        )
    return store.window(0, cut), store.window(cut, store.size)


def _tail_of(size: int, share: float) -> int:
    """Return where the tail of a text begins."""
    return size - round(size * share)


def _check_sizes(
    name: str,
    training: int,
    held_out: int,
    sequence_length: int,
    validation_name: str | None = None,
) -> None:
    for whose, size, purpose in (
        (name, training, "learn from"),
        (validation_name or name, held_out, "validate on"),
    ):
        if size <= sequence_length:
            raise ValueError(
                f"{whose} has {size} tokens to {purpose}, too few for sequences of "
                f"{sequence_length}: expected at least {sequence_length + 1}"
            )


def text_corpus(
    text: bytes, name: str, sequence_length: int, pad_token: int, share: float = 0.1
) -> Corpus:
    """Return a corpus of the bytes of a text in memory, of which the tail is to validate on.

    Raises
    ------
    ValueError
        If the text is too short for one sequence of each.
    """
    tokens = tokenize_text(text)
    held_out = int(tokens.size * share)
    if held_out <= sequence_length:
        needed = round((sequence_length + 1) / share)
        raise ValueError(
            f"{name} has {tokens.size} bytes, too few for sequences of {sequence_length}: "
            f"expected at least {needed}"
        )
    cut = tokens.size - held_out
    return Corpus(
        name,
        TokenDataset(TokenStore([tokens[:cut]]), sequence_length, pad_token),
        TokenDataset(TokenStore([tokens[cut:]]), sequence_length, pad_token),
        sha256=hashlib.sha256(text).hexdigest(),
        origin=DataOrigin(name),
    )


# --- The bundled stories --------------------------------------------------------------------------


def story_corpus(
    count: int, held_out: int, seed: int, sequence_length: int, pad_token: int
) -> Corpus:
    """Return a corpus of bundled stories.

    A sequence begins with the line break before a story, so that a model sees each story from its
    start; in training it runs on into the next ones, in validation it ends with its own.

    Parameters
    ----------
    count, held_out : int
        The numbers of stories to train on, and of more to validate on.
    seed : int
    sequence_length : int
        T; a story of more characters is cut.
    pad_token : int
    """
    generated = stories.generate_stories(count + held_out, seed)
    others = generated[count:]
    tokens, starts, _ = _lines(generated[:count])
    training = TokenDataset(TokenStore([tokens]), sequence_length, pad_token, starts)
    tokens, starts, stops = _lines(others)
    validation = TokenDataset(TokenStore([tokens]), sequence_length, pad_token, starts, stops)
    return Corpus(
        f"{count:,} stories",
        training,
        validation,
        stories.entropy_per_character(),
        tuple(others),
        hashlib.sha256(stories.corpus(generated).encode()).hexdigest(),
    )


def _lines(some: Sequence[str]) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """Return stories as tokens, and where each begins and ends, line breaks on both sides."""
    tokens = tokenize_text("\n" + stories.corpus(list(some)))
    sizes = np.array([len(story) + 1 for story in some])
    stops = np.cumsum(sizes) + 1
    return tokens, stops - sizes - 1, stops
