"""What a run learns from and is measured on: from texts, over tokens on disk, to datasets."""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from pathlib import Path

import numpy as np

from legacy1bit.data import stories
from legacy1bit.data.cache import mark_used, text_of, trim
from legacy1bit.data.shards import (
    Index,
    Integers,
    ShardWriter,
    TokenStore,
    cache_key,
    cached,
    open_store,
    read_index,
)
from legacy1bit.data.sources import PIECE_BYTES, Piece, Source
from legacy1bit.data.tokenizer import ByteTokenizer, Tokenizer, UnknownTokenizer
from legacy1bit.data_utils import Tokens, tokenize_text
from legacy1bit.dataset import TokenDataset
from legacy1bit.hyperparams import DataConfig

TEXT, TRAINING, VALIDATION = "text", "training", "validation"

# Pieces are encoded together until they have so many bytes: enough for every core, and no more
# than a few megabytes.
_TOGETHER = 4 << 20

# What a token of another program's may be at most; a model has no room for more.
_MOST_TOKENS = 1 << 20

# What stands between documents where they are hashed: no byte of UTF-8.
_BETWEEN = b"\xff"


@dataclass(frozen=True)
class Corpus:
    """What a run learns from and is measured on.

    Attributes
    ----------
    name : str
    training, validation : TokenDataset
    floor : float or None
        The lowest loss any model can reach on the validation set, in nats a token, where that is
        known.
    stories : tuple of str
        The stories of the validation set, where it is made of the bundled ones.
    sha256 : str
        Of the text of both sets, in hexadecimal digits; of one file of UTF-8, that of the file.
    tokenizer : Tokenizer
    remarks : tuple of str
        Lines about the text that its user should read.
    """

    name: str
    training: TokenDataset
    validation: TokenDataset
    floor: float | None = None
    stories: tuple[str, ...] = ()
    sha256: str = ""
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    remarks: tuple[str, ...] = ()


# --- Texts ----------------------------------------------------------------------------------------


def tokenize_source(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    share: float = 0.0,
    on_progress: Callable[[int], None] | None = None,
    replace: bool = True,
) -> Index:
    """Turn a source's text into tokens on disk, a few megabytes at a time.

    Parameters
    ----------
    source : Source
    tokenizer : Tokenizer
    folder : Path
        Where to; written as a whole or not at all.
    share : float
        How many of the documents are for validation; 0: all go to one part, ``text``. A document's
        beginning decides, so that copies of one are on the same side.
    on_progress : callable, optional
        Gets how many bytes of text have been dealt with.
    replace : bool
        Whether what is there already may go.

    Raises
    ------
    ValueError
        If the source cannot be read as text, or has changed meanwhile.
    OSError
        If a file cannot be read or written.
    """
    fingerprint = source.fingerprint()
    parts = (TRAINING, VALIDATION) if share else (TEXT,)
    begin = np.array([_boundary(tokenizer)], np.int32)
    digest, done, documents, part = hashlib.sha256(), 0, 0, parts[0]
    with ShardWriter(folder, parts, tokenizer.vocab_size, replace=replace) as writer:
        writer.put_beside(tokenizer.save)
        for pieces in _together(source.pieces()):
            encoded = tokenizer.encode_batch([piece.text for piece in pieces])
            for piece, tokens in zip(pieces, encoded, strict=True):
                if piece.begins:
                    if documents:
                        digest.update(_BETWEEN)
                    documents += 1
                    if share:
                        # How much more than this the first piece has is not up to the text alone.
                        part = parts[zlib.crc32(piece.text[:PIECE_BYTES]) < share * 2**32]
                    writer.begin_document(part)
                    writer.write(part, begin)
                digest.update(piece.text)
                writer.write(part, tokens, len(piece.text))
                done += len(piece.text)
            if on_progress is not None:
                on_progress(done)
        for name in parts:
            # What the last token of a part is followed by.
            writer.write(name, begin)
        if source.fingerprint() != fingerprint:
            raise ValueError(f"{source.name} has changed while it was read")
        return writer.finish(fingerprint, tokenizer.sha256, digest.hexdigest())


def _boundary(tokenizer: Tokenizer) -> int:
    return tokenizer.bos_token or 0


def _together(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces in lists of about so many bytes as are worth being encoded at once."""
    found: list[Piece] = []
    size = 0
    for piece in pieces:
        found.append(piece)
        # A piece costs something, however short it is.
        size += len(piece.text) + 64
        if size >= _TOGETHER:
            yield found
            found, size = [], 0
    if found:
        yield found


def tokens_of(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    share: float = 0.0,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Path, Index]:
    """Return where a source's tokens lie on disk, and what they are; written where need be.

    Parameters and errors are those of ``tokenize_source``; ``cache`` is a folder for tokens of all
    sources.
    """
    fingerprint = source.fingerprint()
    known = {"source": fingerprint, "tokenizer": tokenizer.sha256, "share": share}
    folder = cache / cache_key(known)

    def write(folder: Path) -> Index:
        index = tokenize_source(source, tokenizer, folder, share, on_progress)
        trim(cache, folder)
        return index

    index = cached(folder, write, fingerprint, tokenizer.sha256)
    mark_used(folder, text_of(source.files))
    return folder, index


def source_corpus(
    source: Source,
    tokenizer: Tokenizer,
    data: DataConfig,
    sequence_length: int,
    pad_token: int,
    cache: Path,
    validation: Source | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Return a corpus of any text.

    Parameters
    ----------
    source : Source
        What to learn, and to validate on unless ``validation`` is given.
    tokenizer : Tokenizer
    data : DataConfig
    sequence_length, pad_token : int
    cache : Path
        Where tokens are kept.
    validation : Source, optional
    on_progress : callable, optional
        Gets how many bytes of text have been turned into tokens.

    Raises
    ------
    ValueError
        If a text is too short, or cannot be read.
    OSError
        If a file cannot be read or written.
    """
    by_documents = validation is None and (
        data.split == "documents" or (data.split == "auto" and source.has_documents)
    )
    share = data.validation_fraction if by_documents else 0.0
    folder, index = tokens_of(source, tokenizer, cache, share, on_progress)
    sha256, remarks = index.sha256, _remarks(source, index)
    if validation is not None:
        learned = open_store(folder, index, TEXT)
        kept_folder, kept_index = tokens_of(validation, tokenizer, cache)
        kept = open_store(kept_folder, kept_index, TEXT)
        sha256 = _sha256_of_both(sha256, kept_index.sha256)
        remarks += _remarks(validation, kept_index)
    elif by_documents:
        small = min(index.parts.values(), key=lambda part: part.tokens)
        if data.split == "auto" and small.tokens <= sequence_length:
            # There are few documents, perhaps only one.
            data = changed(data, split="tail")
            return source_corpus(
                source, tokenizer, data, sequence_length, pad_token, cache, None, on_progress
            )
        for name, part in index.parts.items():
            if part.documents == 0:
                raise ValueError(
                    f"{source.name}: by chance no document is for {name}; expected more documents, "
                    "another --validation-fraction, or --split tail"
                )
        learned, kept = (open_store(folder, index, name) for name in (TRAINING, VALIDATION))
    else:
        store = open_store(folder, index, TEXT)
        learned, kept = _cut_tail(store, source.name, data, sequence_length)
    kept_name = source.name if validation is None else validation.name
    _check_sizes(source.name, learned.size, kept.size, sequence_length, kept_name)
    return Corpus(
        source.name,
        *_datasets(learned, kept, data, sequence_length, pad_token),
        sha256=sha256,
        tokenizer=tokenizer,
        remarks=remarks,
    )


def _remarks(source: Source, index: Index) -> tuple[str, ...]:
    warning = source.warning(sum(part.documents for part in index.parts.values()))
    return () if warning is None else (warning,)


def shard_corpus(
    folder: Path, tokenizer: Tokenizer, data: DataConfig, sequence_length: int
) -> Corpus:
    """Return a corpus of a folder of tokens that ``tokenize_source`` has written.

    Raises
    ------
    ValueError
        If it is damaged, of another tokenizer, or has too few tokens.
    OSError
        If it cannot be read.
    """
    index = read_index(folder)
    if index.tokenizer != tokenizer.sha256:
        raise ValueError(f"{folder} has tokens of another tokenizer than the one beside them")
    if set(index.parts) != {TEXT}:
        raise ValueError(f"{folder} has the parts {', '.join(index.parts)}, expected {TEXT}")
    store = open_store(folder, index, TEXT)
    learned, kept = _cut_tail(store, folder.name, data, sequence_length)
    return Corpus(
        folder.name,
        *_datasets(learned, kept, data, sequence_length, tokenizer.vocab_size),
        sha256=index.sha256,
        tokenizer=tokenizer,
    )


def _datasets(
    learned: TokenStore, kept: TokenStore, data: DataConfig, sequence_length: int, pad_token: int
) -> tuple[TokenDataset, TokenDataset]:
    return (
        TokenDataset(
            learned, sequence_length, pad_token, order=data.order, apart=data.document_mask
        ),
        TokenDataset(kept, sequence_length, pad_token, apart=data.document_mask),
    )


def token_corpus(
    tokens: Integers,
    name: str,
    data: DataConfig,
    sequence_length: int,
    validation: Integers | None = None,
    most: int = _MOST_TOKENS,
) -> Corpus:
    """Return a corpus of tokens that another program has made: what they stand for is not known.

    Parameters
    ----------
    tokens : uint16[N] or uint32[N]
        What to learn, and to validate on unless ``validation`` is given.
    name : str
    data : DataConfig
    sequence_length : int
    validation : uint16[N] or uint32[N], optional
    most : int
        The largest vocabulary that need not be named.

    Raises
    ------
    ValueError
        If there are too few, or one is none of the vocabulary.
    """
    highest, sha256 = _look_at(tokens)
    where = name
    if validation is None:
        learned, kept = _cut_tail(TokenStore([tokens]), name, data, sequence_length)
    else:
        learned, kept = TokenStore([tokens]), TokenStore([validation])
        other, kept_sha256 = _look_at(validation)
        if other > highest:
            highest, where = other, "the validation set"
        sha256 = _sha256_of_both(sha256, kept_sha256)
        _check_sizes(name, learned.size, kept.size, sequence_length)
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
    remark = f"{name}: {learned.size + kept.size:,} tokens of a vocabulary of {size:,}{named}"
    return Corpus(
        name,
        *_datasets(learned, kept, data, sequence_length, size),
        sha256=sha256,
        tokenizer=UnknownTokenizer(size),
        remarks=(remark,),
    )


def _look_at(tokens: Integers) -> tuple[int, str]:
    """Return the highest token, and the SHA-256 of all."""
    highest, digest = 0, hashlib.sha256()
    for first in range(0, tokens.size, _TOGETHER):
        some = tokens[first : first + _TOGETHER]
        highest = max(highest, int(some.max()))
        digest.update(some.tobytes())
    return highest, digest.hexdigest()


def _sha256_of_both(learned: str, kept: str) -> str:
    return hashlib.sha256((learned + kept).encode()).hexdigest()


def _cut_tail(
    store: TokenStore, name: str, data: DataConfig, sequence_length: int
) -> tuple[TokenStore, TokenStore]:
    """Return what is to be learned, and the tail, which validates."""
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
    name: str, learned: int, kept: int, sequence_length: int, kept_name: str | None = None
) -> None:
    for whose, size, purpose in (
        (name, learned, "learn from"),
        (kept_name or name, kept, "validate on"),
    ):
        if size <= sequence_length:
            raise ValueError(
                f"{whose} has {size} tokens to {purpose}, too few for sequences of "
                f"{sequence_length}: expected at least {sequence_length + 1}"
            )


def text_corpus(
    text: bytes, name: str, sequence_length: int, pad_token: int, share: float = 0.1
) -> Corpus:
    """Return a corpus of the bytes of a text in memory: its first part to learn, its tail to
    validate.

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
        How many stories to learn from, and how many more to validate on.
    seed : int
    sequence_length : int
        T; a story of more characters is cut.
    pad_token : int
    """
    told = stories.generate_stories(count + held_out, seed)
    learned, kept = told[:count], told[count:]
    tokens, starts, _ = _lines(learned)
    training = TokenDataset(TokenStore([tokens]), sequence_length, pad_token, starts)
    tokens, starts, stops = _lines(kept)
    validation = TokenDataset(TokenStore([tokens]), sequence_length, pad_token, starts, stops)
    return Corpus(
        f"{count:,} stories",
        training,
        validation,
        stories.entropy_per_character(),
        tuple(kept),
        hashlib.sha256(stories.corpus(told).encode()).hexdigest(),
    )


def _lines(told: Sequence[str]) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """Return stories as tokens, and where each begins and ends, line breaks on both sides."""
    tokens = tokenize_text("\n" + stories.corpus(list(told)))
    sizes = np.array([len(story) + 1 for story in told])
    stops = np.cumsum(sizes) + 1
    return tokens, stops - sizes - 1, stops
