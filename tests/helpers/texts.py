"""Texts that are difficult for tokenizers."""

import pytest

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
