"""Conversations: what stays in the cache, answers that are left, other software's tokens."""

import copy

import pytest

from helpers.conversations import answers
from helpers.models import make_config, random_model
from helpers.published import golden, with_golden_models
from legacy1bit.data.tokenizer import ByteTokenizer
from legacy1bit.formats.chat_template import JinjaTemplate, PlainTemplate
from legacy1bit.formats.conversation import Conversation, without_thoughts
from legacy1bit.formats.published import read_template
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig

SAMPLING = SamplingConfig()


@pytest.fixture(scope="module")
def model():
    return random_model(make_config(vocab_size=256, sequence_length=250))


@pytest.fixture
def generator(model):
    return Generator(model)


def test_the_beginning_of_the_conversation_stays_in_the_cache(generator):
    conversation = Conversation(generator, PlainTemplate(), SAMPLING, 20)
    conversation.seed = 3
    said = []
    for message in ("Hi", "How are you?", "Well."):
        before = len(conversation._history)
        stream = conversation.ask(message)
        # All but what the answer's end and the message added.
        assert len(conversation._cached) >= before - 20
        assert before == 0 or len(conversation._cached) > 10
        said.append("".join(stream))
        conversation.finish(said[-1])
    assert said == answers(generator, "Hi", "How are you?", "Well.")


def test_an_answer_may_be_left(generator):
    conversation = Conversation(generator, PlainTemplate(), SAMPLING, 20)
    conversation.seed = 3
    stream = conversation.ask("Hi")
    part = next(stream) + next(stream)
    stream.close()
    conversation.finish(part)
    text = "".join(conversation.ask("Ho"))
    prompt = f"User: Hi\nAssistant: {part.strip()}\nUser: Ho\nAssistant: "
    assert text == generator.complete(prompt, 20, seed=4, stop=["\nUser:"]).text


def test_stop_tokens_end_an_answer(model):
    tokenizer = ByteTokenizer()
    drawn = list(
        Generator(model).tokens(Generator(model).encode("User: a\nAssistant: "), 20, seed=3)
    )
    tokenizer = copy.copy(tokenizer)
    tokenizer.stop_tokens = (drawn[7],)
    conversation = Conversation(Generator(model, tokenizer), PlainTemplate(), SAMPLING, 20)
    conversation.seed = 3
    text = "".join(conversation.ask("a"))
    assert text == bytes(drawn[: drawn.index(drawn[7])]).decode("utf-8", "replace")


@with_golden_models
def test_conversations_have_the_tokens_of_other_software():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    seen = 0
    for path, about in golden():
        renderings = (about.get("chat") or {}).get("renderings", ())
        cases = [case for case in renderings if case["add_generation_prompt"]]
        if not cases:
            continue
        with Generator.load(path) as generator:
            template = read_template(path, generator.tokenizer)
            for case in cases:
                conversation = Conversation(generator, template, SAMPLING, 8)
                conversation.messages = list(case["messages"])
                assert conversation._tokens() == case["ids"], path
                conversation.messages.pop()
                # What is typed is no special token.
                end, *_ = generator.tokenizer.stop_tokens
                ends = conversation._tokens().count(end)
                said = [name for name, token in generator.tokenizer.special_tokens.items()
                        if token == end]  # fmt: skip
                conversation.messages.append({"role": "user", "content": f"a{said[0]}b"})
                found = conversation._tokens()
                assert found.count(end) - ends in (0, 1), path
                assert f"a{said[0]}b" in generator.tokenizer.decode(found).decode()
                conversation.messages.pop()
                text = "".join(conversation.ask("Hello?"))
                conversation.finish(text)
                seen += 1
            template.close()
    assert seen


class Closing(PlainTemplate):
    """A template that knows whether it was closed."""

    closed = False

    def close(self):
        self.closed = True


def test_answers_are_taken_in(generator):
    template = Closing()
    with Conversation(generator, template, SAMPLING, 20) as conversation:
        conversation.seed = 3
        said = [conversation.answer("Hi"), "".join(conversation.stream("How are you?"))]
        said.append(conversation.answer("Well."))
        assert not template.closed
    assert template.closed
    assert said == answers(generator, "Hi", "How are you?", "Well.")
    assert [one["content"] for one in conversation.messages[1::2]] == [
        text.strip() for text in said
    ]


def test_a_stream_that_is_left_is_taken_in_as_far_as_it_came(generator):
    conversation = Conversation(generator, PlainTemplate(), SAMPLING, 20)
    conversation.seed = 3
    stream = conversation.stream("Hi")
    assert conversation.messages == []
    part = next(stream) + next(stream)
    stream.close()
    assert [one["content"] for one in conversation.messages] == ["Hi", part.strip()]
    prompt = f"User: Hi\nAssistant: {part.strip()}\nUser: Ho\nAssistant: "
    expected = generator.complete(prompt, 20, seed=4, stop=["\nUser:"]).text
    assert conversation.answer("Ho") == expected
    # A message that is refused is no part of it.
    with pytest.raises(ValueError, match="the message has"):
        conversation.answer("x" * 300)
    assert len(conversation.messages) == 4


def test_a_conversation_is_not_copied(generator):
    conversation = Conversation(generator, PlainTemplate(), SAMPLING, 20)
    with pytest.raises(TypeError, match="a conversation cannot be copied"):
        copy.copy(conversation)


@pytest.mark.parametrize(
    ("answer", "begun", "expected"),
    [
        ("2", False, "2"),
        ("<think>\n1 + 1\n</think>\n\n2", False, "\n\n2"),
        ("\n<think></think>2 </think> 3", False, "2 </think> 3"),
        ("1 + 1\n</think>\n\n2", True, "\n\n2"),
        ("1 + 1\n</think>\n\n2", False, "1 + 1\n</think>\n\n2"),
        ("2 <think> 3 </think>", False, "2 <think> 3 </think>"),
        ("<think>\n1 + 1", False, None),
        ("1 + 1", True, None),
    ],
)
def test_what_a_model_thinks_is_no_answer(answer, begun, expected):
    assert without_thoughts(answer, begun) == expected


# As Qwen3's: the last line says whether the model thinks.
THINKING = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def conversation_of(generator, source, thinking=None):
    conversation = Conversation(generator, JinjaTemplate(source), SAMPLING, 8)
    if thinking is not None:
        conversation.set_thinking(thinking)
    return conversation


@pytest.mark.parametrize(
    ("thinking", "end"), [(None, b":"), (True, b":"), (False, b":<think></think>")]
)
def test_thinking_is_a_variable_of_the_template(generator, thinking, end):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    conversation = conversation_of(generator, THINKING, thinking)
    conversation.messages.append({"role": "user", "content": "Hi"})
    tokens = conversation._tokens()
    assert bytes(tokens).endswith(b"user:Hi\nassistant" + end)
    conversation.close()


def test_thoughts_do_not_come_back(generator):
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    for source, begun in ((THINKING, False), (f"{THINKING}<think>\n", True)):
        conversation = conversation_of(generator, source)
        conversation.ask("1 + 1?").close()
        assert conversation.finish(f"{'' if begun else '<think>'}One and one.</think>\n\n2 ")
        assert conversation.messages[-1] == {"role": "assistant", "content": "2"}
        conversation.ask("And 2 + 2?").close()
        assert not conversation.finish("<think>Two and")
        assert conversation.messages[-1] == {"role": "assistant", "content": ""}
        conversation.messages.append({"role": "user", "content": "Well?"})
        text = bytes(conversation._tokens()).decode()
        assert text.startswith("user:1 + 1?\nassistant:2\nuser:And 2 + 2?\nassistant:\nuser:Well?")
        assert "One and one" not in text
        conversation.close()
