"""What is learned of conversations: the tokens that a model is asked with, and its answers."""

import itertools

import numpy as np
import pytest

from helpers.models import make_config, random_model
from helpers.published import golden, with_golden_models
from legacy1bit.data.tokenizer import ByteTokenizer, train_bpe
from legacy1bit.formats import chat_template
from legacy1bit.formats.chat_template import PLAIN, JinjaTemplate, PlainTemplate
from legacy1bit.formats.chat_tokens import TemplateEncoder, chat_encoder
from legacy1bit.formats.conversation import Conversation
from legacy1bit.formats.published import read_template
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig

TURNS = ["  1+1? ", "It is 2.\n\nAnd more.", "And 2 + 2?", "4", "Well?", " yes "]


def messages_of(turns, system=None):
    roles = itertools.cycle(["user", "assistant"])
    begin = [] if system is None else [{"role": "system", "content": system}]
    return begin + [
        {"role": role, "content": text} for role, text in zip(roles, turns, strict=False)
    ]


def asked(generator, template, messages):
    """For each answer, the tokens that the decoder reads before it, in a conversation."""
    conversation = Conversation(generator, template, SamplingConfig(), 4)
    if messages[0]["role"] == "system":
        conversation.system, messages = messages[0]["content"], messages[1:]
    found = []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        conversation.messages.append(question)
        found.append(conversation._tokens())
        conversation.finish(answer["content"])
    return found


def answers_of(parts):
    """For each run of predicted tokens: all tokens before it, and it."""
    for tokens, predicted in parts:
        assert tokens.dtype == np.int32
        edges = np.flatnonzero(np.diff(predicted, prepend=False, append=False)).tolist()
        assert edges[-1] == predicted.size, "nothing stands behind the last answer"
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            yield tokens[:begin].tolist(), tokens[begin:end].tolist()


def check(generator, template, messages):
    """Before each answer stands what the model is asked with; return the answers, and the parts."""
    parts = TemplateEncoder(template, generator.tokenizer).encode(messages)
    found = list(answers_of(parts))
    assert [read for read, _ in found] == asked(generator, template, messages)
    return [answer for _, answer in found], parts


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def generator(request):
    tokenizer = ByteTokenizer()
    if request.param == "bpe":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
        tokenizer = train_bpe([b"User: It is 2.\nAssistant: yes, it is.\nUser: " * 9], 300)
    config = make_config(vocab_size=tokenizer.vocab_size, sequence_length=300)
    return Generator(random_model(config), tokenizer)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_plain_answers_end_where_chat_ends_them(generator, system, count):
    messages = messages_of(TURNS[:count], system)
    answers, parts = check(generator, PlainTemplate(), messages)
    texts = [generator.tokenizer.decode(answer).decode() for answer in answers]
    stop = PlainTemplate.stop[0]
    assert texts == [f"{text.strip()}{stop}" for text in TURNS[1:count:2]]
    if generator.tokenizer.kind == "bytes":
        assert len(parts) == 1


@pytest.mark.parametrize("answer", [True, False])
def test_the_plain_template_is_written_for_jinja(answer):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    template = JinjaTemplate(PLAIN)
    for count in (1, 2, 5):
        messages = messages_of(["a\nb ", "<b>'\"{{ x }}"] * 3, " s ")[:count]
        assert template.render(messages, answer) == PlainTemplate().render(messages, answer)
    template.close()


HEADS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
# As Qwen3's: thoughts of the last answer only.
LAST = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think>"
    "</think>{% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)


def bytes_of(source, messages):
    """The parts of a conversation through a template in Jinja, as text."""
    encoder = TemplateEncoder(JinjaTemplate(source), ByteTokenizer())
    try:
        return [
            (bytes(tokens.astype(np.uint8)).decode(), predicted.tolist())
            for tokens, predicted in encoder.encode(messages)
        ]
    finally:
        encoder.close()


def test_what_a_template_shows_of_the_last_answer_only_makes_parts():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    parts = bytes_of(LAST, messages_of(["a", "b", "c", "d"]))
    assert [text for text, _ in parts] == [
        "[user]a\n[assistant]<think></think>b\n",
        "[user]a\n[assistant]b\n[user]c\n[assistant]<think></think>d\n",
    ]
    for text, predicted in parts:
        begin = text.rindex("<think>")
        assert predicted == [False] * begin + [True] * (len(text) - begin)


def test_thoughts_are_learned_and_do_not_come_back():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    source = HEADS + "{% if add_generation_prompt %}[assistant]{% endif %}"
    parts = bytes_of(source, messages_of(["a", "<think>hm</think>\n\nb ", "c", "d"]))
    assert [text for text, _ in parts] == [
        "[user]a\n[assistant]<think>hm</think>\n\nb \n",
        "[user]a\n[assistant]b\n[user]c\n[assistant]d\n",
    ]


@pytest.mark.parametrize(
    "source",
    [
        HEADS + "{% if add_generation_prompt %}[Assistant]{% endif %}",
        HEADS + "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
        "{% if add_generation_prompt %}!{% endif %}" + HEADS,
    ],
)
def test_a_template_that_asks_otherwise_than_it_writes_is_refused(source):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    with pytest.raises(ValueError, match="asks for an answer with another text than it writes"):
        bytes_of(source, messages_of(["a", "b"]))


def test_many_conversations_are_rendered_in_one_process(monkeypatch):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    started = []
    start = chat_template.start_child

    def count(*arguments):
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(chat_template, "start_child", count)
    source = HEADS + "{% if add_generation_prompt %}[assistant]{% endif %}"
    encoder = TemplateEncoder(JinjaTemplate(source), ByteTokenizer())
    for number in range(50):
        encoder.encode(messages_of([f"{number}", "b"]))
    (process,) = started
    assert process.poll() is None
    encoder.close()
    assert process.poll() is not None


def test_tokens_depend_on_the_template_its_names_and_what_ends_answers():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    other = ByteTokenizer()
    other.stop_tokens = (3,)
    hashes = [
        TemplateEncoder(template, tokenizer).sha256
        for template, tokenizer in (
            (PlainTemplate(), ByteTokenizer()),
            (JinjaTemplate(PLAIN), ByteTokenizer()),
            (JinjaTemplate(HEADS), ByteTokenizer()),
            (JinjaTemplate(HEADS, {"bos_token": "<s>"}), ByteTokenizer()),
            (JinjaTemplate(HEADS), other),
        )
    ]
    assert len(set(hashes)) == 5
    assert TemplateEncoder(PlainTemplate(), ByteTokenizer()).sha256 == hashes[0]


def test_a_model_without_a_template_gets_the_plain_one(tmp_path):
    for folder in (None, tmp_path):
        assert isinstance(chat_encoder(folder, ByteTokenizer()).template, PlainTemplate)
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert isinstance(chat_encoder(tmp_path, ByteTokenizer()).template, PlainTemplate)
    assert isinstance(read_template(tmp_path, ByteTokenizer()), PlainTemplate)


@with_golden_models
def test_published_models_learn_what_they_are_asked():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    seen = 0
    for path, about in golden():
        cases = [
            case
            for case in (about.get("chat") or {}).get("renderings", ())
            if case["add_generation_prompt"]
        ]
        if not cases:
            continue
        with Generator.load(path) as generator:
            tokenizer = generator.tokenizer
            template = read_template(path, tokenizer)
            for case in cases:
                # Names of special tokens in a message are text.
                (end, *_), said = tokenizer.stop_tokens, "Four."
                name = next(n for n, token in tokenizer.special_tokens.items() if token == end)
                for content in (said, f"a{name}b"):
                    answer = {"role": "assistant", "content": content}
                    answers, parts = check(generator, template, [*case["messages"], answer])
                    *_, (read, last) = answers_of(parts)
                    # As other software tokenizes it.
                    if not any("<think>" in one["content"] for one in case["messages"]):
                        assert read == case["ids"], path
                    assert last[-1] in tokenizer.stop_tokens, path
                    assert not set(last[:-1]) & {*tokenizer.stop_tokens}
                    assert tokenizer.decode(last).decode().strip() == content
                    assert len(answers) == sum(
                        one["role"] == "assistant" for one in [*case["messages"], answer]
                    )
                    seen += 1
            template.close()
    assert seen
