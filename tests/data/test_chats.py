"""Conversations as training data: which lines are, what is wrong with one, and what is learned."""

import gzip
import itertools
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cases import together
from helpers.models import make_config, random_model
from legacy1bit.data import corpus as corpora
from legacy1bit.data.chats import is_conversation, messages_of
from legacy1bit.data.corpus import open_chats, open_corpus, tokenize_chats
from legacy1bit.data.origin import DataOrigin
from legacy1bit.data.shards import open_store
from legacy1bit.data.sources import open_source
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.dataset import TokenDataset
from legacy1bit.formats.chat_template import PlainTemplate
from legacy1bit.formats.chat_tokens import TemplateEncoder
from legacy1bit.forward import forward_llm_batch
from legacy1bit.hyperparams import DataConfig
from legacy1bit.training.evaluation import evaluate

PAD = 256


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def plain(tokenizer):
    return TemplateEncoder(PlainTemplate(), tokenizer)


def said(*contents, system=None):
    """Messages by user and assistant in turn."""
    turns = zip(itertools.cycle(["user", "assistant"]), contents)
    messages = [{"role": role, "content": content} for role, content in turns]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


def lines_of(conversations):
    return "".join(json.dumps({"messages": one, "id": 3}) + "\n" for one in conversations)


def put(conversations, name="chats.jsonl"):
    Path(name).write_text(lines_of(conversations))
    return DataOrigin.of_texts([os.path.abspath(name)])


FEW = [said(f"q{i}", f"a{i}" * (1 + i % 5), f"more {i}?", "yes") for i in range(40)]


# --- Which lines are conversations ----------------------------------------------------------------


@together(
    ("record", "field", "expected"),
    [
        ({"messages": []}, "text", True),
        ({"messages": [], "text": "x"}, "text", False),
        ({"messages": [], "text": "x"}, "messages", True),
        ({"messages": "x"}, "messages", False),
        ({"messages": "x", "prompt": "", "completion": ""}, "text", False),
        ({"messages": []}, "body", False),
        ({"prompt": "x", "completion": "y"}, "text", True),
        ({"prompt": "x", "completion": "y", "text": "z"}, "text", False),
        ({"prompt": "x", "completion": "y"}, "messages", False),
        ({"prompt": "x", "completion": "y"}, "completion", False),
        ({"prompt": "x"}, "text", False),
        ({"text": "x"}, "text", False),
        ({}, "text", False),
    ],
)
def test_records_say_whether_they_are_conversations(record, field, expected):
    assert is_conversation(record, field, "text") is expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json", "a"])
def test_texts_of_conversations_are_known_by_their_first_line(name):
    text = ("\n" + lines_of(FEW)).encode()
    Path(name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    source = open_source(name)
    assert source.has_chats
    assert [messages for _, messages in source.conversations()] == FEW
    # What is said is the text that a vocabulary is learned from.
    assert next(piece.text for piece in source.pieces()) == b"q0\na0\nmore 0?\nyes"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", lines_of(FEW)),
        ("a.jsonl", '{"text": "x"}\n' + lines_of(FEW)),
        ("a.jsonl", "x\n" + lines_of(FEW)),
        ("a.jsonl", ""),
        ("a", "x"),
    ],
)
def test_other_texts_are_none(name, content):
    Path(name).write_text(content)
    assert not open_source(name).has_chats


def test_a_file_beside_conversations_has_to_hold_some():
    put(FEW)
    Path("b.txt").write_text("some text")
    source = open_source(["chats.jsonl", "b.txt"])
    with pytest.raises(ValueError, match=r"b\.txt is not JSON lines, expected conversations as in"):
        list(source.conversations())


def test_a_prompt_and_a_completion_are_two_messages():
    record = {"prompt": "1 + 1?", "completion": "2"}
    assert messages_of(record, "x") == said("1 + 1?", "2")


@together(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[]", "a list, expected an object"),
        ('{"a": 1}', "no conversation, expected 'messages', or 'prompt' and 'completion'"),
        ('{"messages": []}', "'messages' is empty, expected a list of messages"),
        ('{"messages": {}}', "'messages' is an object, expected a list"),
        ('{"messages": null}', "'messages' is null, expected a list"),
        ('{"messages": [3]}', "message 1: a number, expected an object with 'role' and 'content'"),
        ('{"messages": [{"content": "x"}]}', "message 1: the role is null, expected one of system"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1: the role is 'bot'"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "message 1: the role is a list"),
        ('{"messages": [{"role": "user"}]}', "message 1: the content is null, expected text"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "content is a list"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ('{"prompt": "x", "completion": 3}', "message 2: the content is a number, expected text"),
        (lines_of([said("x")]), "the last message is of user, expected of assistant"),
        (lines_of([said("x", "y", "z")]), "the last message is of user, expected of assistant"),
        (lines_of([said("x", "y")[1:]]), "message 1 is of assistant, expected of user"),
        (
            lines_of([said("x", "y") * 2 + said("x")[:1] * 2]),
            "message 6 is of user, expected of as",
        ),
        (lines_of([said(system="x")]), "the last message is of system, expected of assistant"),
        (lines_of([said("x", "y") + said(system="z")]), "message 3 is of system, expected of user"),
        (lines_of([said(system="x") + said("a", "b", system="x")]), "message 2 is of system"),
    ],
)
def test_damaged_lines_are_named(line, told):
    Path("chats.jsonl").write_text(lines_of(FEW[:2]) + "\n" + line)
    source = open_source("chats.jsonl")
    for go in (source.conversations, source.pieces):
        with pytest.raises(ValueError, match=r"chats\.jsonl, line 4[:,] ") as error:
            list(go())
        assert told in str(error.value)
        assert "\n" not in str(error.value)


def test_what_a_template_refuses_is_named_by_its_line():
    class Refusing(PlainTemplate):
        def render(self, messages, answer=True):
            if "q1" in messages[0]["content"]:
                raise ValueError("the chat template refuses the conversation: q1")
            return super().render(messages, answer)

    put(FEW[:3])
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 2: the chat template refuses the"):
        tokenize_chats(
            open_source("chats.jsonl"),
            ByteTokenizer(),
            Path("tokens"),
            TemplateEncoder(Refusing(), ByteTokenizer()),
        )
    assert not Path("tokens").exists()


# --- What is learned ------------------------------------------------------------------------------


def reference(conversation):
    """The text of a conversation in lines of User: and Assistant:, and what is predicted of it."""
    pieces, begun = [(b"\n", False)], False
    for message in conversation:
        role, content = message["role"], message["content"].strip().encode()
        if role == "assistant":
            pieces += [(b"Assistant: ", False), (content + b"\nUser:", True)]
            begun = True
        else:
            head = b"" if begun else f"{role.title()}:".encode()
            pieces.append((head + b" " + content + b"\n", False))
            begun = False
    text = b"".join(piece for piece, _ in pieces)
    predicted = [flag for piece, flag in pieces for _ in piece]
    return text, predicted


def rows_of(batch):
    """For each document in a batch: its tokens, its targets that count, and what they see."""
    for tokens, targets, starts in zip(*batch, strict=True):
        edges = [*np.flatnonzero(np.diff(starts, prepend=-1)), tokens.size]
        for begin, end in itertools.pairwise(edges):
            assert (starts[begin:end] == begin).all()
            kept = tokens[begin:end] != PAD
            if kept.any():
                yield tokens[begin:end][kept], targets[begin:end][kept]


contents = st.text("ab \n\u00e9?", max_size=12)
conversations = st.lists(
    st.tuples(st.lists(contents, min_size=1, max_size=3), st.none() | contents),
    min_size=2,
    max_size=12,
)


@settings(max_examples=30, deadline=None)
@given(conversations, st.integers(4, 90), st.integers(1, 5), st.sampled_from(["packed", "buckets"]))
def test_batches_have_every_answer_once_and_nothing_else(
    tmp_path_factory, drawn, length, size, order
):
    chats = [
        said(*[text for content in turns for text in (content, content[::-1])], system=system)
        for turns, system in drawn
    ]
    folder = tmp_path_factory.mktemp("chats")
    path = folder / "chats.jsonl"
    path.write_text(lines_of(chats))
    tokenizer = ByteTokenizer()
    index = tokenize_chats(open_source(str(path)), tokenizer, folder / "tokens", plain(tokenizer))
    stores = [open_store(folder / "tokens", index, part) for part in ("text", "predicted")]
    assert stores[0].document_count == stores[1].document_count == len(chats)
    expected = Counter()
    for chat in chats:
        text, predicted = reference(chat)
        # Cut at its end, and the last token of a row still has a target.
        tokens = list(text[:length])
        targets = [
            token if flag else PAD
            for token, flag in zip(text[1 : length + 1], predicted[1 : length + 1], strict=True)
        ]
        expected[tuple(tokens), tuple(targets + [PAD] * (len(tokens) - len(targets)))] += 1
    dataset = TokenDataset(
        stores[0], length, PAD, order=order, document_mask=True, predicted=stores[1]
    )
    found = Counter()
    reader = dataset.reader(size, 3)
    if order == "buckets":
        while reader.position[0] == 0:
            found.update(_documents(reader.next_batch()))
        assert found == expected
        return
    for batch in dataset.sweep(size):
        assert len(batch.tokens) <= size
        found.update(_documents(batch))
    assert found == expected
    seen = Counter()
    while not expected <= seen:
        before = reader.position
        seen.update(_documents(reader.next_batch()))
        assert before[0] == 0, "an epoch has all of them"


def _documents(batch):
    return [(tuple(tokens.tolist()), tuple(targets.tolist())) for tokens, targets in rows_of(batch)]


def corpus_of(chats, length=64, name="chats.jsonl", **data):
    origin = put(chats, name)
    return open_corpus(origin, DataConfig(**data), length, Path("cache"), encoder_of=plain)


def texts_in(dataset):
    begins, ends = dataset.tokens.document_bounds(np.arange(dataset.tokens.document_count))
    return [
        bytes(dataset.tokens.read(begin, end).astype(np.uint8))
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
    ]


@pytest.mark.parametrize("split", ["auto", "documents", "tail"])
def test_conversations_are_split_whole_and_copies_stay_together(split):
    chats = [chat for chat in FEW for _ in range(3)]
    corpus = corpus_of(chats, split=split, validation_fraction=0.3)
    learned, kept = texts_in(corpus.training), texts_in(corpus.validation)
    whole = [reference(chat)[0] for chat in chats]
    assert sorted(learned + kept) == sorted(whole)
    assert learned
    assert kept
    if split == "tail":
        assert learned == whole[: len(learned)]
        assert len(kept) == 36
    else:
        assert not set(learned) & set(kept)
    for dataset in (corpus.training, corpus.validation):
        assert (dataset.order, dataset.document_mask) == ("packed", True)
        predicted = dataset.predicted.read(0, dataset.predicted.size)
        flags = [flag for text in texts_in(dataset) for flag in
                 reference(chats[whole.index(text)])[1]]  # fmt: skip
        assert predicted.tolist()[: len(flags)] == flags


def test_few_conversations_are_split_at_the_tail():
    corpus = corpus_of([said("a", "b"), said("c", "d")], split="auto", validation_fraction=0.01)
    assert len(texts_in(corpus.training)) == len(texts_in(corpus.validation)) == 1
    with pytest.raises(ValueError, match="no conversation of 1 is left for training or validation"):
        corpus_of(FEW[:1], name="one.jsonl")


def test_conversations_may_have_a_validation_of_their_own():
    put(FEW[:3], "kept.jsonl")
    origin = replace(put(FEW), validation_paths=(os.path.abspath("kept.jsonl"),))
    corpus = open_corpus(origin, DataConfig(), 64, Path("cache"), encoder_of=plain)
    assert texts_in(corpus.validation) == [reference(chat)[0] for chat in FEW[:3]]
    assert len(texts_in(corpus.training)) == 40
    Path("text.txt").write_text("some text")
    origin = replace(put(FEW), validation_paths=(os.path.abspath("text.txt"),))
    with pytest.raises(ValueError, match="one holds conversations, the other one text"):
        open_corpus(origin, DataConfig(), 64, Path("cache"), encoder_of=plain)


def test_longer_conversations_are_told():
    text, _ = reference(FEW[0])
    assert corpus_of(FEW, 200).remarks == ()
    (remark,) = corpus_of(FEW, len(text) + 1).remarks
    longer = sum(len(reference(chat)[0]) > len(text) + 1 for chat in FEW)
    assert f"chats.jsonl: {longer} of 40 conversations are longer than {len(text) + 1} t" in remark


def test_the_cache_has_tokens_for_each_template(monkeypatch):
    written = []
    tokenize = corpora.tokenize_chats

    def count(*arguments):
        written.append(arguments[2])
        return tokenize(*arguments)

    class Other(PlainTemplate):
        source = "{{ messages }}"

    def other(tokenizer):
        return TemplateEncoder(Other(), tokenizer)

    monkeypatch.setattr(corpora, "tokenize_chats", count)
    origin, hashes = put(FEW), []
    for encoder_of in (plain, other, plain, other):
        corpus = open_corpus(origin, DataConfig(), 64, Path("cache"), encoder_of=encoder_of)
        hashes.append(corpus.sha256)
    assert len(written) == len(set(written)) == len(set(hashes)) == 2
    # A run that goes on has to be of the same template.
    with pytest.raises(ValueError, match="has changed, or is another text"):
        open_corpus(corpus.origin, DataConfig(), 64, Path("cache"), encoder_of=plain)


@together(
    ("data", "told"),
    [
        ({"order": "epochs"}, "order is epochs, which cuts conversations: expected packed"),
        ({"case_noise": 0.1}, "case_noise changes text, and answers are marked in it"),
        ({"space_noise": 0.1}, "space_noise changes text, and answers are marked in it"),
    ],
)
def test_settings_that_would_spoil_conversations_are_refused(data, told):
    with pytest.raises(ValueError, match=told):
        corpus_of(FEW, **data)


def test_conversations_need_a_template():
    with pytest.raises(ValueError, match=r"chats\.jsonl holds conversations, which need a chat te"):
        open_corpus(put(FEW), DataConfig(), 64, Path("cache"))
    with pytest.raises(ValueError, match="order is 'windows', expected packed or buckets"):
        replace(corpus_of(FEW).training, order="windows")


@pytest.mark.parametrize("order", ["windows", "packed"])
def test_conversations_in_a_mix_go_on_from_every_step(order):
    Path("text.txt").write_text("some text, and more of it. " * 40)
    chats, text = (DataOrigin.of_texts([os.path.abspath(name)]) for name in
                   ("chats.jsonl", "text.txt"))  # fmt: skip
    put(FEW)
    origin = DataOrigin.of_mix([replace(chats, weight=1.0), replace(text, weight=0.5)])
    data = DataConfig(order=order)
    corpus = open_corpus(origin, data, 40, Path("cache"), encoder_of=plain)
    assert corpus.template == PlainTemplate.source
    reader, positions, batches = corpus.training.reader(4, 5), [], []
    for _ in range(30):
        positions.append(reader.position)
        batches.append(reader.next_batch())
    for step in (0, 1, 13, 29):
        again = corpus.training.reader(4, 5)
        again.check(positions[step])
        again.position = positions[step]
        for batch in batches[step:]:
            for one, other in zip(again.next_batch(), batch, strict=True):
                np.testing.assert_array_equal(one, other)
    # Texts have no mask of their own here: all of a row is seen, and learned.
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    texts = [row for row in rows if b"some" in bytes(row[0][row[0] < PAD].astype(np.uint8))]
    assert 25 <= len(texts) <= 55
    assert all((starts == 0).all() and (goal != PAD).all() for _, goal, starts in texts)


# --- What is measured -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [30, 64, 300])
def test_only_answers_are_measured_and_none_sees_another_conversation(length):
    model = random_model(make_config(vocab_size=256, sequence_length=length))
    found = open_chats(put(FEW), DataConfig(), ByteTokenizer(), length, plain, Path("cache"))
    dataset, remarks = found
    assert bool(remarks) == (length < 100)
    metrics = evaluate(model, dataset)
    total = count = 0
    for chat in FEW:
        text, predicted = reference(chat)
        # Alone in its row.
        row = np.frombuffer(text[: length + 1], np.uint8).astype(np.int32)
        logits = forward_llm_batch(model, row[None, :-1], logits=True)[0].astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        losses = log_sums - logits[np.arange(row.size - 1), row[1:]]
        flags = np.array(predicted[1 : row.size])
        total, count = total + losses[flags].sum(), count + int(flags.sum())
    assert metrics.tokens == count
    assert abs(metrics.loss - total / count) < 1e-5 * metrics.loss
    some = evaluate(model, dataset, limit=dataset.tokens.size // 3)
    assert 0 < some.tokens < count


def test_texts_without_conversations_are_no_chats():
    Path("text.txt").write_text("some text")
    np.arange(9, dtype="<u2").tofile("tokens.bin")
    for name in ("text.txt", "tokens.bin"):
        origin = DataOrigin.of_texts([os.path.abspath(name)])
        assert open_chats(origin, DataConfig(), ByteTokenizer(), 64, plain, Path("cache")) is None
