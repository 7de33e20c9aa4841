"""Chat templates: the texts that other software makes, and what strangers' templates may not do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.cases import together
from helpers.paths import ROOT
from helpers.published import golden, with_golden_models
from legacy1bit.data import published_tokenizer
from legacy1bit.formats import chat_template
from legacy1bit.formats.chat_template import JinjaTemplate, PlainTemplate

pytest.importorskip("jinja2", reason="jinja2 is not installed")

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  1+1?\n<b>&\"'\u00e9\U0001f642 "},
    {"role": "assistant", "content": "2"},
]


def render(source, messages=CHAT, answer=True):
    template = JinjaTemplate(source, NAMES)
    try:
        return template.render(messages, answer)
    finally:
        template.close()


@with_golden_models
def test_texts_are_those_of_other_software():
    seen = 0
    for path, about in golden():
        chat = about.get("chat") or {}
        if chat.get("template") is None:
            continue
        said = about["tokenizer"]
        names = {"bos_token": said["bos"][0], "eos_token": said["eos"][0]}
        template = JinjaTemplate(published_tokenizer._checked_template(chat["template"]), names)
        for case in chat["renderings"]:
            text = template.render(case["messages"], case["add_generation_prompt"])
            assert text == case["rendered"], path
            seen += 1
        template.close()
    assert seen


def test_the_wrong_template_of_bitnet_is_replaced():
    wrong = (
        "{% for m in messages %}{{ 'Human: ' + m.content + '\n\nBITNETAssistant: ' }}{% endfor %}"
    )
    expected = "<s>System: Be brief.<|eot_id|>User: 1+1?\n<b>&\"'\u00e9\U0001f642<|eot_id|>"
    template = JinjaTemplate(published_tokenizer._checked_template(wrong), NAMES)
    assert template.render(CHAT[:2]) == expected + "Assistant: "
    assert template.render(CHAT, False) == expected + "Assistant: 2<|eot_id|>"
    assert template.stop == ()
    template.close()
    assert published_tokenizer._checked_template(None) is None


def test_a_plain_template():
    template = PlainTemplate()
    assert template.render(CHAT[1:]) == (
        "User: 1+1?\n<b>&\"'\u00e9\U0001f642\nAssistant: 2\nAssistant: "
    )
    assert template.stop == ("\nUser:",)


@together(
    "source, expected",
    [
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}", "<s></s>"),
        ("{{ tools is none }}{{ messages[0].name is defined }}", "TrueFalse"),
        ("{% for m in messages %}\n  {{ m.role[:1] }}\n  {% endfor %}\n", "  s\n  u\n  a\n"),
        ("{{ messages[1].content.strip().split('\n')[0] }}", "1+1?"),
        ("{{ messages[1]['content'] | trim }}", "1+1?\n<b>&\"'\u00e9\U0001f642"),
        ("{{ {'a': [1, '\u00e9<']} | tojson }}", '{"a": [1, "\u00e9<"]}'),
        ("{{ {'a': 1} | tojson(indent=1) }}", '{\n "a": 1\n}'),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}"
         "{{ n.x }}", "4"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
         "12"),
        ("{% for m in messages %}{{ loop.first }}{{ loop.previtem is defined }} {% endfor %}",
         "TrueFalse FalseTrue FalseTrue "),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') }}{{ f('b') }}", "<a><b>"),
        ("{% generation %}{{ 1 }}{% endgeneration %}2", "12"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | map(attribute='role') | join(',') }}", "system,user,assistant"),
        ("{{ 'a b'.title() }}{{ 'ab'.startswith('a') }}{{ ['a'] + ['b'] }}", "A BTrue['a', 'b']"),
        ("{{ '%s-%d' % ('a', 3) }}{{ 'ab'[::-1] }}{{ messages[1:] | length }}", "a-3ba2"),
        ("{{ '</think>' in 'a</think>b' }}{{ 'a</think>b'.split('</think>')[-1] }}", "Trueb"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)  # fmt: skip
def test_what_templates_use(source, expected):
    assert render(source) == expected


ATTACKS = {
    # Time.
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}":
        "takes more than",
    "{{ 10 ** (10 ** 10) }}": "takes more than",
    "{% for i in range(100001) %}{% endfor %}": "fails: OverflowError",
    # Memory.
    "{{ 'a' * 10 ** 10 }}": "too much memory",
    "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}":
        "too much memory",
    "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}":
        "too much memory",
    "{{ '%10000000000d' % 1 }}": "too much memory",
    "{{ 'a' | indent(10 ** 10) }}": "too much memory",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}": "too much memory",
    "{{ [[0] * 10 ** 7] * 10 ** 3 | string }}": "",
    # Output.
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "more than 1048576 characters",
    # Recursion.
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself too often",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}": "calls itself too often",
    "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}": "",
    "{{ " + "[" * 900 + "]" * 900 + " }}": "",
    "{% if 1 %}" * 5000 + "{% endif %}" * 5000: "",
    "{{ 1" + " + 1" * 30000 + " }}": "",
    # Attributes.
    "{{ ''.__class__ }}": "attribute '__class__' of a str",
    "{{ ''['__class__'] }}": "attribute '__class__' of a str",
    "{{ '' | attr('__class__') }}": "is wrong in line 1: No filter named 'attr'",
    "{{ messages | map(attribute='__class__') | list }}": "attribute '__class__'",
    "{{ [messages] | map(attribute='0.__class__') | list }}": "attribute '__class__'",
    "{{ [''] | sort(attribute='__class__') }}": "attribute '__class__'",
    "{{ [''] | groupby('__class__') }}": "attribute '__class__'",
    "{{ [''] | selectattr('__class__') | list }}": "attribute '__class__'",
    "{{ raise_exception.__globals__ }}": "attribute '__globals__' of a function",
    "{{ range.__code__ }}": "attribute '__code__' of a function",
    "{{ dict.fromkeys(messages) }}": "attribute 'fromkeys' of a type",
    "{{ dict.__subclasses__() }}": "attribute",
    "{{ namespace.__init__ }}": "attribute '__init__' of a type",
    "{% set n = namespace() %}{{ n.__init__ }}": "",
    "{% set n = namespace() %}{{ n['_Namespace__attrs'] }}": "attribute",
    "{% for m in messages %}{{ loop._iterator }}{% endfor %}": "attribute '_iterator'",
    "{% macro f() %}{% endmacro %}{{ f._func }}": "attribute '_func' of a Macro",
    "{{ self._TemplateReference__context }}": "attribute",
    "{{ '{0.__class__}'.format(1) }}": "attribute 'format' of a str",
    "{{ '{x}'.format_map({}) }}": "attribute 'format_map' of a str",
    "{{ 'a'.encode() }}": "attribute 'encode' of a str",
    "{{ (1).to_bytes }}": "attribute 'to_bytes' of a int",
    "{{ messages.append(1) }}": "attribute 'append' of a list",
    "{{ messages.pop() }}": "attribute 'pop' of a list",
    "{{ messages[0].update({}) }}": "attribute 'update' of a dict",
    "{{ messages[0].clear() }}": "attribute 'clear' of a dict",
    # Other files and functions.
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{% extends 'x' %}": "no loader",
    "{{ cycler('a') }}": "'cycler' is undefined",
    "{{ lipsum() }}": "'lipsum' is undefined",
    "{{ open('/etc/passwd') }}": "'open' is undefined",
    "{{ __import__('os') }}": "'__import__' is undefined",
    "{{ 1 | pprint }}": "No filter named 'pprint'",
    "{{ x.y }}": "'x' is undefined",
    # Mistakes.
    "{% if %}": "is wrong in line 1",
    "{{ 1 / 0 }}": "fails: ZeroDivisionError",
    "{{ raise_exception('No\nsystem messages') }}": "refuses the conversation: No system messages",
}  # fmt: skip


@together("source", ATTACKS)
def test_attacks_are_refused_in_one_line_and_soon(source):
    begin, text, told = time.monotonic(), "", ""
    try:
        text = render(source)
    except ValueError as error:
        told = str(error)
    # A deep expression may be within what the compiler takes; its text is short then.
    assert told or not ATTACKS[source]
    assert ATTACKS[source] in told
    assert "\n" not in told
    assert len(told) < 700
    assert len(text) < 100000
    # Alone it is a second and a half at most; this is not a measurement.
    assert time.monotonic() - begin < 60


def test_a_template_goes_on_after_one_it_refuses():
    template = JinjaTemplate("{{ raise_exception('x') if messages | length > 1 else 'ok' }}")
    for _ in range(3):
        with pytest.raises(ValueError, match="refuses the conversation: x"):
            template.render(CHAT)
        assert template.render(CHAT[:1]) == "ok"
    # The process has ended.
    template._process.kill()
    template._process.wait()
    with pytest.raises(ValueError, match="SIGKILL"):
        template.render(CHAT[:1])
    assert template.render(CHAT[:1]) == "ok"
    template.close()
    assert template.render(CHAT[:1]) == "ok"
    template.close()


def test_long_conversations_are_rendered():
    long = "\u00e9" * 3_000_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": long}]) == long


def test_a_long_template_is_refused():
    with pytest.raises(ValueError, match="has 300000 characters, expected at most 262144"):
        JinjaTemplate("x" * 300000)


def test_without_jinja2_or_a_process_it_says_so(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(ValueError, match=r"chat templates need jinja2.*pip install jinja2"):
            JinjaTemplate("x")
    monkeypatch.setattr(chat_template, "start_child", lambda *_: None)
    with pytest.raises(ValueError, match="needs a process"):
        render("x")


def test_the_process_outlives_a_terminals_interrupt_and_ends_with_its_parent():
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "legacy1bit.formats.chat_template"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"legacy1bit.formats.chat_template: ready\n"
        process.send_signal(signal.SIGINT)
        request = json.dumps({"source": "a{{ b }}", "variables": {"b": 1}}).encode()
        process.stdin.write(len(request).to_bytes(4) + request)
        process.stdin.flush()
        size = int.from_bytes(process.stdout.read(4))
        assert json.loads(process.stdout.read(size)) == {"text": "a1"}
        process.stdin.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""
