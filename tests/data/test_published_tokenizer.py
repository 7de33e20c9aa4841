"""Tokenizers of published models: the tokens that other software gives, and damaged files."""

import copy
import functools
import heapq
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from helpers.cases import together
from helpers.models import make_config, random_model
from helpers.published import gguf_keys, golden, with_golden_models
from legacy1bit.data.published_tokenizer import RULES, PublishedTokenizer, template_in
from legacy1bit.data.tokenizer import ByteTokenizer, visible_bytes
from legacy1bit.data.tokenizer_files import load_tokenizer
from legacy1bit.formats.published import read_template
from legacy1bit.generator import Generator

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

VOCABULARIES = os.environ.get("LLAMA_CPP_VOCABULARIES", "")
WITH_VECTORS = ("llama-bpe", "qwen2", "qwen35", "llama-spm", "gpt-2", "mpt", "starcoder", "refact",
                "command-r", "falcon")  # fmt: skip

NORMAL, UNKNOWN, SPECIAL, ADDED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@functools.cache
def published(path, rows):
    if path.suffix == ".gguf":
        return PublishedTokenizer.of_gguf(gguf_keys(path), rows)
    return PublishedTokenizer.of_folder(path, rows)


@with_golden_models
def test_tokens_are_those_of_other_software():
    for path, about in golden():
        tokenizer = published(path, about["logits_shape"][-1])
        for case in about["tokenizer"]["strings"]:
            # GGUF cannot say that a text is normalized first.
            expected = case["ids"]
            if path.suffix == ".gguf":
                expected = case.get("ids_without_nfc", expected)
            tokens = tokenizer.encode_special(case["text"]).tolist()
            assert tokens == expected, path
            begin = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
            if expected == case["ids"]:
                assert begin + tokens == case["ids_with_added_special"], path
            if not {*expected} & {*tokenizer.special_tokens.values()}:
                assert tokenizer.encode(case["text"]).tolist() == expected, path
                if expected == case["ids"]:
                    assert tokenizer.decode(tokens).decode() == case["decoded"], path


@with_golden_models
def test_chats_end_at_the_tokens_of_other_software():
    for path, about in golden():
        tokenizer, said = published(path, about["logits_shape"][-1]), about["tokenizer"]
        assert tokenizer.eos_token == said["eos"][1], path
        assert said["end_of_turn"][1] in tokenizer.stop_tokens, path
        for case in (about.get("chat") or {}).get("renderings", ()):
            assert tokenizer.encode_special(case["rendered"]).tolist() == case["ids"], path


@pytest.mark.skipif(
    not VOCABULARIES,
    reason="LLAMA_CPP_VOCABULARIES does not name the folder models/ of llama.cpp's source",
)
@pytest.mark.parametrize("name", WITH_VECTORS)
def test_tokens_are_those_of_llama_cpp(name):
    path = Path(VOCABULARIES, f"ggml-vocab-{name}.gguf")
    tokenizer = PublishedTokenizer.of_gguf(gguf_keys(path))
    # Written again, it is the same.
    again = PublishedTokenizer.of_gguf(tokenizer.gguf_keys())
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    for text, line in zip(texts, lines[: len(texts)], strict=True):
        assert tokenizer.encode(text).tolist() == [int(token) for token in line.split()], text
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist(), text
        if name != "llama-spm":
            assert tokenizer.decode(tokenizer.encode(text)).decode() == text


# --- Files that are made here ---------------------------------------------------------------------


def byte_level_keys(merges=("t h", "th e", "\u0120 the"), more=(), **changes):
    """Keys of a vocabulary of the bytes, some merges, and more tokens with their types."""
    merged = dict.fromkeys(merge.replace(" ", "") for merge in merges)
    tokens = [*visible_bytes(), *merged, *(name for name, _ in more)]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [NORMAL] * (256 + len(merged)) + [kind for _, kind in more],
        "tokenizer.ggml.merges": list(merges),
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


CHAT = (("<|begin|>", SPECIAL), ("<|end|>", SPECIAL), ("<think>", ADDED), ("[PAD0]", UNUSED))
THE, BEGIN, END, THINK, PAD = 258, 259, 260, 261, 262


@pytest.fixture(scope="module")
def chat_tokenizer():
    keys = byte_level_keys(("t h", "th e", "\u0120 the"), CHAT, bos_token_id=259, eos_token_id=260)
    return PublishedTokenizer.of_gguf(keys)


def test_names_of_special_tokens_are_text_unless_asked(chat_tokenizer):
    text = "the<|end|><think> the"
    plain, special = chat_tokenizer.encode(text), chat_tokenizer.encode_special(text)
    assert special.tolist() == [257, END, THINK, THE]
    assert plain.tolist() == [257, *b"<|end|>", THINK, THE]
    assert plain.dtype == special.dtype == np.int32
    assert chat_tokenizer.decode(plain).decode() == text
    # Special tokens and padding have no text.
    assert chat_tokenizer.decode([BEGIN, *special, PAD]) == b"the<think> the"
    assert chat_tokenizer.encode("").tolist() == []


def test_what_is_protected_is_text(chat_tokenizer):
    said = "the<|end|><|en<|begin|> <think>"
    text = f"<|begin|>{chat_tokenizer.protect(said)}<|end|> the"
    expected = [BEGIN, *chat_tokenizer.encode(said), END, THE]
    assert chat_tokenizer.encode_special(text).tolist() == expected
    assert chat_tokenizer.protect("the <think>") == "the <think>"
    plain = PublishedTokenizer.of_gguf(byte_level_keys())
    assert plain.protect("<|end|>") == "<|end|>"


def test_bytes_that_are_not_text_come_back(chat_tokenizer):
    for data in (b"the\xff\xfe the", "\u6771\u4eac".encode()[:-1], bytes(range(256))):
        assert chat_tokenizer.decode(chat_tokenizer.encode(data)) == data
    # A character comes out of a stream when it is complete.
    whole = chat_tokenizer.encode("\u6771")
    assert whole.size == 3
    assert b"".join(chat_tokenizer.decode([token]) for token in whole) == "\u6771".encode()


def test_what_begins_and_ends_texts(chat_tokenizer):
    assert chat_tokenizer.bos_token == BEGIN
    assert chat_tokenizer.eos_token == END
    assert chat_tokenizer.stop_tokens == (END,)
    more = (("<|begin|>", SPECIAL), ("<|x|>", SPECIAL), ("<|im_end|>", SPECIAL), ("</s>", NORMAL))
    keys = byte_level_keys(more=more, bos_token_id=259, eos_token_id=260, add_bos_token=False)
    tokenizer = PublishedTokenizer.of_gguf(keys)
    # Of a name that is common, only special tokens are meant.
    assert (tokenizer.bos_token, tokenizer.stop_tokens) == (None, (260, 261))
    keys["tokenizer.ggml.eot_token_id"] = 5
    assert PublishedTokenizer.of_gguf(keys).stop_tokens == (260, 5, 261)


def test_tokens_that_stop_end_a_text(chat_tokenizer):
    model = random_model(make_config(vocab_size=chat_tokenizer.vocab_size))
    generator = Generator(model, chat_tokenizer)
    drawn = list(generator.tokens(generator.encode("a"), 40, seed=1))
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.stop_tokens = (drawn[9],)
    text = Generator(model, tokenizer).complete("a", 40, seed=1)
    assert (text.tokens, text.stopped) == (drawn.index(drawn[9]) + 1, True)


def test_copies_are_alike(chat_tokenizer):
    for other in (copy.deepcopy(chat_tokenizer), pickle.loads(pickle.dumps(chat_tokenizer))):
        text = "the <|end|><think>"
        assert (other.encode(text) == chat_tokenizer.encode(text)).all()
        assert (other.encode_special(text) == chat_tokenizer.encode_special(text)).all()
        assert other.sha256 == chat_tokenizer.sha256
        assert other.stop_tokens == chat_tokenizer.stop_tokens
        assert other.decode([PAD]) == b""


def test_lengths_of_tokens_are_those_of_their_text(chat_tokenizer):
    expected = [1] * 256 + [2, 3, 4, 0, 0, len("<think>"), 0]
    assert chat_tokenizer.byte_lengths.tolist() == expected
    with pytest.raises(IndexError, match="outside 0 to 262"):
        chat_tokenizer.decode([263])


def test_a_saved_tokenizer_is_read_again(chat_tokenizer, tmp_path):
    chat_tokenizer.save(tmp_path)
    other = PublishedTokenizer.of_folder(tmp_path, 300)
    assert (other.encode_special(TEXT) == chat_tokenizer.encode_special(TEXT)).all()
    assert (other.bos_token, other.stop_tokens) == (BEGIN, (END,))
    # A model may have more rows than the tokenizer has tokens.
    assert other.vocab_size == 300
    assert other.decode([257, 299]) == b"the"
    with pytest.raises(ValueError, match="has 200 tokens, and its tokenizer 262"):
        PublishedTokenizer.of_folder(tmp_path, 200)


# --- Written again --------------------------------------------------------------------------------

TEXT = "the<|end|><think> the\xe9 12345  I'll\r\n\n"


def assert_same(other, one, text=TEXT):
    """Both encode alike, begin and end texts alike, and have one chat template."""
    assert other.vocab_size == one.vocab_size
    assert other.encode_special(text).tolist() == one.encode_special(text).tolist()
    assert other.encode(text).tolist() == one.encode(text).tolist()
    tokens = range(one.vocab_size)
    assert [other.decode([token]) for token in tokens] == [one.decode([token]) for token in tokens]
    assert other.bos_token == one.bos_token
    assert other.eos_token == one.eos_token
    assert {*other.stop_tokens} == {*one.stop_tokens}
    assert other.special_tokens == one.special_tokens
    assert other.names == one.names
    assert other.template == one.template


@with_golden_models
def test_golden_tokenizers_are_written_as_they_are(tmp_path):
    for path, about in golden():
        rows = about["logits_shape"][-1]
        tokenizer = published(path, rows)
        # GGUF cannot say that a text is normalized first.
        texts = [case["text"] for case in about["tokenizer"]["strings"]
                 if "ids_without_nfc" not in case]  # fmt: skip
        tokenizer.save(tmp_path)
        for other in (
            PublishedTokenizer.of_gguf(tokenizer.gguf_keys(), rows),
            PublishedTokenizer.of_folder(tmp_path, rows),
        ):
            assert_same(other, tokenizer, "".join(texts))
        loaded = load_tokenizer(tmp_path, rows)
        assert loaded.sha256 == tokenizer.sha256
        # A second time, nothing changes any more.
        again = PublishedTokenizer.of_gguf(tokenizer.gguf_keys(), rows).gguf_keys()
        assert again == tokenizer.gguf_keys()


@together("name", sorted(RULES))
def test_rules_that_split_words_are_written_by_name(name):
    tokenizer = PublishedTokenizer.of_gguf(byte_level_keys(pre=name))
    keys = tokenizer.gguf_keys()
    assert RULES[keys["tokenizer.ggml.pre"]] == RULES[name]
    assert keys["tokenizer.ggml.merges"] == ["t h", "th e", "\u0120 the"]
    assert_same(PublishedTokenizer.of_gguf(keys), tokenizer)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        (
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
            "gpt-2",
        ),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": True,
                    },
                ],
            },
            "starcoder",
        ),
        (
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            None,
        ),
        ({"type": "Digits", "individual_digits": False}, None),
        (
            {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False},
            None,
        ),
        (
            {"type": "Split", "pattern": {"String": "x"}, "behavior": "Isolated", "invert": False},
            None,
        ),
        (None, None),
    ],
)
def test_rules_of_a_folder_get_their_name(chat_tokenizer, pre, expected):
    record = {**chat_tokenizer.description(), "pre_tokenizer": pre}
    tokenizer = PublishedTokenizer(json.dumps(record))
    if expected is not None:
        assert tokenizer.gguf_keys()["tokenizer.ggml.pre"] == expected
        return
    with pytest.raises(ValueError, match="GGUF has no name for how the tokenizer splits words: "):
        tokenizer.gguf_keys()


def test_a_rule_is_the_same_however_its_contractions_are_written(chat_tokenizer):
    record = json.dumps(chat_tokenizer.description())
    assert "'(?:s|t|re|ve|m|ll|d)" in record
    other = record.replace("'(?:s|t|re|ve|m|ll|d)", "'s|'t|'re|'ve|'m|'ll|'d")
    assert PublishedTokenizer(other).gguf_keys()["tokenizer.ggml.pre"] == "llama-bpe"


def test_all_that_keys_say_is_written():
    more = (*CHAT[:2], ("<|eot|>", SPECIAL), ("<|eom|>", SPECIAL), CHAT[2])
    template = "{{ messages }}"
    keys = byte_level_keys(
        ("t h", "th e", "\u0120 the"), more, bos_token_id=259, eos_token_id=260, eot_token_id=261,
        eom_token_id=262, padding_token_id=259, add_bos_token=False,
    ) | {"tokenizer.chat_template": template}  # fmt: skip
    tokenizer = PublishedTokenizer.of_gguf(keys)
    assert tokenizer.stop_tokens == (260, 261, 262)
    assert tokenizer.names == {"bos_token": "<|begin|>", "eos_token": "<|end|>",
                               "pad_token": "<|begin|>"}  # fmt: skip
    written = tokenizer.gguf_keys()
    assert {name: value for name, value in written.items() if name in keys} == {
        name: value for name, value in keys.items() if name != "general.architecture"
    }
    assert written.keys() - keys.keys() == {"tokenizer.ggml.add_eos_token"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": '{"eos_token": "x"}'}, None),
        ({"tokenizer_config.json": '{"chat_template": "a"}'}, "a"),
        ({"tokenizer_config.json": '{"chat_template": "a"}', "chat_template.jinja": "b"}, "b"),
        (
            {"tokenizer_config.json": json.dumps({"chat_template": [
                {"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]})},
            "b",
        ),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "x", "template": "a"}]}'}, None),
    ],
)  # fmt: skip
def test_templates_of_folders(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert template_in(tmp_path) == expected
    # Also beside a tokenizer that is not another program's.
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    found = read_template(tmp_path, ByteTokenizer())
    assert (None if found is None else found.source) == expected


@pytest.mark.parametrize("content", ['{"chat_template": 3}', '{"chat_template": {"a": "b"}}'])
def test_templates_that_are_no_text_are_refused(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match="its chat template is not a text"):
        template_in(tmp_path)
    with pytest.raises(ValueError, match="its chat template is not a text"):
        PublishedTokenizer.of_gguf(byte_level_keys() | {"tokenizer.chat_template": 3})


def test_a_merge_is_written_where_there_is_none():
    """llama.cpp asks for one."""
    tokenizer = PublishedTokenizer.of_gguf(byte_level_keys(()))
    keys = tokenizer.gguf_keys()
    assert keys["tokenizer.ggml.merges"] == ["\u2581 \u2581"]
    assert_same(PublishedTokenizer.of_gguf(keys), tokenizer)


def test_scores_are_written(tmp_path):
    pieces = ("a", "b", "c", "ab", "bc", "abc", "\u2581a", "\u2581")
    for space in (True, False):
        keys = sentence_piece_keys(pieces) | {"tokenizer.ggml.add_space_prefix": space}
        tokenizer = PublishedTokenizer.of_gguf(keys)
        tokenizer.save(tmp_path)
        for one in (tokenizer, PublishedTokenizer.of_folder(tmp_path)):
            written = one.gguf_keys()
            assert written["tokenizer.ggml.add_space_prefix"] is space
            assert written["tokenizer.ggml.model"] == "llama"
            assert written["tokenizer.ggml.token_type"] == keys["tokenizer.ggml.token_type"]
            assert_same(PublishedTokenizer.of_gguf(written), tokenizer, "abc bcab a\xe9")


def test_merges_without_an_order_of_tokens_are_refused(tmp_path):
    tokenizer = PublishedTokenizer.of_gguf(sentence_piece_keys(("a", "b", "aa", "ab", "aab")))
    record = tokenizer.description()
    # Both make the same token, and another one is between them.
    record["model"]["merges"] = [["a", "ab"], ["a", "b"], ["aa", "b"]]
    with pytest.raises(ValueError, match="merges 'aab' sooner and later"):
        PublishedTokenizer(json.dumps(record)).gguf_keys()


def test_tokenizers_without_merges_are_not_written_as_gguf(chat_tokenizer):
    record = chat_tokenizer.description()
    record["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]]}
    record["added_tokens"], record["post_processor"] = [], None
    tokenizer = PublishedTokenizer(json.dumps(record))
    with pytest.raises(ValueError, match="of the type BPE, and it is Unigram"):
        tokenizer.gguf_keys()


def test_tokens_behind_the_last_one_are_padding(chat_tokenizer):
    assert "[PAD0]" not in chat_tokenizer.description()["model"]["vocab"]
    assert chat_tokenizer.gguf_keys()["tokenizer.ggml.token_type"][-1] == UNUSED
    assert chat_tokenizer.gguf_keys()["tokenizer.ggml.tokens"][-1] == "[PAD262]"
    # Between others they are not.
    keys = byte_level_keys(more=(("[PAD0]", UNUSED), ("<|end|>", SPECIAL)))
    tokenizer = PublishedTokenizer.of_gguf(keys)
    assert tokenizer.decode([259, 260]) == b""
    assert tokenizer.gguf_keys()["tokenizer.ggml.token_type"][-2:] == [UNUSED, SPECIAL]


def test_what_puts_a_token_before_texts_is_written(chat_tokenizer, tmp_path):
    library = pytest.importorskip("tokenizers")
    chat_tokenizer.save(tmp_path)
    other = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("the").ids == [BEGIN, 257]
    assert other.encode("the", add_special_tokens=False).ids == [257]


def test_texts_are_learned_with_a_published_tokenizer(tmp_path, say):
    keys = byte_level_keys(("t h", "th e", "\u0120 the"), CHAT, bos_token_id=259, eos_token_id=260)
    tokenizer = PublishedTokenizer.of_gguf(keys)
    (tmp_path / "words").mkdir()
    tokenizer.save(tmp_path / "words")
    text = tmp_path / "text.txt"
    text.write_text("the cat is on the mat\n" * 40)
    say("train", "--data", text, "--tokenizer-from", tmp_path / "words", "--steps=2", "--blocks=1",
        "--model-dim=8", "--heads=1", "--sequence-length=8", "--batch-size=2", "--threads=1",
        "--cache", tmp_path / "cache", "--out", tmp_path / "run")  # fmt: skip
    assert load_tokenizer(tmp_path / "run").sha256 == tokenizer.sha256
    say("generate", "--model", tmp_path / "run", "--prompt", "the", "--max-tokens", "4")


def test_a_vocabulary_may_have_no_merges():
    # llama.cpp asks for one, which export writes of what is no token.
    keys = byte_level_keys(())
    for merges in ([], ["\u2581 \u2581"], ["ab"]):
        keys["tokenizer.ggml.merges"] = merges
        tokenizer = PublishedTokenizer.of_gguf(keys)
        assert tokenizer.encode(b"the\xff").tolist() == [*b"the\xff"]


def test_a_missing_rule_is_llama_3s_where_the_vocabulary_is():
    text = "1234567 I'LL"
    merges = ("1 2", "12 3", "4 5", "45 6", "' L", "'L L", "34 5", "3 4")
    llama3, default = (
        PublishedTokenizer.of_gguf(byte_level_keys(merges, pre=pre)).encode(text).tolist()
        for pre in ("llama-bpe", "default")
    )
    assert llama3 != default
    keys = byte_level_keys(merges)
    del keys["tokenizer.ggml.pre"]
    assert PublishedTokenizer.of_gguf(keys).encode(text).tolist() == default
    keys["general.architecture"] = "bitnet-25"
    assert PublishedTokenizer.of_gguf(keys).encode(text).tolist() == llama3


def test_every_rule_keeps_every_text():
    generator = random.Random(3)
    alphabet = "aB9 \t\r\n.,'!$^~|`s\u00e9\u0301\u6771\u0663\U0001f642"
    texts = ["".join(generator.choices(alphabet, k=30)) for _ in range(50)]
    for rule in RULES:
        tokenizer = PublishedTokenizer.of_gguf(byte_level_keys(pre=rule))
        assert all(tokenizer.decode(tokenizer.encode(text)).decode() == text for text in texts)


# --- SentencePiece --------------------------------------------------------------------------------


def sentence_piece(text, tokens, scores, kinds):
    """Merge the neighbors with the best score, the leftmost first: the algorithm as published."""
    ids = {name: token for token, name in enumerate(tokens)}
    parts = list(("\u2581" + text.replace(" ", "\u2581")) if text else "")
    after, before = [*range(1, len(parts)), -1], [-1, *range(len(parts) - 1)]
    waiting = []

    def offer(left, right):
        if left >= 0 and right >= 0:
            token = ids.get(parts[left] + parts[right])
            if token is not None and kinds[token] == NORMAL:
                waiting.append((-scores[token], left, right, tokens[token]))
                waiting.sort()

    for place in range(1, len(parts)):
        offer(place - 1, place)
    while waiting:
        _, left, right, name = heapq.heappop(waiting)
        if parts[left] and parts[right] and parts[left] + parts[right] == name:
            parts[left], parts[right] = name, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
    return [
        token
        for part in parts
        if part
        for token in ([ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()])
    ]


def sentence_piece_keys(pieces, **changes):
    """Keys of a vocabulary of SentencePiece; those that come first have the best scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [UNKNOWN, SPECIAL, SPECIAL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [*[0.0] * 259, *(-float(rank) for rank in range(len(pieces)))],
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def test_scores_decide_what_is_merged():
    generator = random.Random(5)
    for _ in range(40):
        letters = "ab\u2581"
        longer = {"".join(generator.choices(letters, k=generator.randint(2, 4))) for _ in range(30)}
        # As in vocabularies that were learned, a piece comes behind what it is merged from.
        keys = sentence_piece_keys([*sorted(longer, key=lambda one: (len(one), one)), *letters])
        tokenizer = PublishedTokenizer.of_gguf(keys)
        tokens, kinds, scores = (keys[f"tokenizer.ggml.{name}"]
                                 for name in ("tokens", "token_type", "scores"))  # fmt: skip
        for _ in range(20):
            text = "".join(generator.choices("ab c", k=generator.randint(0, 20)))
            expected = sentence_piece(text, tokens, scores, kinds)
            assert tokenizer.encode(text).tolist() == expected, (text, sorted(longer))


def test_sentence_piece_falls_back_to_bytes():
    pieces = ("\u2581th", "\u2581t", "he", "\u2581", "t", "h", "e", "<", "s", ">")
    tokenizer = PublishedTokenizer.of_gguf(sentence_piece_keys(pieces))
    text = "the \u6771\n<s>"
    tokens = tokenizer.encode(text)
    assert 1 not in tokens
    assert tokenizer.decode(tokens).decode() == " " + text
    assert tokenizer.decode(tokenizer.encode(b"t\xff")) == b" t\xff"
    assert (tokenizer.bos_token, tokenizer.stop_tokens) == (1, (2,))
    assert tokenizer.encode_special("<s>t").tolist() == [1, *tokenizer.encode("t")]
    plain = PublishedTokenizer.of_gguf(sentence_piece_keys(pieces, add_space_prefix=False))
    assert plain.decode(plain.encode(text)).decode() == text


# --- What cannot be read --------------------------------------------------------------------------


@together(
    "changes, told",
    [
        ({"model": "bert"}, "its tokenizer is 'bert'"),
        ({"model": 3}, "tokenizer.ggml.model is '3', expected str"),
        ({"pre": "unheard"}, "tokenizer.ggml.pre is 'unheard', expected one of"),
        ({"tokens": ["a", "a"]}, "has a token twice"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is missing, or no list"),
        ({"tokens": [1, 2]}, "not a list of str"),
        ({"token_type": [1]}, "types of 1"),
        ({"eos_token_id": 1000000}, "eos_token_id is 1000000, expected 0 to 258"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected int"),
        ({"add_bos_token": True}, "bos_token_id is missing"),
    ],
)
def test_damaged_keys_are_refused(changes, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(")) as caught:
        PublishedTokenizer.of_gguf(byte_level_keys(**changes))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_another_size_is_refused(chat_tokenizer):
    keys = byte_level_keys()
    del keys["tokenizer.ggml.merges"]
    with pytest.raises(ValueError, match="merges is missing"):
        PublishedTokenizer.of_gguf(keys)
    with pytest.raises(ValueError, match="has 300 tokens, and its tokenizer 259"):
        PublishedTokenizer.of_gguf(byte_level_keys(), 300)
    keys = sentence_piece_keys(("a",))
    keys["tokenizer.ggml.scores"][3] = float("nan")
    with pytest.raises(ValueError, match="not a number for each token"):
        PublishedTokenizer.of_gguf(keys)


def test_damaged_folders_are_refused(chat_tokenizer, tmp_path):
    chat_tokenizer.save(tmp_path)
    path, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    good, about = path.read_text(), config.read_text()
    for name, content, told in (
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "[]", "cannot be read"),
        ("tokenizer.json", "{}", "'added_tokens' is missing"),
        ("tokenizer.json", good.replace('"BPE"', '"Unheard"'), "tokenizers refuses it"),
        ("tokenizer.json", good.replace('"ByteLevel"', '"WordPiece"'), "cannot be read"),
        ("tokenizer.json", good[: len(good) // 2], "cannot be read"),
        (
            "tokenizer.json",
            good.replace('"unk_token": null', '"unk_token": "<unk>"'),
            "unknown characters, '<unk>', is not in its vocabulary",
        ),
        ("tokenizer_config.json", "x", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json is a list"),
        ("tokenizer_config.json", '{"eos_token": 3}', "a special token is 3"),
        ("tokenizer_config.json", '{"eos_token": "<|no|>"}', "is missing"),
        ("generation_config.json", '{"eos_token_id": "x"}', "is not a number"),
        ("generation_config.json", '{"eos_token_id": 999}', "is 999, expected a token"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=told) as caught:
            PublishedTokenizer.of_folder(tmp_path)
        assert "\n" not in str(caught.value)
        path.write_text(good)
        config.write_text(about)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, END]}))
    assert PublishedTokenizer.of_folder(tmp_path).stop_tokens == (END, 7)
