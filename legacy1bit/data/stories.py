"""Seeded children's stories whose entropy is known exactly.

The default corpus is written by a small grammar instead of being shipped or downloaded.  A story
names a hero, a helper and an object at its start and comes back to them at its end, so that only a
model which looks back through the story can finish it.  Everything else is drawn at random, and
because the grammar is unambiguous the probability of a story is the product of its choices: the
lowest loss any model can reach is a number (`entropy_per_character`), not a guess.

How to add to it
----------------
A rule of `RULES` is either a string of words or a tuple of templates.  In a template

=================  ===============================================================================
``{animal}``       draws an option of the rule ``animal``
``{hero=name}``    draws from ``name`` and remembers the word under the label ``hero``
``{hero}``         repeats the remembered word: the reader can know it, so it costs nothing
``{hero:his}``     writes the form of the remembered word that `FORMS` lists under ``his``
``a {animal}``     writes "a" or "an", as the first letter of the next word wants it
=================  ===============================================================================

A story never draws the same option of a rule twice: the helper is not the hero, and the other
things which turn up are not the lost one.

The first word decides
----------------------
All options of a rule begin with different words (an article is passed over), and none begins with
a repeated word.  Reading a story from the left, its next word therefore decides every choice: no
text has two derivations, and a repeated word has probability one given the text before it.
`Grammar` refuses rules which break this.
"""

import functools
import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = [
    "FORMS",
    "RULES",
    "STORIES",
    "Choice",
    "Derivation",
    "Grammar",
    "Recall",
    "corpus",
    "endings",
    "entropy_per_character",
    "entropy_per_story",
    "generate_stories",
    "is_story",
    "log_probability",
    "mean_story_length",
    "parse",
    "story_length_bounds",
]

GIRLS = "Ada Cleo Eva Hana Ivy Kim Mia Pia Sue Zoe"
BOYS = "Ben Dan Finn Gus Jack Leo Ned Otto Rob Tom"

FORMS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        his: dict.fromkeys(BOYS.split(), his) | dict.fromkeys(GIRLS.split(), her)
        for his, her in (("He", "She"), ("his", "her"))
    }
)

# Words are short, and those of one rule begin with different letters wherever there are letters
# enough: then the first letter tells which word it is, and a model that brings the letter back
# from the start of the story can spell the rest.
RULES: Mapping[str, str | tuple[str, ...]] = MappingProxyType(
    {
        "name": f"{GIRLS} {BOYS}",
        "job": """actor baker cook diver farmer guard hunter judge knight miller nurse poet sailor
            tailor""",
        "trait": """blue cold dry fine gold huge iron lucky magic new old pink red small tiny
            warm yellow""",
        "thing": """axe bell cup drum fan gem hat jar kite lamp map net oar pen ring saw tub vase
            wig""",
        "state": """bent big clean cute dusty fancy flat heavy light long loud muddy nice odd plain
            pretty rare round soft square""",
        "kind": """brave clever eager funny good happy kind lazy merry polite proud quick quiet shy
            silly sly strong tall wise young""",
        "animal": "ant bear cat dog eel fox goat hen lion mouse owl pig rat seal toad wolf",
        "ware": "ball boat book box chair coat doll flag fork horn key mug pan quilt rope shoe",
        "colour": "amber black brown cream gray green orange purple silver white",
        "gear": """bed bench broom cart chest clock desk door hook ladder sled spoon stool table
            tent wand""",
        "weather": "bright cold dark foggy icy misty rainy sunny warm windy",
        "day": "day evening morning night Friday Monday Sunday",
        "place": "barn camp dam farm gate hill inn lake mill park river tower well",
        "fruit": "apples beans dates figs grapes lemons melons nuts olives pears",
        "dish": "bread cake corn eggs ham jam milk pie rice soup tarts yogurt",
        "folk": "boys cooks girls kids men nuns people twins women",
        "noise": "Bang Crack Snap Thud Zap",
        "plot": (
            # Lost and found.
            "lost the {object} one {weather} {day}. {helper=name} the {kind} {animal} gave {hero}"
            " {fruit} and {dish}. {helper:He} looked in a {ware} and a {colour} {gear}. {hero} got"
            " the {look} {object} back from {helper}.",
            # A gift.
            'met {helper=name} the {kind} {animal}. "A {ware}, {hero}? A {colour} {gear}?" asked'
            ' {helper}. "No, a {object}!" said {hero}. {helper} took the {look} {object} and gave'
            " {hero} {fruit} and {dish}.",
            # A storm.
            "took the {object} to the {weather} {place}. {noise}! {hero} saw {helper=name} the"
            " {kind} {animal} fall on a {ware}. {hero} helped with a {gear} and {hero:his}"
            " {object}. {helper} thanked {hero} for the {look} {object}.",
            # A race.
            "raced {helper=name} the {kind} {animal} to the {place} one {weather} {day}."
            ' "Run, {hero}!" yelled the {folk}. {helper} fell on a {colour} {ware}. {hero} won'
            " {fruit} and {dish} and gave {helper} the {look} {object}.",
            # A wish.
            'rubbed the {object}. "Make a wish, {hero}!" said {helper=name} the {kind} {animal}.'
            " {hero} got a {colour} {gear}, {fruit}, {dish} and a {ware}, and {helper} slept in"
            " {hero}'s {look} {object}.",
        ),
        "story": (
            "{hero=name} was a {job}. {hero} had a {look=trait} {object=thing}. The {look} {object}"
            " was {state}. {hero} {plot}",
        ),
    }
)

_SLOT = re.compile(r"\{(\w+)(?:([=:])(\w+))?\}")
_ARTICLE = re.compile(r"\b[Aa]n? ?$")
_WORD = re.compile(r"[^A-Za-z]*(?:[Aa]n? )?([A-Za-z]+)")
_SENTENCE_END = re.compile(r"[.?!]\"? (?=[\"A-Z])")


class _Slot(NamedTuple):
    """One ``{...}`` of a template with the text before it; a template ends in an empty slot."""

    literal: str
    article: str  # "a" or "A" where the template has one before the slot
    rule: str  # what is drawn; "" where a word is repeated
    label: str
    form: str


class _Rule(NamedTuple):
    """A compiled rule."""

    name: str
    options: tuple[tuple[_Slot, ...], ...]
    words: tuple[str, ...]  # empty where the options are templates
    option_of: dict[str, int]  # the option that begins with a word


class _Part(NamedTuple):
    """A word which a slot wrote into a text, and the rule from which it is or was drawn."""

    slot: _Slot
    rule: _Rule
    start: int
    stop: int


class Choice(NamedTuple):
    """One choice of a derivation.

    Attributes
    ----------
    rule : str
        The rule.
    option : int
        The index of the option taken, among all options of the rule.
    free : int
        The number of options that could still be taken; each had the probability ``1 / free``.
    """

    rule: str
    option: int
    free: int


class Derivation(NamedTuple):
    """A text of a grammar with the choices that make it.

    Attributes
    ----------
    text : str
        The text.
    choices : tuple of Choice
        All choices, from left to right.
    words : dict
        The remembered word of every label, such as ``{"hero": "Mia", "object": "kite", ...}``.
    parts : tuple
        Where each drawn or repeated word stands; what `Grammar` and `endings` measure.
    """

    text: str
    choices: tuple[Choice, ...]
    words: dict[str, str]
    parts: tuple[_Part, ...]

    @property
    def log_probability(self) -> float:
        """The natural logarithm of the probability that the grammar gives to this text."""
        return -math.fsum(math.log(choice.free) for choice in self.choices)


class Recall(NamedTuple):
    """A word of a story's last sentence which the text before it determines.

    Attributes
    ----------
    kind : str
        ``"hero"``, ``"helper"`` or ``"object"``.
    start, stop : int
        The word is ``story[start:stop]``.
    """

    kind: str
    start: int
    stop: int


class Grammar:
    """Rules from which texts are drawn, and by which they are read back.

    One walk expands the last rule and asks a function for every choice.  A random function makes
    it write a text; a function which looks at the next word of a given text makes it read that
    text; and one which takes every choice in turn makes it list all texts.

    Parameters
    ----------
    rules : mapping
        Rule names to words (a string, separated by spaces) or templates (a tuple).  Templates may
        draw from the rules before their own; the last rule is the whole text.
    forms : mapping, optional
        Form names to mappings from a word to its form.

    Raises
    ------
    ValueError
        For rules that contradict themselves, or in which the next word would not decide a choice.
    """

    def __init__(
        self,
        rules: Mapping[str, str | tuple[str, ...]],
        forms: Mapping[str, Mapping[str, str]] = FORMS,
    ) -> None:
        if not rules:
            raise ValueError("rules: expected at least one rule, got none")
        self._forms = forms
        self._rules: dict[str, _Rule] = {}
        for name, options in rules.items():
            self._rules[name] = self._compile(name, options)
        self._start = self._rules[next(reversed(self._rules))]
        # Walking every path, and writing every word in every place, meets what is left of the
        # errors: labels without a word, words without a form, rules that run out of options.
        self._paths = tuple(self.derivations(every_word=False))
        self.length_bounds()

    def _compile(self, name: str, options: str | tuple[str, ...]) -> _Rule:
        """Compile one rule against those before it, and check that its first words decide."""
        words: tuple[str, ...] = ()
        if isinstance(options, str):
            words = options = tuple(options.split())
            for word in words:
                if not (word.isascii() and word.isalpha()) or _ARTICLE.fullmatch(word):
                    raise ValueError(f"rule {name!r}: {word!r} is an article or not all letters")
        if not options:
            raise ValueError(f"rule {name!r}: expected at least one option, got none")
        templates = tuple(self._compile_template(name, option) for option in options)
        option_of: dict[str, int] = {}
        for number, template in enumerate(templates):
            for word in self._first_words(name, template):
                if word in option_of:
                    raise ValueError(f"rule {name!r}: two options begin with the word {word!r}")
                option_of[word] = number
        return _Rule(name, templates, words, option_of)

    def _compile_template(self, name: str, template: str) -> tuple[_Slot, ...]:
        """Split a template into its slots, the last of which is empty."""
        slots: list[_Slot] = []
        position = 0
        for match in _SLOT.finditer(template):
            literal, position = template[position : match.start()], match.end()
            if (slots and not literal) or literal[-1:].isalnum():
                raise ValueError(f"rule {name!r}: no space before {match[0]} in {template!r}")
            article = _ARTICLE.search(literal)
            slots.append(
                self._compile_slot(
                    f"rule {name!r}: {match[0]}",
                    literal[: article.start()] if article else literal,
                    article[0][0] if article else "",
                    *match.group(1, 2, 3),
                )
            )
        slots.append(_Slot(template[position:], "", "", "", ""))
        literals = "".join(slot.literal for slot in slots)
        if not literals.isascii() or not literals.isprintable() or set("{}") & set(literals):
            raise ValueError(f"rule {name!r}: expected one line of ASCII, got {template!r}")
        if any(slot.literal[:1].isalnum() for slot in slots[1:]):
            raise ValueError(f"rule {name!r}: no space after a slot in {template!r}")
        if _ARTICLE.search(template):
            raise ValueError(f"rule {name!r}: nothing after the article in {template!r}")
        return tuple(slots)

    def _compile_slot(
        self, where: str, literal: str, article: str, left: str, sign: str | None, right: str
    ) -> _Slot:
        """Tell draws from repeated words: ``{left}``, ``{left=right}`` or ``{left:right}``."""
        if sign == ":":
            if right not in self._forms:
                raise ValueError(f"{where}: unknown form {right!r}")
            return _Slot(literal, article, "", left, right)
        if sign is None and left not in self._rules:
            return _Slot(literal, article, "", left, "")
        drawn, label = (left, "") if sign is None else (right, left)
        if drawn not in self._rules:
            raise ValueError(f"{where}: no rule {drawn!r} before this one")
        if label in self._rules:
            raise ValueError(f"{where}: the label {label!r} is the name of a rule")
        if (label or article) and not self._rules[drawn].words:
            raise ValueError(f"{where}: a label or an article needs a rule of words")
        return _Slot(literal, article, drawn, label, "")

    def _first_words(self, name: str, template: tuple[_Slot, ...]) -> Iterable[str]:
        """List the words with which a template can begin."""
        slot = template[0]
        match = _WORD.match(slot.literal)
        if match:
            return (match[1],)
        if slot.rule:
            return self._rules[slot.rule].option_of
        raise ValueError(f"rule {name!r}: an option begins with a repeated word, or has no word")

    def _render(self, slot: _Slot, word: str) -> str:
        """Write a word as its slot wants it."""
        if slot.form:
            if word not in self._forms[slot.form]:
                raise ValueError(f"form {slot.form!r}: nothing for the word {word!r}")
            word = self._forms[slot.form][word]
        if slot.article:
            return f"{slot.article}{'n' if word[0] in 'aeiouAEIOU' else ''} {word}"
        return word

    def _widths(self, part: _Part) -> list[int]:
        """Return the characters that each word of a part's rule would take in its place."""
        return [len(self._render(part.slot, word)) for word in part.rule.words]

    def _walk(self, choose: Callable[[_Rule, set[int], int], int]) -> Derivation:
        """Expand the last rule.

        ``choose(rule, taken, position)`` returns the index of an option outside `taken` for the
        text that begins at character `position`.
        """
        texts: list[str] = []
        choices: list[Choice] = []
        parts: list[_Part] = []
        words: dict[str, str] = {}
        origins: dict[str, _Rule] = {}
        taken: dict[str, set[int]] = {}
        position = 0

        def draw(rule: _Rule) -> int:
            used = taken.setdefault(rule.name, set())
            option = choose(rule, used, position)
            choices.append(Choice(rule.name, option, len(rule.options) - len(used)))
            used.add(option)
            return option

        def expand(template: tuple[_Slot, ...]) -> None:
            nonlocal position
            for slot in template:
                texts.append(slot.literal)
                position += len(slot.literal)
                if slot.rule:
                    rule = self._rules[slot.rule]
                    option = draw(rule)
                    if not rule.words:
                        expand(rule.options[option])
                        continue
                    word = rule.words[option]
                    if slot.label:
                        words[slot.label] = word
                        origins[slot.label] = rule
                elif slot.label:
                    if slot.label not in words:
                        raise ValueError(f"{slot.label!r}: neither a rule nor a word drawn before")
                    word = words[slot.label]
                    rule = origins[slot.label]
                else:
                    continue
                text = self._render(slot, word)
                texts.append(text)
                parts.append(_Part(slot, rule, position, position + len(text)))
                position += len(text)

        expand(self._start.options[draw(self._start)])
        return Derivation("".join(texts), tuple(choices), words, tuple(parts))

    def generate(self, rng: random.Random) -> Derivation:
        """Draw a text.

        Parameters
        ----------
        rng : random.Random
            The source of random numbers.  Only its method ``random`` is called, the one whose
            sequence Python promises to keep for a seed.
        """

        def choose(rule: _Rule, taken: set[int], position: int) -> int:
            while (option := int(rng.random() * len(rule.options))) in taken:
                pass
            return option

        return self._walk(choose)

    def parse(self, text: str) -> Derivation:
        """Read a text back into its one derivation.

        The next word decides each choice, so that the text which these choices make is the only
        candidate; it remains to compare the two.

        Raises
        ------
        ValueError
            If the grammar cannot write the text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")

        def choose(rule: _Rule, taken: set[int], position: int) -> int:
            match = _WORD.match(text, position)
            option = rule.option_of.get(match[1]) if match else None
            if option is None or option in taken:
                actual = text[position : position + 12]
                raise ValueError(f"text: expected {rule.name!r} at {position}, got {actual!r}")
            return option

        derivation = self._walk(choose)
        if derivation.text != text:
            pairs = zip(derivation.text, text, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            wanted, actual = derivation.text[same : same + 12], text[same : same + 12]
            raise ValueError(f"text: expected {wanted!r} at {same}, got {actual!r}")
        return derivation

    def derivations(self, *, every_word: bool = True) -> Iterator[Derivation]:
        """List all derivations, each once.

        Parameters
        ----------
        every_word : bool
            False lists all choices of templates only, and draws the first free word everywhere:
            one derivation stands for all which differ from it in words.
        """
        pending: list[tuple[int, ...]] = [()]
        while pending:
            derivation, others = self._follow(pending.pop(), every_word)
            pending.extend(others)
            yield derivation

    def _follow(
        self, script: tuple[int, ...], every_word: bool
    ) -> tuple[Derivation, list[tuple[int, ...]]]:
        """Make the choices of a script and after it the first ones; return what it passed by."""
        made: list[int] = []
        others: list[tuple[int, ...]] = []

        def choose(rule: _Rule, taken: set[int], position: int) -> int:
            free = [option for option in range(len(rule.options)) if option not in taken]
            if not free:
                raise ValueError(f"rule {rule.name!r}: a text draws more options than it has")
            if rule.words and not every_word:
                return free[0]
            if len(made) < len(script):
                made.append(script[len(made)])
            else:
                others.extend((*made, option) for option in free[1:])
                made.append(free[0])
            return made[-1]

        return self._walk(choose), others

    def _expect(self, value: Callable[[Derivation], float]) -> float:
        """Average over the choices of templates a value that does not depend on the words."""

        def probability(path: Derivation) -> float:
            return 1 / math.prod(c.free for c in path.choices if not self._rules[c.rule].words)

        return math.fsum(probability(path) * value(path) for path in self._paths)

    def entropy(self) -> float:
        """Return the exact entropy of a text in nats.

        The options of a rule are equally likely, so all texts with the same templates have the
        same probability, and one of them stands for all.
        """
        return self._expect(lambda path: -path.log_probability)

    def mean_length(self) -> float:
        """Return the exact expected length of a text in characters.

        Each of several words drawn from a rule without repetition is by itself uniform over the
        rule, and expectations add: every part counts with the mean width of its rule's words.
        """

        def length(path: Derivation) -> float:
            widths = (self._widths(part) for part in path.parts)
            return _literal_length(path) + math.fsum(sum(w) / len(w) for w in widths)

        return self._expect(length)

    def length_bounds(self) -> tuple[int, int]:
        """Return a lower and an upper bound of the length of all texts in characters.

        They take the shortest or the longest word for every part, which no text may be able to do.
        """
        bounds = []
        for path in self._paths:
            widths = [self._widths(part) for part in path.parts]
            literal = _literal_length(path)
            bounds.append((literal + sum(map(min, widths)), literal + sum(map(max, widths))))
        return min(low for low, _ in bounds), max(high for _, high in bounds)


def _literal_length(path: Derivation) -> int:
    """Return the number of characters outside the parts of a derivation."""
    return len(path.text) - sum(part.stop - part.start for part in path.parts)


STORIES = Grammar(RULES)


def generate_stories(count: int, seed: int) -> list[str]:
    """Write stories.

    The first stories of a seed do not depend on how many are asked for, and all of them are the
    same on every platform.

    Parameters
    ----------
    count : int
        How many, at least 0.
    seed : int
        The seed, at least 0.

    Returns
    -------
    list of str
        Stories of one line each, without the line's end.

    Raises
    ------
    TypeError, ValueError
        If an argument is not an integer, or is negative.
    """
    rng = random.Random(_natural("seed", seed))
    return [STORIES.generate(rng).text for _ in range(_natural("count", count))]


def _natural(name: str, value: int) -> int:
    """Return a non-negative integer argument as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return operator.index(value)


def corpus(stories: Iterable[str]) -> str:
    """Join stories into one text, every story on a line of its own and ended by a line break."""
    if isinstance(stories, str):
        raise TypeError("stories: expected several strings, got one")
    return "".join(story + "\n" for story in stories)


def parse(story: str) -> Derivation:
    """Read a story, without its line break, back into the choices that make it.

    Raises
    ------
    ValueError
        If it is not a story of the grammar.
    """
    return STORIES.parse(story)


def is_story(text: str) -> bool:
    """Tell whether a text, without its line break, is a story of the grammar."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def log_probability(story: str) -> float:
    """Return the natural logarithm of a story's probability; the line break adds nothing to it.

    Raises
    ------
    ValueError
        If it is not a story of the grammar.
    """
    return parse(story).log_probability


@functools.cache
def entropy_per_story() -> float:
    """Return the exact entropy of a story in nats."""
    return STORIES.entropy()


@functools.cache
def mean_story_length() -> float:
    """Return the exact expected length of a story in characters, with its line break."""
    return STORIES.mean_length() + 1


def entropy_per_character() -> float:
    """Return the entropy of a story over its mean length, in nats per character.

    No model which predicts the characters of whole stories, line breaks included, has a smaller
    expected sum of losses over the expected number of characters.  A model that begins to read in
    the middle of a story knows less, and its floor is higher.
    """
    return entropy_per_story() / mean_story_length()


def story_length_bounds() -> tuple[int, int]:
    """Return two lengths in characters, with the line break, which enclose those of all stories."""
    shortest, longest = STORIES.length_bounds()
    return shortest + 1, longest + 1


def endings(story: str) -> list[Recall]:
    """Find where the last sentence of a story comes back to its hero, helper and object.

    Parameters
    ----------
    story : str
        A story without its line break.

    Returns
    -------
    list of Recall
        From left to right.  The text before each span determines the word in it, but only through
        the earlier sentence that chose the word.

    Raises
    ------
    ValueError
        If it is not a story of the grammar.
    """
    parts = parse(story).parts
    *_, last = _SENTENCE_END.finditer(story)
    return [
        Recall(part.slot.label, part.start, part.stop)
        for part in parts
        if part.start >= last.end()
        and part.slot.label in ("hero", "helper", "object")
        and not (part.slot.rule or part.slot.form)
    ]
