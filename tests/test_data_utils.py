"""Text to tokens and back, and the tokenizer's file as Hugging Face's library reads it."""

import json
import os

import numpy as np
import pytest
from compare import assert_same_bits

from legacy1bit.data_utils import (
    TOKENIZER_FILE,
    ByteTokenizer,
    create_padded_sequence,
    get_time_in_ms,
    initialize_vocabulary,
    load_text_from_file,
    tokenize_text,
)

EVERY_BYTE = bytes(range(256))

TEXTS = {
    "ascii": "The quick brown fox jumps over 13 lazy dogs.",
    "punctuation": "\"It's\" 'tis; a-b_c (d) [e] {f} <|endoftext|> #$%&*+/=?@\\^`|~!",
    "spaces": "  two  spaces,\ta tab,\n\na blank line, and some at the end   ",
    "line ends": "one\r\ntwo\rthree\n",
    "controls": "".join(map(chr, range(32))) + "\x7f",
    "latin": "".join(map(chr, range(0x80, 0x180))),
    "scripts": "na\u00efve \u0394\u03b5\u03bb\u03c4\u03b1 \u65e5\u672c\u8a9e \u05e9\u05dc\u05d5",
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
    "one space": " ",
    "empty": "",
}
texts = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"a", EVERY_BYTE, b"a\r\nb\rc\n", b"\xef\xbb\xbfmarked", b"\xff\xfe\0", b"\0" * 9]
)
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_load_text_from_file_returns_the_bytes(tmp_path, content, kind):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert load_text_from_file(kind(path)) == content


def test_load_text_from_file_refuses_an_empty_file(tmp_path):
    path = tmp_path / "nothing.txt"
    path.touch()
    with pytest.raises(ValueError, match=r"nothing\.txt is empty"):
        load_text_from_file(path)


def test_load_text_from_file_refuses_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        load_text_from_file(tmp_path / "missing")
    with pytest.raises(IsADirectoryError, match="directory"):
        load_text_from_file(tmp_path)
    with pytest.raises(ValueError, match="null"):
        load_text_from_file("a\0b")


def test_load_text_from_file_refuses_an_unreadable_file(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"text")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises(PermissionError, match="secret"):
        load_text_from_file(path)


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 10, 11, 128, 256])
def test_tokenizer_of_fewer_bytes(size, tmp_path):
    tokenizer = ByteTokenizer(size)
    assert tokenizer.bos_token == (10 if size > 10 else None)
    assert tokenizer.encode(bytes(range(size))).tolist() == list(range(size))
    if size < 256:
        with pytest.raises(IndexError, match=f"byte {size} at offset 0 is outside"):
            tokenizer.encode(bytes([size]))
        with pytest.raises(IndexError, match=f"outside 0 to {size - 1}"):
            tokenizer.decode([size])
    tokenizer.save(tmp_path)
    assert ByteTokenizer.load(tmp_path).vocab_size == size


@pytest.mark.parametrize("size", [0, -1, 257])
def test_tokenizer_of_no_bytes(size):
    with pytest.raises(ValueError, match=f"the vocabulary has {size} tokens, expected 1 to 256"):
        ByteTokenizer(size)


def test_initialize_vocabulary_has_a_token_for_each_byte():
    assert initialize_vocabulary() == 256 == ByteTokenizer().vocab_size


def test_tokenize_text_gives_each_byte_its_number():
    assert_same_bits(tokenize_text(EVERY_BYTE), np.arange(256, dtype=np.int32))


@texts
def test_tokenize_text_takes_utf8(text):
    tokens = tokenize_text(text)
    assert_same_bits(tokens, np.array(list(text.encode()), np.int32))
    assert_same_bits(tokens, tokenize_text(text.encode()))


def test_tokenize_text_returns_an_array_of_its_own():
    tokens = tokenize_text(b"abc")
    tokens[0] = 7
    assert_same_bits(tokenize_text(b"abc"), np.array([97, 98, 99], np.int32))


def test_tokenize_text_refuses_bytes_outside_the_vocabulary():
    with pytest.raises(IndexError, match="byte 200 at offset 2 is outside the vocabulary of 128"):
        tokenize_text(b"ab\xc8\xff", 128)
    assert tokenize_text(b"ab\x7f", 128).max() == 127


def test_tokenize_text_refuses_lone_surrogates():
    with pytest.raises(UnicodeEncodeError):
        tokenize_text("a\udcff")


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 3, [10, 11, 12]),
        (1, 3, [11, 12, 13]),
        (0, 5, [10, 11, 12, 13, 14]),
        (2, 3, [12, 13, 14]),
        (3, 4, [13, 14, 99, 99]),
        (4, 1, [14]),
        (5, 2, [99, 99]),
        (50, 2, [99, 99]),
        (0, 7, [10, 11, 12, 13, 14, 99, 99]),
        (2, 0, []),
    ],
)
def test_create_padded_sequence_pads_what_is_missing(start, length, expected):
    tokens = np.arange(10, 15, dtype=np.int32)
    sequence = create_padded_sequence(tokens, start, length, 99)
    assert_same_bits(sequence, np.array(expected, np.int32))
    sequence[...] = 0
    assert_same_bits(tokens, np.arange(10, 15, dtype=np.int32))


def test_get_time_in_ms_does_not_run_backwards():
    times = [get_time_in_ms() for _ in range(100)]
    assert all(type(time) is int for time in times)
    assert times == sorted(times)


# --- ByteTokenizer --------------------------------------------------------------------------------


@texts
def test_tokenizer_brings_a_text_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode()


def test_tokenizer_decodes_every_id():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(range(256)) == EVERY_BYTE
    assert tokenizer.decode(np.arange(256)[::-1]) == EVERY_BYTE[::-1]
    assert tokenizer.decode([]) == b""


@pytest.mark.parametrize("ids", [[-1], [256], [65, 1 << 40], [0, -256]])
def test_tokenizer_refuses_ids_that_are_no_bytes(ids):
    with pytest.raises(IndexError, match="outside 0 to 255"):
        ByteTokenizer().decode(ids)


def test_tokenizer_file_can_be_loaded(tmp_path):
    ByteTokenizer().save(tmp_path)
    ByteTokenizer().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TOKENIZER_FILE]
    tokenizer = ByteTokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(EVERY_BYTE)) == EVERY_BYTE


def test_tokenizer_needs_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        ByteTokenizer().save(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="missing"):
        ByteTokenizer.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b'"BPE"', b"{}", b'{"model": 1}'],
)
def test_tokenizer_load_refuses_other_files(tmp_path, content):
    (tmp_path / TOKENIZER_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=TOKENIZER_FILE):
        ByteTokenizer.load(tmp_path)


def swap_two_bytes(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_a_word(content):
    content["model"]["vocab"]["the"] = 256
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]


def lower_case(content):
    content["normalizer"] = {"type": "Lowercase"}


def add_a_space(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def add_a_token(content):
    content["added_tokens"] = [
        {
            "id": 256,
            "content": "<end>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]


def drop_bytes_at_random(content):
    content["model"]["dropout"] = 0.5


@pytest.mark.parametrize(
    "change",
    [swap_two_bytes, add_a_word, drop_bytes_at_random, lower_case, add_a_space, add_a_token],
)
def test_tokenizer_load_refuses_tokenizers_that_give_other_ids(tmp_path, change):
    ByteTokenizer().save(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="not a tokenizer of bytes"):
        ByteTokenizer.load(tmp_path)


# --- The same file in Hugging Face's tokenizers ---------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    ByteTokenizer().save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))


@texts
def test_tokenizers_library_gives_the_same_ids(foreign, text):
    ids = foreign.encode(text).ids
    assert ids == ByteTokenizer().encode(text).tolist()
    assert foreign.decode(ids, skip_special_tokens=False) == text


def test_tokenizers_library_gives_the_same_ids_for_every_byte_of_utf8(foreign):
    """The bytes C0, C1 and F5 to FF occur in no valid text; all others do in this one."""
    codes = [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 97)]
    text = "".join(map(chr, codes))
    assert set(EVERY_BYTE) - set(text.encode()) == {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert foreign.encode(text).ids == list(text.encode())


def test_tokenizers_library_has_a_token_for_each_byte(foreign):
    assert foreign.get_vocab_size() == 256
    assert sorted(foreign.get_vocab().values()) == list(range(256))
    for byte in EVERY_BYTE:
        expected = bytes([byte]).decode("utf-8", "replace")
        assert foreign.decode([byte], skip_special_tokens=False) == expected
