"""Fuzzing of all that reads files which strangers may send.

    python tests/fuzz/fuzz.py TARGET [libFuzzer's options] [folders of inputs]
    python tests/fuzz/fuzz.py all SECONDS
    python tests/fuzz/fuzz.py corpus [TARGET FILE ...]

looks for faults in one reader, or in all for some seconds with a line about each, or writes the
archives of inputs in ``corpus``: makes those again that are whole files of small models, and adds
files to the inputs of a target.

An input is one or more parts with ``SPLIT`` between them, of which a target makes files for its
reader. The word "right" in a part stands for the length or the checksum that fits what is there, so
that a change gets past those. What a reader may raise is a ``ValueError`` or an ``OSError`` of one
line that names the file; all else is a fault, and so is what ``FORBIDDEN``, ``PATHS`` and
``Memory`` watch for.
"""

import atexit
import bz2
import contextlib
import functools
import gc
import gzip
import io
import json
import lzma
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

FUZZING = __name__ == "__main__" and sys.argv[1:2] != ["corpus"]
if FUZZING:
    try:
        import atheris
    except ImportError:
        sys.exit("fuzzing needs atheris, which is not installed: pip install atheris")
    watched: Any = atheris.instrument_imports(include=["legacy1bit", "tomllib"])
else:
    watched = contextlib.nullcontext()

with watched:
    import legacy1bit.model
    from legacy1bit.config_files import read_config, records_of
    from legacy1bit.data import bpe, shards, sources, tokenizer, tokenizer_files
    from legacy1bit.data.origin import DataOrigin
    from legacy1bit.data.published_tokenizer import PublishedTokenizer
    from legacy1bit.formats import adapters, published
    from legacy1bit.formats.c_v1 import export_c_v1, import_c_v1
    from legacy1bit.formats.ggml import load_gguf
    from legacy1bit.formats.gguf import export_gguf, import_gguf, import_gguf_tokenizer
    from legacy1bit.formats.hugging_face import export_hugging_face, import_hugging_face
    from legacy1bit.forward import forward_llm_batch
    from legacy1bit.hyperparams import ARCHITECTURES, DataConfig, ModelConfig, TrainingConfig
    from legacy1bit.inference import Decoder
    from legacy1bit.logger import StepLog, read_metrics
    from legacy1bit.model import LegacyLLM, create_legacy_llm, load_model, save_model
    from legacy1bit.packed import PackedModel
    from legacy1bit.reports.records import read_records
    from legacy1bit.search.space import read_space
    from legacy1bit.search.study import DATABASE_FILE, STUDY_FILE, StudyRecord
    from legacy1bit.system.errors import describe
    from legacy1bit.training import checkpoint
    from legacy1bit.training.run import Run, RunSettings

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
FOUND = HERE.parents[1] / "build" / "fuzzing"
ROOM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

SPLIT = b"\n%%%%\n"

# The longest line that is one error, the folder's name in it included.
LONGEST = 2200

# The most that one input may take: bytes beyond what the process has anyway, and so many for each
# of its own; and seconds. What decompresses text holds up to 16 MiB of it several times.
ROOM_BYTES, BYTES_A_BYTE, SECONDS = 16 << 20, 200, 10
MORE_ROOM = {"documents": 96 << 20, "parquet": 96 << 20}

# As long as an input may get.
LONGEST_INPUT = 1 << 14

TINY = ModelConfig(
    vocab_size=3, model_dim=2, num_blocks=1, num_heads=1, ffn_multiplier=1, sequence_length=2
)
SETTINGS = RunSettings(TINY, TrainingConfig(), DataConfig(), {"name": "text"}).fixed()

SUBWORDS = tokenizer.SubwordTokenizer([(b"a", b"b"), (b"ab", b"c")])

# What comes of taking an input's JSON for something that it is not.
WRONG = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class FaultError(Exception):
    """A reader has broken a promise."""


# --- Files of parts -------------------------------------------------------------------------------


def parsed(part: bytes) -> Any:
    """Return what a part says if it is JSON, else None."""
    try:
        return json.loads(part)
    except (ValueError, RecursionError):
        return None


def right(told: Any, /, **answers: Any) -> Any:
    """Return a JSON object with the answers in place of the word "right"."""
    if not isinstance(told, dict):
        return told
    return {
        key: answers[key] if key in answers and value == "right" else value
        for key, value in told.items()
    }


def tensor_file(header: bytes, data: bytes, /, **answers: Any) -> bytes:
    """Return a safetensors file; the data is as long as the header says, up to some kilobytes."""
    told = parsed(header)
    if isinstance(told, dict) and "__metadata__" in told:
        told["__metadata__"] = right(told["__metadata__"], **answers)
        header = json.dumps(told).encode()
    ends = re.findall(rb'"data_offsets": ?\[\d+, ?(\d{1,4})\]', header)
    size = max(map(int, ends), default=len(data))
    return struct.pack("<Q", len(header)) + header + data.ljust(size, b"\0")[:size]


_FORMATS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}


def gguf_file(parts: list[bytes]) -> bytes:
    """Return a GGUF file: the only part, or what the first tells of its head and the rest's data.

    That tells of each key its name, type and value, and of each tensor its name, shape, type and
    offset.
    """

    def text(told: Any) -> bytes:
        raw: bytes = told.encode(errors="replace")
        return struct.pack("<Q", len(raw)) + raw

    def value(kind: Any, told: Any) -> bytes:
        if kind == 8:
            return text(told)
        if kind == 9:
            inner, items = told
            return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, x) for x in items)
        return struct.pack("<" + _FORMATS[kind], told)

    told = parsed(parts[0])
    try:
        keys, tensors = told["keys"], told["tensors"]
        raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
        for name, kind, content in keys:
            raw += text(name) + struct.pack("<I", kind) + value(kind, content)
        for name, shape, kind, offset in tensors:
            raw += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            raw += struct.pack("<IQ", kind, offset)
    except (struct.error, *WRONG):
        return parts[0]
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + b"".join(parts[1:]).ljust(2048, b"\0")


def tokenizer_file(part: bytes) -> bytes:
    """Return a tokenizer's file: the part, but the whole file if that is a list of merges."""
    merges = parsed(part)
    try:
        made = [left + last for left, last in merges]
        joined = dict.fromkeys([*tokenizer.visible_bytes(), *made])
        special = enumerate(tokenizer.SPECIAL_TOKENS, len(joined))
        return json.dumps(tokenizer._description(joined, merges, special, True)).encode()
    except WRONG:
        return part


def index_file(part: bytes, documents: bytes, tokens: bytes) -> bytes:
    """Return an index of tokens with what is right for those of its part "text"."""
    told = parsed(part)
    if not isinstance(told, dict):
        return part
    if isinstance(told.get("parts"), dict):
        size = {"|u1": 1, "<u2": 2, "<u4": 4}.get(str(told.get("dtype")), 1)
        about = right(
            told["parts"].get("text"),
            tokens=len(tokens) // size,
            documents=len(documents) // 8,
            tokens_crc=zlib.crc32(tokens),
            documents_crc=zlib.crc32(documents),
        )
        told["parts"] = {name: about if name == "text" else x for name, x in told["parts"].items()}
    rest = {key: value for key, value in told.items() if key != "crc"}
    return json.dumps(right(told, crc=shards._crc_of(rest))).encode()


# --- Targets --------------------------------------------------------------------------------------


def put(path: Path, content: bytes) -> None:
    """Write a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(file, content)
    os.close(file)


def use_model(model: LegacyLLM, packed: PackedModel | None) -> None:
    """Have a model read two tokens, and write two."""
    two = np.arange(2) % model.config.vocab_size
    length = min(model.config.sequence_length, 3)
    forward_llm_batch(model, two[None, :length])
    if packed is None:
        return
    decoder = Decoder(packed, 1, length)
    # What sound weights come to need not be finite, which says so without the file's name.
    with contextlib.suppress(ValueError):
        decoder.generate(two[: max(length - 1, 1)], np.array([0.1, 0.9][:length]))


def fuzz_c_v1(folder: Path, parts: list[bytes]) -> None:
    """A file of the C original, and its provenance."""
    for name, part in zip(("model.bin", "model.bin.json"), parts, strict=False):
        put(folder / name, part)
    model = import_c_v1(folder / "model.bin")
    model.provenance.lines()
    use_model(model, PackedModel(model))


def put_model(folder: Path, parts: list[bytes]) -> None:
    """Write settings and weights: a header and data, or one part as it is."""
    put(folder / "config.json", parts[0])
    weights = b"".join(parts[1:])
    if len(parts) > 2:
        config = parts[0].decode(errors="replace")
        weights = tensor_file(parts[1], b"".join(parts[2:]), config=config)
    put(folder / "model.safetensors", weights)


def fuzz_model(folder: Path, parts: list[bytes]) -> None:
    """A model folder."""
    put_model(folder, parts)
    model = load_model(folder)
    model.provenance.lines()
    # Matrices of floats cannot be packed.
    use_model(model, None if model.config.scheme == "float" else PackedModel.load(folder))


def fuzz_hugging_face(folder: Path, parts: list[bytes]) -> None:
    """A folder for transformers."""
    put_model(folder, parts)
    model = import_hugging_face(folder)
    model.provenance.lines()
    use_model(model, None if model.config.scheme == "float" else PackedModel(model))


def fuzz_gguf(folder: Path, parts: list[bytes]) -> None:
    """A model as GGUF."""
    put(folder / "model.gguf", gguf_file(parts))
    model = import_gguf(folder / "model.gguf")
    model.provenance.lines()
    use_model(model, PackedModel(model))


def fuzz_published_gguf(folder: Path, parts: list[bytes]) -> None:
    """A model of others as GGUF."""
    put(folder / "model.gguf", gguf_file(parts))
    use_published(folder / "model.gguf")


def fuzz_published_folder(folder: Path, parts: list[bytes]) -> None:
    """Settings and weights of others: a header and data, or an index and several of them."""
    config, *rest = parts
    put(folder / "config.json", config)
    if len(rest) < 3:
        put(folder / "model.safetensors", b"".join(rest) if len(rest) < 2 else tensor_file(*rest))
    else:
        put(folder / "model.safetensors.index.json", rest[0])
        for number, (header, data) in enumerate(zip(rest[1::2], rest[2::2], strict=False)):
            put(folder / f"{number}.safetensors", tensor_file(header, data))
    use_published(folder)


def fuzz_adapter(folder: Path, parts: list[bytes]) -> None:
    """An adapter: PEFT's settings and weights, a header and data; or a GGUF file."""
    config = ModelConfig.from_dict({**TINY.to_dict(), **ARCHITECTURES["llama"]})
    if len(parts) == 3:
        put(folder / adapters.ADAPTER_CONFIG_FILE, parts[0])
        put(folder / adapters.ADAPTER_FILE, tensor_file(*parts[1:]))
        found = adapters.read_adapter(folder, config)
    else:
        put(folder / "adapter.gguf", gguf_file(parts))
        found = adapters.read_adapter(folder / "adapter.gguf", config)
    adapters.check_adapter(config, adapters.combine([(found, 1.0)]))


def use_published(path: Path) -> None:
    """Have a model of others, its tokenizer and its chat template read."""
    model = load_model(path)
    use_model(model, PackedModel(model))
    found = published.read_tokenizer(path, model.config.vocab_size)
    published.read_template(path, found)
    use_published_tokenizer(found)


def fuzz_published_tokenizer(folder: Path, parts: list[bytes]) -> None:
    """The tokenizer of a model of others: in GGUF, or as Hugging Face's files."""
    if len(parts) > 2 or not parts[0].lstrip().startswith(b'{"version"'):
        put(folder / "model.gguf", gguf_file(parts))
        use_published_tokenizer(
            published.read_tokenizer(folder / "model.gguf", SUBWORDS.vocab_size)
        )
    else:
        put(folder / "tokenizer.json", parts[0])
        if parts[1:]:
            put(folder / "tokenizer_config.json", parts[1])
        use_published_tokenizer(PublishedTokenizer.of_folder(folder))


def use_published_tokenizer(found: tokenizer.Tokenizer) -> None:
    """Have texts encoded, and all tokens decoded; and the same once it was written as GGUF keys."""
    if not isinstance(found, PublishedTokenizer):
        return
    # A vocabulary of others may lack bytes.
    with contextlib.suppress(IndexError):
        found.encode_special("<s>a\u00e9 \n12")
        found.decode(found.encode(bytes(range(256))))
    found.decode(np.arange(found.vocab_size))
    # Not all can be, which is said without the file's name.
    keys = None
    with contextlib.suppress(ValueError):
        keys = found.gguf_keys()
    if keys is not None:
        try:
            again = PublishedTokenizer.of_gguf(keys, found.vocab_size)
        except ValueError as error:
            raise FaultError(f"its keys are refused: {error}") from error
        if again.stop_tokens[:1] != found.stop_tokens[:1] or again.bos_token != found.bos_token:
            raise FaultError("its keys begin and end texts with other tokens")


def fuzz_gguf_tokenizer(folder: Path, parts: list[bytes]) -> None:
    """The tokenizer in such a file."""
    put(folder / "model.gguf", gguf_file(parts))
    use_tokenizer(import_gguf_tokenizer(folder / "model.gguf"))


def fuzz_tokenizer(folder: Path, parts: list[bytes]) -> None:
    """A tokenizer's file, or its merges."""
    put(folder / "tokenizer.json", tokenizer_file(parts[0]))
    use_tokenizer(tokenizer_files.load_tokenizer(folder))


def use_tokenizer(found: tokenizer.Tokenizer) -> None:
    """Have a text encoded and come back."""
    text = bytes(range(min(found.vocab_size, 256))) * 2
    if found.decode(found.encode(text)) != text:
        raise FaultError("a text does not come back")


def fuzz_settings(folder: Path, parts: list[bytes]) -> None:
    """A file of settings: TOML, or the C original's."""
    path = folder / "settings.toml"
    put(path, parts[0])
    records_of(read_config(path), path)


def fuzz_run(folder: Path, parts: list[bytes]) -> None:
    """A run's settings, and what else its folder may have."""
    for name, part in zip(("training.json", "config.json"), parts, strict=False):
        put(folder / name, part)
    if len(parts) > 1:
        read_config(folder / "config.json")
    records_of(read_config(folder), folder)
    told = Run(folder).settings()
    told.fixed()
    try:
        origin = told.origin
    except ValueError:
        # It does not name the file: another place does.
        return
    if json.dumps(DataOrigin.from_dict(origin.to_dict()).to_dict()) != json.dumps(origin.to_dict()):
        raise FaultError("where a text comes from does not come back")


def fuzz_space(folder: Path, parts: list[bytes]) -> None:
    """Where to look for the best settings."""
    path = folder / "space.toml"
    put(path, parts[0])
    for dimension in read_space(path):
        # What there is no end of says so, without the file's name.
        with contextlib.suppress(ValueError):
            dimension.contains(dimension.values()[-1])


def fuzz_shards(folder: Path, parts: list[bytes]) -> None:
    """An index, where documents begin, and shards."""
    index, documents, *tokens = [*parts, b"", b""][: max(len(parts), 2)]
    put(folder / "index.json", index_file(index, documents, b"".join(tokens)))
    put(folder / "text.documents", documents)
    for number, part in enumerate(tokens):
        put(folder / f"text-{number:05}.tokens", part)
    found = shards.read_index(folder)
    for name in found.parts:
        use_store(shards.open_store(folder, found, name))


def use_store(store: shards.TokenStore) -> None:
    """Read tokens and documents as batches do."""
    store.read(0, 1000)
    if store.size < 2:
        return
    begins, ends = store.document_bounds(np.arange(min(store.document_count, 50)))
    store.rows(begins, ends, 4, 0)
    window = store.window(1, store.size)
    window.document_begins(np.zeros(1, np.int64), 3)
    window.document_bounds(np.arange(min(window.document_count, 50)))


def fuzz_token_file(folder: Path, parts: list[bytes]) -> None:
    """A file of another program's tokens: its header, zeros up to that one's end, tokens."""
    content = parts[0] if len(parts) < 2 else parts[0].ljust(1024, b"\0") + parts[1]
    put(folder / "tokens.bin", content)
    sources.token_file_info(folder / "tokens.bin")
    use_store(shards.TokenStore([sources.read_token_file(folder / "tokens.bin")]))


def fuzz_checkpoint(folder: Path, parts: list[bytes]) -> None:
    """The header of a checkpoint and its data, or one part as it is."""
    path = folder / "checkpoint.safetensors"
    content = parts[0]
    if len(parts) > 1:
        header, data = parts[0], b"".join(parts[1:])
        none = "0" * 8
        tables = {table: json.dumps(values) for table, values in SETTINGS.items()}
        content = tensor_file(header, data, **tables, crc32=none)
        with contextlib.suppress(*checkpoint.DAMAGE):
            (length,) = struct.unpack_from("<Q", content)
            told = json.loads(content[8 : 8 + length])["__metadata__"]
            if told["crc32"] == none:
                crc32 = checkpoint._checksum(told, load(content))
                content = tensor_file(header, data, **tables, crc32=crc32)
    put(path, content)
    checkpoint.read_checkpoint(path, SETTINGS)


def fuzz_metrics(folder: Path, parts: list[bytes]) -> None:
    """The records of a run, and going on with them."""
    path = folder / "metrics.jsonl"
    put(path, parts[0])
    records = read_metrics(path)
    StepLog(path, 1 << 70)
    if len(read_metrics(path)) > len(records):
        raise FaultError("going on with a run makes records")
    run = read_records(Run(folder))
    run.column("train_loss")
    run.train_losses()
    run.losses()
    for matrix in run.matrices():
        for code in run.codes():
            run.fraction(matrix, code)
    if run.unit not in ("character", "token"):
        raise FaultError(f"a loss of a {run.unit}")


TEXTS = (
    *("a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"),
    *("a.json", "a", "a.txt.xz", "a.json.xz", "a.txt.bz2", "a.json.bz2"),
)
ENCODINGS = ("utf-8", "utf-16", "latin-1", "utf-32-be", "shift_jis", "utf-7", "cp1252", "gb18030")


def fuzz_documents(folder: Path, parts: list[bytes]) -> None:
    """Text: the first byte says in what file, the second in which encoding, the rest separates.

    Compressed files are made of the text that the second part is, and end with the third.
    """
    about, text, end = [*parts, b"", b""][:3]
    kind, encoding = (*about[:2], 0, 0)[:2]
    name = TEXTS[kind % len(TEXTS)]
    if name.endswith("gz") and kind < 128:
        text = gzip.compress(text, 1, mtime=0) + end
    elif name.endswith("zst") and kind < 128:
        text = zstandard().compress(text) + end
    elif name.endswith("xz") and kind < 128:
        text = lzma.compress(text, preset=0) + end
    elif name.endswith("bz2") and kind < 128:
        text = bz2.compress(text, 1) + end
    put(folder / name, text)
    separator = about[2:].decode(errors="replace") or None
    path = str(folder / name)
    use_text(sources.open_source(path, "text", ENCODINGS[encoding % len(ENCODINGS)], separator))


@functools.cache
def zstandard() -> Any:
    """Return what compresses."""
    import zstandard

    return zstandard.ZstdCompressor(level=1)


def fuzz_parquet(folder: Path, parts: list[bytes]) -> None:
    """A table."""
    put(folder / "a.parquet", b"".join(parts))
    use_text(sources.open_source(str(folder / "a.parquet")))


def use_text(source: sources.Source) -> None:
    """Read a text to its end: pieces of whole characters, the first of which begins a document."""
    documents = 0
    for piece in source.pieces():
        piece.text.decode()
        documents += piece.begins
        if not documents or len(piece.text) > sources.MOST_PIECE_BYTES:
            raise FaultError(f"{source.name}: a piece that is none")
    if source.has_chats and len(list(source.conversations())) != documents:
        raise FaultError(f"{source.name}: conversations that are no documents")
    if documents > 1 and not source.has_documents:
        raise FaultError(f"{source.name}: documents where none were expected")


def fuzz_study(folder: Path, parts: list[bytes]) -> None:
    """What a study's folder says of it, and its database."""
    for name, part in zip((STUDY_FILE, DATABASE_FILE), parts, strict=False):
        put(folder / name, part)
    StudyRecord.read(folder).url(folder, None)


TARGETS = {
    name.removeprefix("fuzz_"): function
    for name, function in list(globals().items())
    if name.startswith("fuzz_")
}

# --- One run --------------------------------------------------------------------------------------

# What readers have no business with; loading a module may do some of it.
FORBIDDEN = (
    *("pickle.find_class", "marshal.loads", "marshal.load", "exec", "compile", "code.__new__"),
    *("ctypes.dlopen", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"),
    *("socket.connect", "socket.getaddrinfo", "os.putenv", "sqlite3.connect"),
)
PATHS = (
    *("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir"),
    *("os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "glob.glob"),
)

# What says how many cores there are.
OF_THE_SYSTEM = ("/proc/", "/sys/fs/cgroup/")

_inside = ""  # the folder that is being read
_seen: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _inside:
        return
    if event in PATHS:
        # What is listed without a name is where the process is.
        for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(path, int):
                continue
            name = os.path.abspath("." if path is None else os.fsdecode(path))
            if not f"{name}/".startswith((f"{_inside}/", *OF_THE_SYSTEM)) and not _imports():
                _seen.append(f"{name} was opened: {event}")
    elif event in FORBIDDEN and not _imports():
        _seen.append(f"{event} was called: {arguments!r:.200}")


def _imports() -> bool:
    """Whether a module is being loaded."""
    frame = sys._getframe()
    while frame.f_back:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


sys.addaudithook(_note)


@functools.cache
def _folder() -> Path:
    made = tempfile.mkdtemp(dir=os.environ.get("FUZZ_ROOM", ROOM))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def run(target: str, data: bytes) -> ValueError | OSError | None:
    """Have an input read, and return the error that this ends with.

    Raises
    ------
    Exception
        If that is none that a reader may raise; ``FaultError`` for other broken promises.
    """
    global _inside
    folder = _folder()
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry)
        else:
            os.unlink(entry)
    error = None
    _seen.clear()
    _inside = str(folder)
    try:
        TARGETS[target](folder, data.split(SPLIT))
    except (ValueError, OSError) as caught:
        error = caught
    finally:
        _inside = ""
    if _seen:
        raise FaultError(_seen[0])
    if error is not None:
        text = describe(error)
        named = str(folder) in text or any(name in text for name in os.listdir(folder))
        if not named or "\n" in text or len(text) > LONGEST:
            raise FaultError(f"no line that names the file: {text!r}") from error
    return error


class Memory:
    """Watches that an input takes no more memory than its size accounts for."""

    def __init__(self, target: str) -> None:
        self.target, self.base = target, 0

    def _reset(self) -> None:
        # The most there was begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        self.base = self._most()

    def _most(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def check(self, data: bytes) -> None:
        """Raise ``FaultError`` if reading this just now took more, and does so once more."""
        room = MORE_ROOM.get(self.target, ROOM_BYTES) + BYTES_A_BYTE * len(data)
        if self._most() - self.base <= room:
            return
        # At the first time, or with what has gathered in long.
        self._reset()
        run(self.target, data)
        took = self._most() - self.base
        if took > room:
            raise FaultError(f"{took:,} bytes of memory for {len(data):,}, expected {room:,}")


# --- Mutations ------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 256, 1 << 31, 1 << 62, 10**30, 10**400, -0.0, 0.5),
    *(1e308, float("inf"), float("nan"), "", "right", "../x", "/x", "a\nb", "\0", "\ud800"),
    *([], {}, [[]], ["", ""], "x" * 3000),
)
WORDS = (
    *(b"true", b"nan", b"-inf", b"1e400", b"-0.0", b"0", b"-1", b"1", b"null", b"[]", b"{}", b'""'),
    *(b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 2000, b"a." * 300, b"{a="),
    *(b"'''", b'"""', b'"\\ud800"', b"step", b"low", b"high", b"choices", b"log", b"[model]"),
)


def changed(told: Any, rng: random.Random) -> Any:
    """Return a JSON value with one of its parts changed, moved or removed."""
    if not isinstance(told, dict | list) or not told or rng.random() < 0.1:
        near = [told + 1, told - 1, -told, told * 2] if type(told) is int else []
        return rng.choice([*near, *ODD])
    copy: Any = told.copy()
    keys = list(copy) if isinstance(copy, dict) else range(len(copy))
    key, chance = rng.choice(keys), rng.random()
    if chance < 0.1:
        del copy[key]
    elif chance < 0.2:
        copy[key] = copy[rng.choice(keys)]
    elif chance < 0.3 and isinstance(copy, list):
        copy.insert(key, copy[rng.choice(keys)])
    else:
        copy[key] = changed(copy[key], rng)
    return copy


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Return an input with one part changed: as JSON, by a word, or by libFuzzer."""
    rng = random.Random(seed)
    parts = data.split(SPLIT)
    place = rng.randrange(len(parts))
    part, chance = parts[place], rng.random()
    told = parsed(part) if chance < 0.5 else None
    try:
        if told is not None:
            parts[place] = json.dumps(changed(told, rng)).encode()
        elif chance < 0.65 and (words := list(re.finditer(rb"[\w.+-]+", part))):
            word = rng.choice(words)
            parts[place] = part[: word.start()] + rng.choice(WORDS) + part[word.end() :]
        else:
            room = max(most - len(data) + len(part), 1)
            parts[place] = atheris.Mutate(part, room)
    except (RecursionError, ValueError):
        pass
    return SPLIT.join(parts)[:most]


# --- The command line -----------------------------------------------------------------------------


SANITIZED = b"__asan_init" in Path(legacy1bit.model.__file__).read_bytes()


def fuzz(target: str, options: list[str]) -> None:
    """Look for faults in a reader until something ends it."""
    warnings.simplefilter("error")
    # Threads take longer to start than these texts to encode.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    bpe.can_start_threads = lambda count: True
    for name, data in stored(target).items():
        if name in ("whole-0", "whole-1"):
            run(target, data)
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    memory = Memory(target)

    def one(data: bytes) -> None:
        run(target, data)
        if not SANITIZED:
            memory.check(data)

    # A sanitizer keeps freed memory for a while, but tells of each piece that is too large.
    limits = [f"-timeout={SECONDS}", "-rss_limit_mb=2048"]
    if SANITIZED:
        limits.append(f"-malloc_limit_mb={MORE_ROOM.get(target, ROOM_BYTES) >> 20}")
    # What begins this program again, for -merge=1 and such.
    command = f"{sys.executable} {__file__} {target}"
    arguments = [command, *limits, f"-max_len={LONGEST_INPUT}", "-len_control=0", *options]
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


def fuzz_all(seconds: int) -> int:
    """Look for faults in all readers for so long, print a line about each, return how many."""
    faults = total = 0
    each = max(seconds // len(TARGETS), 1)
    print(f"{'target':<16}{'executions':>12}{'per s':>10}{'edges':>8}{'faults':>8}", flush=True)
    for target in TARGETS:
        done, edges, bad = fuzz_one(target, each)
        faults += bad
        total += done
        print(f"{target:<16}{done:>12,}{done / each:>10,.0f}{edges:>8,}{bad:>8}", flush=True)
    print(f"{'all':<16}{total:>12,}{total / each / len(TARGETS):>10,.0f}{'':>8}{faults:>8}")
    if faults:
        print(f"what shows them is in {FOUND}")
    return faults


def fuzz_one(target: str, seconds: int) -> tuple[int, int, int]:
    """Look for faults in a reader for so long; return executions, edges and faults."""
    folder, prefix = FOUND / target, FOUND / f"{target}-"
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-verbosity=1"]
    options += [f"-artifact_prefix={prefix}", str(folder)]
    with tempfile.TemporaryDirectory(dir=ROOM) as room, tempfile.TemporaryDirectory() as inputs:
        for name, data in stored(target).items():
            Path(inputs, name).write_bytes(data)
        done = subprocess.run(
            [sys.executable, __file__, target, *options, inputs],
            stderr=subprocess.PIPE,
            env=os.environ | {"FUZZ_ROOM": room},
            check=False,
        )
    said = done.stderr.decode(errors="replace")
    (FOUND / f"{target}.log").write_text(said, encoding="utf-8")
    counts = [int(n) for n in re.findall(r"number_of_executed_units:\s*(\d+)", said)]
    counts += [int(n) for n in re.findall(r"^#(\d+)", said, re.MULTILINE)]
    edges = max((int(n) for n in re.findall(r"cov: (\d+)", said)), default=0)
    return max(counts, default=0), edges, int(done.returncode != 0)


def stored(target: str) -> dict[str, bytes]:
    """Return the inputs that are stored for a target, by name."""
    with zipfile.ZipFile(CORPUS / f"{target}.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def store(target: str, inputs: dict[str, bytes]) -> None:
    """Store inputs for a target: the same bytes for the same inputs."""
    with zipfile.ZipFile(CORPUS / f"{target}.zip", "w") as archive:
        for name, data in sorted(inputs.items()):
            entry = zipfile.ZipInfo(name)
            entry.create_system = 3
            archive.writestr(entry, data)


def write_corpus(target: str = "", files: Iterable[str] = ()) -> None:
    """Store the inputs that are whole files of small models, and further files of a target."""
    whole = {
        each: {f"whole-{number}": SPLIT.join(parts) for number, parts in enumerate(inputs)}
        for each, inputs in seeds()
    }
    for each in TARGETS:
        inputs = stored(each) if (CORPUS / f"{each}.zip").exists() else {}
        inputs = {name: data for name, data in inputs.items() if not name.startswith("whole-")}
        added = files if each == target else ()
        inputs |= {Path(file).name: Path(file).read_bytes() for file in added}
        store(each, inputs | whole.get(each, {}))


def seeds() -> Iterator[tuple[str, list[list[bytes]]]]:
    """Yield targets and inputs for them, each of which is read without an error."""
    with tempfile.TemporaryDirectory(dir=ROOM) as made:
        folder = Path(made)
        tiny = create_legacy_llm(TINY, 1)
        c_like = ModelConfig.c_original(2, 2, 1, num_heads=1)
        export_c_v1(create_legacy_llm(c_like, 1), folder / "c.bin")
        c_parts = [(folder / name).read_bytes() for name in ("c.bin", "c.bin.json")]
        yield "c_v1", [c_parts, c_parts[:1]]

        inputs = []
        for changes in (
            {},
            {"scheme": "2bit", "scale": "row", "positions": "none", "sub_norm": True},
            {"scheme": "binary", "ternary_embedding": True, "output_bias": True},
            {"scheme": "float", "final_norm": False},
        ):
            model = create_legacy_llm(ModelConfig.from_dict({**TINY.to_dict(), **changes}), 1)
            save_model(model, folder)
            inputs.append(model_parts(folder, config="right"))
        yield "model", inputs

        inputs = []
        for changes in (
            {"activation": "relu2", "positions": "rope"},
            {**ARCHITECTURES["bitnet"], "model_dim": 4},
            {**ARCHITECTURES["qwen3"], "rope_pairs": "adjacent", "scale": "row"},
            {**ARCHITECTURES["llama"], "scheme": "float"},
        ):
            model = create_legacy_llm(ModelConfig.from_dict({**TINY.to_dict(), **changes}), 1)
            model.parameters["final_norm.gamma"][0] = 1e-3
            export_hugging_face(model, folder / "transformers")
            # The settings are those of the other file.
            inputs.append(model_parts(folder / "transformers", config=None))
        yield "hugging_face", inputs

        # llama.cpp's types demand 256 columns; files are smaller without them.
        fits = {"num_heads": 1, "model_dim": 2, "positions": "rope", "activation": "relu2"}
        bytes_alone = create_legacy_llm(ModelConfig.from_dict({**TINY.to_dict(), **fits}), 1)
        subwords = create_legacy_llm(
            ModelConfig.from_dict({**TINY.to_dict(), **fits, "vocab_size": SUBWORDS.vocab_size}), 1
        )
        export_gguf(bytes_alone, folder / "bytes.gguf", "f16")
        # Heads wider than the model, whose elements have another order in the file.
        wide = {**ARCHITECTURES["qwen3"], "rope_pairs": "adjacent", "head_dim": 4, "scale": "row"}
        reordered = create_legacy_llm(
            ModelConfig.from_dict({**TINY.to_dict(), **fits, **wide, "tied_embeddings": True}), 1
        )
        export_gguf(reordered, folder / "reordered.gguf", embedding_kind="f16")
        export_gguf(subwords, folder / "words.gguf", "f32", SUBWORDS)
        plain, spelled, other = (
            gguf_parts(folder / f"{name}.gguf") for name in ("bytes", "words", "reordered")
        )
        yield "gguf", [plain, other]
        yield "gguf_tokenizer", [plain, spelled]
        config = ModelConfig.from_dict({**TINY.to_dict(), **ARCHITECTURES["llama"]})
        pairs = {
            name: adapters.LoraPair(np.ones((1, cols), "f4"), np.ones((rows, 1), "f4"), 1.0 + i)
            for i, (name, (rows, cols)) in enumerate(adapters.adaptable(config).items())
        }
        adapter = adapters.LoraWeights(pairs, "name")
        adapters.write_gguf(adapter, config, folder / "adapter.gguf")
        adapters.write_peft(adapter, config, folder / "adapter")
        told, data = tensor_parts(folder / "adapter" / adapters.ADAPTER_FILE)
        content = (folder / "adapter" / adapters.ADAPTER_CONFIG_FILE).read_bytes()
        peft = [content, json.dumps(told).encode(), data]
        yield "adapter", [peft, gguf_parts(folder / "adapter.gguf")]
        chat = {"bos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
        files = [json.dumps(SUBWORDS.description()).encode(), json.dumps(chat).encode()]
        inputs = [spelled, files, files[:1], scored_keys()]
        words = folder / "words"
        words.mkdir()
        keys = {name: value for name, _, value in json.loads(inputs[-1][0])["keys"]}
        lists = {name: value[1] for name, value in keys.items() if isinstance(value, list)}
        PublishedTokenizer.of_gguf(keys | lists).save(words)
        written = [words / name for name in ("tokenizer.json", "tokenizer_config.json")]
        inputs.append([json.dumps(json.loads(file.read_bytes())).encode() for file in written])
        yield "published_tokenizer", inputs

        few = json.dumps(tokenizer.ByteTokenizer(3).description()).encode()
        merges = [["a", "b"], ["ab", "c"], ["c", "b"], ["\u0120", "a"]]
        characters = [["\u00c3", "\u00a4"]]
        yield "tokenizer", [[few], [json.dumps(merges).encode()], [json.dumps(characters).encode()]]

        yield (
            "settings",
            [
                [b"[model]\nmodel_dim = 8\nscheme = 'binary'\n[training]\nlearning_rate = 1e-3\n"],
                [b'model = {num_heads = 2}\ntraining.steps = 0x10\n[data]\nfield = """a\nb"""\n'],
                [b"learning_rate=0.01\nmin_learning_rate = 0.001 # x\nuse_adam=1\n"],
            ],
        )
        told = {
            "model": {"model_dim": 8},
            "training": {"optimizer": "sgd"},
            "data": DataConfig().to_dict(),
            "source": {"path": "x", "name": "x"},
        }
        empty: dict[str, Any] = {"model": {}, "training": TrainingConfig().to_dict(), "source": {}}
        texts = [{"name": name, "path": name, "weight": 0.5} for name in "xy"]
        mixed = told | {"source": {"name": "x:0.5 + y:0.5", "texts": texts}}
        inputs = [[json.dumps(one).encode()] for one in (told, mixed)]
        yield "run", [*inputs, [json.dumps(empty).encode(), b"{}"]]
        yield (
            "space",
            [
                [b"[clip]\nlow = 1e-4\nhigh = 0.1\nlog = true\n[scheme]\nchoices = ['binary']"],
                [b"[model_dim]\nlow = 8\nhigh = 64\nstep = 8\nfor_bytes = true\n"],
                [b"[warmup_steps]\nlow = 0.0\nhigh = 0.5\nstep = 0.1\nof_steps = true\n"],
            ],
        )

        inputs = []
        for name, shard in (("|u1", 4), ("<u2", 100), ("<u4", 3)):
            part = dict.fromkeys(("tokens", "documents", "tokens_crc", "documents_crc"), "right")
            index = {
                **{"format": "legacy1bit tokens", "format_version": 1, "dtype": name},
                **{"shard_tokens": shard, "source": "s", "tokenizer": "t", "sha256": "0" * 64},
                **{"parts": {"text": {**part, "bytes": 7}}, "crc": "right"},
            }
            tokens = np.arange(9).astype(name)
            pieces = [tokens[first : first + shard].tobytes() for first in range(0, 9, shard)]
            documents = np.array([0, 3, 5], "<i8").tobytes()
            inputs.append([json.dumps(index).encode(), documents, *pieces])
        yield "shards", inputs
        yield (
            "token_file",
            [
                [struct.pack("<3i", 20240520, 1, 4), bytes(8)],
                [struct.pack("<3i", 20240801, 7, 2), bytes(8)],
                [b"1\0002\0003\0"],
            ],
        )

        size = tiny.num_parameters
        some = np.linspace(0.0, 1.0, size, dtype=np.float32)
        codes = np.arange(size, dtype=np.uint8)
        eight_bits = dict.fromkeys(("first", "second"), codes)
        eight_bits |= {f"{name}_scales": some[:3] for name in eight_bits}
        inputs = []
        for moments in ({"first": some, "second": some}, eight_bits):
            state = checkpoint.Checkpoint(3, 1.5, (0.5, 2), (3,), some, moments)
            checkpoint.write_checkpoint(Run(folder), state, SETTINGS)
            raw = Run(folder).checkpoint_file.read_bytes()
            (length,) = struct.unpack_from("<Q", raw)
            told = json.loads(raw[8 : 8 + length])
            told["__metadata__"] |= dict.fromkeys([*SETTINGS, "crc32"], "right")
            inputs.append([json.dumps(told).encode(), raw[8 + length :]])
        yield "checkpoint", inputs

    yield (
        "metrics",
        [
            [b'{"step": 1, "loss": 2.5, "weights": {"zero": 0.5}}\n{"step": 2, "loss": null}\n'],
            [b'{"step": 1, "text": "\\ud83d\\ude00"}\n{"ste'],
        ],
    )
    study = {"study": "s", "source": {}, "own_database": False, "command": "", "machine": {}}
    yield "study", [[json.dumps(study | {"own_database": True}).encode(), b""]]

    lines = b'{"text": "a b"}\n{"text": "\\u00e9"}\n'
    chats = b'{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "system", "content": "a"},'
    chats += b'{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}\n'
    texts = {0: "\u00e4b c".encode(), 1: lines, 2: b"a" * 50, 3: lines, 4: b"b" * 50, 5: lines}
    texts |= {6: lines, 7: b" " + lines, 8: b"c" * 50, 9: lines, 10: b"d" * 50, 11: lines}
    yield (
        "documents",
        [
            *([bytes([kind, 0]), text] for kind, text in texts.items()),
            [b"\0\0--", b"one--two"],
            [b"\1\0", chats],
            [b"\0\1", "\u00e4b".encode("utf-16")],
            [b"\x82\0", gzip.compress(b"a b", mtime=0)],
            [b"\x84\0", zstandard().compress(b"a b")],
            [b"\x84\0", lzma.compress(b"a b") + bytes(4)],
            [b"\x84\0", bz2.compress(b"a b")],
            [b"\0\0\n\n", b"one\r\n\r\ntwo\n\nthree"],
        ],
    )
    yield "parquet", [[table] for table in tables()]
    yield from published_models()


# Bytes of a block with codes of -1, 0 and 1 and scale 1 / 4, or of some floats, by the type.
_BLOCKS = {
    0: (1, struct.pack("<f", -0.25)),
    1: (1, b"\0\x34"),
    2: (32, b"\0\x34" + b"\x59" * 16),
    8: (32, b"\0\x34" + b"\x59" * 32),
    12: (256, b"\0\x34" * 2 + b"\x59" * 140),
    14: (256, b"\x59" * 208 + b"\0\x34"),
    30: (1, b"\x80\x3e"),
    34: (256, b"\x59" * 52 + b"\0\x34"),
    35: (256, b"\x19" * 64 + b"\0\x34"),
    42: (64, b"\0\x34" + b"\x19" * 16),
    # The legacy form, which is 42 in a file.
    -42: (128, b"\0\x34" + b"\x19" * 32),
    142: (128, b"\0\x34" + b"\x19" * 32),
    143: (128, b"\x59" * 26 + b"\0\x34"),
}


def scored_keys() -> list[bytes]:
    """Return the keys of a small vocabulary of SentencePiece, as many tokens as ``SUBWORDS``."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(240)), "\u2581"]
    kinds = [2, 3, 3, *[6] * 240, 1]
    words = ["a", "b", "c", "ab", "abc", "\u2581a", "<|im_end|>", "<think>", *"xy"]
    kinds += [1, 1, 1, 1, 1, 1, 3, 4, 1, 1]
    for number in range(len(pieces) + len(words), SUBWORDS.vocab_size):
        words.append(f"[PAD{number}]")
        kinds.append(5)
    scores = [-float(number) for number in range(SUBWORDS.vocab_size)]
    keys = {
        "model": (8, "llama"),
        "tokens": (9, [8, [*pieces, *words]]),
        "token_type": (9, [5, kinds]),
        "scores": (9, [6, scores]),
        "bos_token_id": (4, 1),
        "eos_token_id": (4, 2),
    }
    told = [[f"tokenizer.ggml.{name}", kind, value] for name, (kind, value) in keys.items()]
    told.append(["tokenizer.chat_template", 8, "{{ messages }}"])
    return [json.dumps({"keys": told, "tensors": []}, ensure_ascii=False).encode(), b""]


def published_gguf(
    architecture: str, sizes: dict[str, int], kinds: str, **more: float | str
) -> list[bytes]:
    """Return a model of others: ``kinds`` has the types of its matrices, or -1 for none.

    They are those of embedding, output, queries, keys, values, output of attention, gate, up, down.
    """
    dim, wide, narrow, ffn = (sizes[name] for name in "CQKF")
    shapes = [("token_embd", (dim, 3)), ("output", (dim, 3))]
    block = {"attn_q": (dim, wide), "attn_k": (dim, narrow), "attn_v": (dim, narrow)}
    block |= {"attn_output": (wide, dim), "ffn_gate": (dim, ffn), "ffn_up": (dim, ffn)}
    shapes += [
        (f"blk.0.{name}", shape) for name, shape in {**block, "ffn_down": (ffn, dim)}.items()
    ]
    norms = {"blk.0.attn_norm": dim, "blk.0.ffn_norm": dim, "output_norm": dim}
    if architecture.startswith("bitnet"):
        norms |= {"blk.0.attn_sub_norm": wide, "blk.0.ffn_sub_norm": ffn}
    if architecture == "qwen3":
        norms |= dict.fromkeys(("blk.0.attn_q_norm", "blk.0.attn_k_norm"), sizes["D"])
    tensors: list[tuple[str, tuple[int, ...], int]] = [
        (f"{name}.weight", shape, int(kind))
        for (name, shape), kind in zip(shapes, kinds.split(), strict=True)
        if kind != "-1"
    ]
    tensors += [(f"{name}.weight", (size,), 0) for name, size in norms.items()]
    if architecture == "nemotron":
        tensors += [(f"{name}.bias", (size,), 0) for name, size in norms.items()]
        for name, size in (("attn_q", wide), ("attn_k", narrow), ("attn_v", narrow)):
            tensors.append((f"blk.0.{name}.bias", (size,), 0))
        for name, size in (("attn_output", dim), ("ffn_up", ffn), ("ffn_down", dim)):
            tensors.append((f"blk.0.{name}.bias", (size,), 0))
    entries, data = [], b""
    for name, shape, kind in tensors:
        data = data.ljust(-(-len(data) // 32) * 32, b"\0")
        entries.append([name, list(shape), abs(kind), len(data)])
        count = int(np.prod(shape))
        if kind == 36:
            data += b"\x19" * (count // 4) + struct.pack("<f", 0.25) + bytes(28)
        else:
            block_size, content = _BLOCKS[kind]
            data += content * (count // block_size)
    epsilon = "layer_norm_epsilon" if architecture == "nemotron" else "layer_norm_rms_epsilon"
    told = {
        **{
            "context_length": 8,
            "embedding_length": dim,
            "block_count": 1,
            "feed_forward_length": ffn,
        },
        "attention.head_count": wide // sizes["D"],
        "attention.head_count_kv": narrow // sizes["D"],
        **{"attention.key_length": sizes["D"], f"attention.{epsilon}": 1e-5},
        **more,
    }
    numbers = {int: 4, float: 6, str: 8}
    keys: list[Any] = [["general.architecture", 8, architecture]]
    keys += [[f"{architecture}.{name}", numbers[type(x)], x] for name, x in told.items()]
    keys.append(["tokenizer.ggml.tokens", 9, [8, ["a", "b", "c"]]])
    return [json.dumps({"keys": keys, "tensors": entries}).encode(), data]


def published_models() -> Iterator[tuple[str, list[list[bytes]]]]:
    """Yield models of others that have every type between them."""
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    yield (
        "published_gguf",
        [
            published_gguf(
                "llama", {**dict.fromkeys("QKFD", 2), "C": 256}, "12 14 34 35 42 0 142 143 1"
            ),
            published_gguf(
                "bitnet-25", {"C": 16, "Q": 16, "K": 8, "F": 8, "D": 8}, "1 1" + " 36" * 7
            ),
            published_gguf(
                "qwen3",
                {**dict.fromkeys("KFD", 2), "Q": 16, "C": 128},
                "-42 -1 -42 -42 -42 30 -42 -42 30",
                **yarn,
                **{"rope.scaling.original_context_length": 4},
            ),
            published_gguf(
                "nemotron", {"C": 32, "Q": 4, "K": 4, "F": 3, "D": 4}, "2 8 0 0 0 0 -1 0 0"
            ),
        ],
    )
    config = {
        **{"model_type": "llama", "vocab_size": 3, "hidden_size": 4, "intermediate_size": 4},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"hidden_act": "silu", "max_position_embeddings": 8, "rms_norm_eps": 1e-6},
    }
    packed = {"quantization_config": {"quant_method": "bitnet"}}
    masters = {"quant_method": "bitnet", "quantization_mode": "online"}
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4}
    folders = [
        (config | packed, "U8", False),
        (config | {"model_type": "bitnet", "quantization_config": masters}, "BF16", False),
        (config | {"model_type": "qwen3", "head_dim": 2, "rope_parameters": rope}, "F16", True),
    ]
    yield "published_folder", [published_folder(*folder) for folder in folders]


def published_folder(config: dict[str, Any], dtype: str, is_split: bool) -> list[bytes]:
    """Return a folder of others, of one file or of two with an index."""
    layer, kind = "model.layers.0.", config["model_type"]
    matrices = [f"self_attn.{part}_proj" for part in "qkvo"]
    matrices += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    norms = {f"{layer}{name}": 4 for name in ("input_layernorm", "post_attention_layernorm")}
    if kind == "bitnet":
        norms |= {f"{layer}self_attn.attn_sub_norm": 4, f"{layer}mlp.ffn_sub_norm": 4}
    if kind == "qwen3":
        norms |= {f"{layer}self_attn.q_norm": 2, f"{layer}self_attn.k_norm": 2}
    words = {"F32": b"\0\0\x80\x3e", "F16": b"\0\x34", "BF16": b"\x80\x3e", "U8": b"\x19"}
    tensors = [("model.embed_tokens.weight", [3, 4], "F32"), ("model.norm.weight", [4], "F32")]
    tensors += [(f"{name}.weight", [size], "F32") for name, size in norms.items()]
    for name in matrices:
        rows = 1 if dtype == "U8" else 4
        tensors.append((f"{layer}{name}.weight", [rows, 4], dtype))
        if dtype == "U8":
            tensors.append((f"{layer}{name}.weight_scale", [1], "BF16"))
    files: list[bytes] = []
    places = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]) if is_split else (tensors,)):
        header, data = {}, b""
        for name, shape, stored in part:
            content = words[stored] * int(np.prod(shape))
            ends = [len(data), len(data) + len(content)]
            header[name] = {"dtype": stored, "shape": shape, "data_offsets": ends}
            data += content
            places[name] = f"{number}.safetensors"
        files += [json.dumps(header).encode(), data]
    index = [json.dumps({"weight_map": places}).encode()] if is_split else []
    return [json.dumps(config).encode(), *index, *files]


def tables() -> Iterator[bytes]:
    """Yield tables of texts; none on CPUs that are too old for pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return

    column = pyarrow.array(["a b", "c"])
    for kind in (column, column.dictionary_encode()):
        file = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": kind}), file, store_schema=False)
        yield file.getvalue()


def model_parts(folder: Path, config: str | None) -> list[bytes]:
    """Return a model's files as parts for ``put_model``, with this for the header's settings."""
    told, data = tensor_parts(folder / "model.safetensors")
    if config is None:
        del told["__metadata__"]["config"]
    else:
        told["__metadata__"]["config"] = config
    settings = json.dumps(json.loads((folder / "config.json").read_bytes())).encode()
    return [settings, json.dumps(told).encode(), data]


def tensor_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def gguf_parts(path: Path) -> list[bytes]:
    """Return the parts of an input that a GGUF file comes of."""
    reader = load_gguf().GGUFReader(path)
    keys = []
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF."):
            kinds, content = [int(kind) for kind in entry.types], entry.contents()
            keys.append([name, kinds[0], [kinds[1], content] if kinds[0] == 9 else content])
    start = min(tensor.data_offset for tensor in reader.tensors)
    tensors = [
        [tensor.name, tensor.shape.tolist(), int(tensor.tensor_type), tensor.data_offset - start]
        for tensor in reader.tensors
    ]
    head = json.dumps({"keys": keys, "tensors": tensors}, ensure_ascii=False).encode()
    return [head, path.read_bytes()[start:].rstrip(b"\0")]


if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "corpus" and (len(sys.argv) == 2 or sys.argv[2] in TARGETS):
        write_corpus("".join(sys.argv[2:3]), sys.argv[3:])
    elif command == "all" and len(sys.argv) == 3 and sys.argv[2].isdigit():
        sys.exit(1 if fuzz_all(int(sys.argv[2])) else 0)
    elif command in TARGETS:
        fuzz(command, sys.argv[2:])
    else:
        sys.exit(f"expected all SECONDS, corpus, or a target: {', '.join(TARGETS)}")
