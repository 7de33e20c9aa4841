"""Text files and their bytes as tokens."""

import os

import numpy as np
import pytest

from helpers.arrays import assert_same_bits
from helpers.texts import EVERY_BYTE, texts
from legacy1bit.data_utils import (
    create_padded_sequence,
    get_time_in_ms,
    initialize_vocabulary,
    load_text_from_file,
    tokenize_text,
)

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


def test_initialize_vocabulary_has_a_token_for_each_byte():
    assert initialize_vocabulary() == 256


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
