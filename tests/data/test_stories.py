"""The story grammar: what it writes, that it reads the same back, and that its entropy is exact."""

import collections
import itertools
import math
import random
import re
import statistics

import numpy as np
import pytest

from legacy1bit.data import stories

SAMPLE = stories.generate_stories(3000, seed=7)
FEW = SAMPLE[:40]


@pytest.fixture(autouse=True)
def _each_story_every_time(monkeypatch):
    for name in ("generate_stories", "endings"):
        monkeypatch.setattr(stories, name, getattr(stories, name).__wrapped__)


# Small enough to list whole, and it has all that the stories use: words and templates drawn
# without repetition, labels, forms, articles, and alternatives of unequal entropy and length.
SMALL_RULES = {
    "name": "Mia Tom Abe",
    "thing": "urn cup axe",
    "say": ("Oh!", "A {thing}!", '"Ah, {thing}"'),
    "plot": (
        "saw {friend=name}. {hero:He} has a {thing}. {say} {say}",
        "hid an {prize=thing}. {say} {hero}'s {prize} is {hero:his} {prize}.",
    ),
    "text": ("One {hero=name} {plot}", "{hero=name} {plot}", "{say}"),
}
SMALL_FORMS = {
    "He": {"Mia": "She", "Tom": "He", "Abe": "He"},
    "his": {"Mia": "her", "Tom": "his", "Abe": "his"},
}


@pytest.fixture(scope="module")
def small():
    return stories.Grammar(SMALL_RULES, SMALL_FORMS)


@pytest.fixture(scope="module")
def small_texts(small):
    """Every text of the small grammar with its probability."""
    return [(d, math.exp(d.log_probability)) for d in small.derivations()]


def last_sentence(story):
    """Return where the last sentence starts: after the last ending mark inside the story."""
    for start in range(len(story) - 2, 0, -1):
        ending = story[:start].removesuffix(" ").removesuffix('"')
        if story[start - 1] == " " and ending[-1] in ".?!" and not story[start].islower():
            return start
    raise AssertionError(story)


# The machinery, on a grammar that can be listed.


def test_derivations_probabilities_sum_to_one(small_texts):
    assert math.fsum(p for _, p in small_texts) == pytest.approx(1, abs=1e-12)


def test_derivations_texts_differ(small_texts):
    texts = [d.text for d, _ in small_texts]
    assert len(texts) > 500
    assert len(set(texts)) == len(texts)


def test_derivations_no_text_begins_another(small_texts):
    texts = sorted(d.text for d, _ in small_texts)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_entropy_is_that_of_the_listed_texts(small, small_texts):
    assert small.entropy() == pytest.approx(-math.fsum(p * math.log(p) for _, p in small_texts))


def test_mean_length_is_that_of_the_listed_texts(small, small_texts):
    assert small.mean_length() == pytest.approx(math.fsum(p * len(d.text) for d, p in small_texts))


def test_length_bounds_enclose_the_listed_texts(small, small_texts):
    shortest, longest = small.length_bounds()
    lengths = [len(d.text) for d, _ in small_texts]
    assert shortest <= min(lengths) <= max(lengths) <= longest


def test_grammar_parse_reads_every_listed_text(small, small_texts):
    for derivation, _ in small_texts:
        assert small.parse(derivation.text) == derivation


def test_grammar_parse_accepts_nothing_else(small, small_texts):
    """All texts that differ from a listed one in one word, or lack one, are listed or refused."""
    texts = {d.text for d, _ in small_texts}
    words = sorted({word for text in texts for word in re.findall(r"[\w']+", text)})
    for text in random.Random(0).sample(sorted(texts), 40):
        spans = [m.span() for m in re.finditer(r"[\w']+", text)]
        for start, stop in spans:
            for word in ["", *words]:
                changed = text[:start] + word + text[stop:]
                if changed in texts:
                    assert small.parse(changed).text == changed
                else:
                    with pytest.raises(ValueError, match=r"^text: expected"):
                        small.parse(changed)


def test_generate_has_the_stated_probabilities(small, small_texts):
    rng = random.Random(3)
    count = 20_000
    counts = collections.Counter(small.generate(rng).text for _ in range(count))
    assert set(counts) <= {d.text for d, _ in small_texts}
    squares = math.fsum((counts[d.text] - count * p) ** 2 / (count * p) for d, p in small_texts)
    # Chi-square with k degrees of freedom has mean k and variance 2k; the small expected counts
    # add the sum of 1/(count p) to the variance of a multinomial sample.
    k = len(small_texts) - 1
    spread = math.sqrt(2 * k + math.fsum(1 / (count * p) for _, p in small_texts))
    assert abs(squares - k) < 5 * spread


def test_generate_keeps_its_sequence(small):
    rng = random.Random(1)
    assert [small.generate(rng).text for _ in range(3)] == [
        "One Abe hid an urn. A cup! Abe's urn is his urn.",
        'Abe saw Mia. He has an axe. An urn! "Ah, cup"',
        "An urn!",
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "at least one rule"),
        ({"a": ""}, "at least one option"),
        ({"a": "cat Cat cat"}, "begin with the word 'cat'"),
        ({"a": "cat hot-dog"}, "'hot-dog'"),
        ({"a": "cat an"}, "'an' is an article"),
        ({"a": ("The cat.", "The dog.")}, "begin with the word 'The'"),
        ({"a": ("A cat.", "cat!")}, "begin with the word 'cat'"),
        ({"a": "cat dog", "b": ("{a} ran.", "An {a} ran.")}, "begin with the word"),
        ({"a": "cat dog", "b": ("Go!", "..."), "c": ("{b}",)}, "has no word"),
        ({"a": "cat", "b": ("{x=a} {c}.",), "c": ("So {b}",)}, "'c': neither"),
        ({"a": "cat", "b": ("{x} ran", "so"), "c": ("{x=a} {b}",)}, "repeated word"),
        ({"a": "cat", "b": ("The {x} ran.",)}, "'x': neither"),
        ({"a": "cat", "b": ("{c=a} {c:big}.",)}, "unknown form 'big'"),
        ({"a": "cat", "b": ("{c=a} {c:his}.",)}, "nothing for the word 'cat'"),
        ({"a": "Mia cat", "b": ("{c=a} {c:his}.",)}, "nothing for the word 'cat'"),
        ({"a": "cat", "b": ("{x=d}.",)}, "no rule 'd'"),
        ({"a": "cat", "b": ("{a=a}.",)}, "name of a rule"),
        ({"a": ("Ho ho",), "b": ("A {a}.",)}, "rule of words"),
        ({"a": ("Ho ho",), "b": ("{x=a}.",)}, "rule of words"),
        ({"a": "cat dog", "b": ("{a}s ran.",)}, "no space after"),
        ({"a": "cat dog", "b": ("The{a} ran.",)}, "no space before"),
        ({"a": "cat dog", "b": ("The {a}{a} ran.",)}, "no space before"),
        ({"a": "cat dog", "b": ("{a}, {a}, {a}.",)}, "more options than it has"),
        ({"a": "cat dog", "b": ("{a", "b")}, "one line of ASCII"),
        ({"a": ("Caf\u00e9",)}, "one line of ASCII"),
        ({"a": ("One\nTwo",)}, "one line of ASCII"),
        ({"a": ("I saw a",)}, "nothing after the article"),
    ],
)
def test_grammar_refuses(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stories.Grammar(rules)


# Writing and reading stories.


def test_generate_stories_repeats_by_seed():
    assert stories.generate_stories(3000, seed=7) == SAMPLE


def test_generate_stories_first_ones_do_not_depend_on_count():
    assert stories.generate_stories(10, seed=7) == SAMPLE[:10]


def test_generate_stories_differ_by_seed():
    assert not set(SAMPLE) & set(stories.generate_stories(3000, seed=8))
    assert len(set(SAMPLE)) == len(SAMPLE)


def test_generate_stories_accepts_numpy_integers_and_zero():
    assert stories.generate_stories(np.int64(2), np.int32(7)) == SAMPLE[:2]
    assert stories.generate_stories(0, 0) == []


@pytest.mark.parametrize("bad", [True, 1.0, "1", None])
def test_generate_stories_refuses_kinds(bad):
    with pytest.raises(TypeError, match="count: expected an int"):
        stories.generate_stories(bad, 0)
    with pytest.raises(TypeError, match="seed: expected an int"):
        stories.generate_stories(1, bad)


def test_generate_stories_refuses_negative_numbers():
    with pytest.raises(ValueError, match="count: expected at least 0, got -1"):
        stories.generate_stories(-1, 0)
    with pytest.raises(ValueError, match="seed: expected at least 0, got -2"):
        stories.generate_stories(1, -2)


def test_corpus_puts_each_story_on_a_line():
    assert stories.corpus(FEW).split("\n") == [*FEW, ""]
    assert stories.corpus([]) == ""
    with pytest.raises(TypeError):
        stories.corpus(FEW[0])


def test_parse_returns_the_choices_made():
    rng = random.Random(11)
    for _ in range(500):
        derivation = stories.STORIES.generate(rng)
        assert stories.parse(derivation.text) == derivation


def test_generate_stories_use_every_option():
    used = {(c.rule, c.option) for s in SAMPLE for c in stories.parse(s).choices}
    for rule, options in stories.RULES.items():
        count = len(options.split() if isinstance(options, str) else options)
        assert {option for name, option in used if name == rule} == set(range(count)), rule


def test_generate_stories_names_are_uniform():
    """The hero's name is the first draw from its rule, the helper's the second without it."""
    for label in ("hero", "helper"):
        counts = collections.Counter(stories.parse(s).words[label] for s in SAMPLE)
        names = stories.RULES["name"].split()
        expected = len(SAMPLE) / len(names)
        squares = sum((counts[name] - expected) ** 2 / expected for name in names)
        assert abs(squares - (len(names) - 1)) < 5 * math.sqrt(2 * (len(names) - 1))


def test_is_story_accepts_what_was_generated():
    assert all(map(stories.is_story, SAMPLE))


def test_is_story_refuses_beginnings():
    for story in FEW[:20]:
        assert not any(stories.is_story(story[:stop]) for stop in range(len(story)))


@pytest.mark.parametrize("text", ["", " ", ".", "a", "A", "Mia", '"', "\n", "Mi\u00e4 the baker"])
def test_is_story_refuses_scraps(text):
    assert not stories.is_story(text)


def test_is_story_refuses_changes():
    for story in FEW:
        words = stories.parse(story).words
        hero, helper, thing = words["hero"], words["helper"], words["object"]
        head, tail = story[: last_sentence(story)], story[last_sentence(story) :]
        for changed in (
            story + "\n",
            story + " ",
            f"{story} {story}",
            story.replace(hero, helper),
            story.replace(" a ", " an ", 1),
            story.replace(f" {thing}", " thing"),
            head + tail.replace(hero, helper),
            head + tail.replace(thing, "axe" if thing != "axe" else "bag"),
            story.lower(),
        ):
            assert changed == story or not stories.is_story(changed)


@pytest.mark.parametrize("function", [stories.is_story, stories.parse, stories.log_probability])
def test_parse_refuses_kinds(function):
    with pytest.raises(TypeError, match="expected a str"):
        function(SAMPLE[0].encode())


def test_parse_refuses_with_the_place():
    with pytest.raises(ValueError, match="expected 'story' at 0, got 'It was a dar'"):
        stories.parse("It was a dark and stormy night.")
    with pytest.raises(ValueError, match=f"at {len(SAMPLE[0])}, got '!'"):
        stories.log_probability(SAMPLE[0] + "!")


# How likely they are.


def test_log_probability_is_the_product_of_choices():
    for story in FEW:
        choices = stories.parse(story).choices
        product = math.prod(choice.free for choice in choices)
        assert stories.log_probability(story) == pytest.approx(-math.log(product))
        drawn = collections.Counter()
        for choice in choices:
            options = stories.RULES[choice.rule]
            total = len(options.split() if isinstance(options, str) else options)
            assert choice.free == total - drawn[choice.rule]
            drawn[choice.rule] += 1


def test_entropy_per_story_is_the_mean_over_samples():
    surprises = [-stories.log_probability(story) for story in SAMPLE]
    sigma = statistics.stdev(surprises) / math.sqrt(len(surprises))
    assert abs(statistics.fmean(surprises) - stories.entropy_per_story()) < 4 * sigma


def test_mean_story_length_is_the_mean_over_samples():
    lengths = [len(story) + 1 for story in SAMPLE]
    sigma = statistics.stdev(lengths) / math.sqrt(len(lengths))
    assert abs(statistics.fmean(lengths) - stories.mean_story_length()) < 4 * sigma


def expansions(text, probability=1.0):
    """Every way to write templates out, down to rules of words, with its probability."""
    for slot in re.finditer(r"\{(?:\w+=)?(\w+)\}", text):
        options = stories.RULES.get(slot[1], "")
        if type(options) is tuple:
            for option in options:
                written = text[: slot.start()] + option + text[slot.end() :]
                yield from expansions(written, probability / len(options))
            return
    yield text, probability


def test_entropy_per_story_is_that_of_the_templates():
    """Worked out from the text of the rules: a word costs the log of how many are still free."""
    words = {rule: len(text.split()) for rule, text in stories.RULES.items() if type(text) is str}
    *_, start = stories.RULES
    expected = []
    for text, probability in expansions(f"{{{start}}}"):
        drawn = collections.Counter()
        surprise = -math.log(probability)
        for rule in re.findall(r"\{(?:\w+=)?(\w+)\}", text):
            if rule in words:
                surprise += math.log(words[rule] - drawn[rule])
                drawn[rule] += 1
        expected.append(probability * surprise)
    assert len(expected) >= 5
    assert stories.entropy_per_story() == pytest.approx(math.fsum(expected), rel=1e-12)


def test_entropy_per_character_is_dense():
    """Enough choices that a model must learn words, far below what letters alone would cost."""
    ratio = stories.entropy_per_story() / stories.mean_story_length()
    assert stories.entropy_per_character() == ratio
    letters = collections.Counter(stories.corpus(SAMPLE))
    shares = [count / letters.total() for count in letters.values()]
    assert 0.05 < ratio / -math.fsum(share * math.log(share) for share in shares) < 0.2


def test_story_length_bounds_fit_a_context_of_256():
    # The line break before a story is the one token more.
    shortest, longest = stories.story_length_bounds()
    assert 130 <= shortest < longest <= 257
    assert all(shortest <= len(story) + 1 <= longest for story in SAMPLE)


# How they read.


def test_stories_are_lines_of_ascii_sentences():
    for story in SAMPLE:
        assert story.isascii()
        assert story.isprintable()
        assert story[0].isupper()
        assert story.endswith(".")
        assert story.count('"') % 2 == 0
        assert not re.search(r"  | [.,!?]|[{}=:]", story)
        assert all(c.isupper() for c in re.findall(r"[.?!] (?:\")?(\w)", story))


def test_stories_keep_to_a_small_vocabulary():
    """A model of a million parameters meets every word often enough within a minute."""
    words = set(re.findall(r"[a-z]+", stories.corpus(SAMPLE).lower()))
    assert len(words) <= 400
    assert max(map(len, words)) <= 8


def test_stories_articles():
    for story in SAMPLE:
        for article, word in re.findall(r"\b(an?) (\w+)", story, re.IGNORECASE):
            assert (article.lower() == "an") == (word[0] in "aeiou"), story
    # Words whose sound and first letter disagree would make the rule above wrong.
    words = set(re.findall(r"[a-z]+", stories.corpus(SAMPLE).lower()))
    assert not [w for w in words if re.match(r"hour|hono|heir|uni|use|eu|one.|once", w)]


def test_forms_fit_the_names():
    girls, boys = stories.GIRLS.split(), stories.BOYS.split()
    assert not set(girls) & set(boys)
    assert sorted(stories.RULES["name"].split()) == sorted(girls + boys)
    for form, words in stories.FORMS.items():
        assert sorted(words) == sorted(girls + boys)
        assert {words[name].lower() for name in boys} == {form.lower()}
        assert {words[name].lower() for name in girls} == {"she" if form in ("he", "He") else "her"}
        assert {word[0].isupper() for word in words.values()} == {form[0].isupper()}


def test_stories_write_the_form_that_fits_the_hero():
    pattern = "{hero=name} lost {hero:his} hat. {hero:He} cried, and {hero} went to look for it."
    grammar = stories.Grammar({"name": stories.RULES["name"], "text": (pattern,)})
    texts = {d.words["hero"]: d.text for d in grammar.derivations()}
    assert texts["Mia"] == "Mia lost her hat. She cried, and Mia went to look for it."
    assert texts["Tom"] == "Tom lost his hat. He cried, and Tom went to look for it."
    for name, text in texts.items():
        assert (" her " in text) == (name in stories.GIRLS.split())


def test_stories_come_back_to_their_start():
    for story in SAMPLE:
        words = stories.parse(story).words
        start = last_sentence(story)
        assert len({words["hero"], words["helper"]}) == 2
        for label in ("hero", "object"):
            word = rf"\b{words[label]}\b"
            assert re.search(word, story[: len(story) // 2])
            assert re.search(word, story[start:])
        # Once more in the middle, so that there is more than one copy to learn from.
        assert len(re.findall(rf"\b{words['hero']}\b", story)) >= 3
        assert len(re.findall(rf"\b{words['helper']}\b", story)) >= 2


def test_endings_are_the_words_of_the_last_sentence():
    for story in SAMPLE:
        words = stories.parse(story).words
        recalls = stories.endings(story)
        assert {"hero", "object"} <= {recall.kind for recall in recalls}
        assert [r.start for r in recalls] == sorted(r.start for r in recalls)
        for kind, start, stop in recalls:
            assert story[start:stop] == words[kind]
            assert start >= last_sentence(story)
            assert words[kind] in story[:start]
        names = [r for r in recalls if r.kind == "hero"]
        assert len(names) == len(re.findall(rf"\b{words['hero']}\b", story[last_sentence(story) :]))


def test_endings_are_determined_by_the_story_before():
    """No other word can stand in a span; with another word from the start on, that one does."""
    renamings = 0
    for story in FEW[:20]:
        words = stories.parse(story).words
        for kind, start, stop in stories.endings(story):
            word = words[kind]
            like = stories.GIRLS if word in stories.GIRLS.split() else stories.BOYS
            others = (stories.RULES["thing"] if kind == "object" else like).split()
            for other in others:
                same = other == word
                assert stories.is_story(story[:start] + other + story[stop:]) == same
                # A fresh word keeps "a" or "an" and must not be in the story yet.
                article = (other[0] in "aeiou") == (word[0] in "aeiou")
                if (article or kind != "object") and not re.search(rf"\b{other}\b", story):
                    renamed = re.sub(rf"\b{word}\b", other, story)
                    assert stories.is_story(renamed)
                    assert {renamed[r.start : r.stop] for r in stories.endings(renamed)} >= {other}
                    renamings += 1
    assert renamings > 200


def test_endings_refuses_other_texts():
    with pytest.raises(ValueError, match="expected"):
        stories.endings("Once upon a time.")
