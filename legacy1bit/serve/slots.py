"""The sequences of a decoder, with the tokens in each: where a prompt finds its beginning."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ModelConfig

# Tokens of a prompt that pass at once, as many as a decoder takes: Generator cuts prompts at the
# same places.
BLOCK = 128

# As many where other texts wait for it, if the bits stay the same. Smaller ones are slower.
_SHORT_BLOCK = 32

# As many sequences as a decoder can have.
MOST_SLOTS = 128

_Tokens = npt.NDArray[np.int32]


def cache_bytes(config: ModelConfig, context: int, count: int) -> int:
    """Return the bytes of the keys and values of slots: int8, with a float32 scale for each."""
    heads = count * config.num_blocks * config.num_kv_heads
    return heads * context * 2 * (config.head_dim + 4)


@dataclass(eq=False)
class Slot:
    """A sequence of the decoder.

    Attributes
    ----------
    number : int
        The sequence.
    tokens : int32[capacity]
        Those that the decoder has, and behind them undefined ones.
    prompt_blocks : int
        How many of them passed in whole blocks of a prompt.
    used : int
        When it was last taken, by a counter.
    """

    number: int
    tokens: _Tokens
    prompt_blocks: int = 0
    used: int = 0


class Slots:
    """The slots of a decoder, and what each has in the cache.

    What a prompt takes from a slot is, to the bit, what it would compute itself. Products of whole
    numbers have the same bits in blocks of any size, those of floats in blocks that are cut at the
    same places: so a prompt takes all that it shares, but where a matrix or the activations are
    floats whole blocks of prompts, no tokens that were sampled.

    Parameters
    ----------
    generator : Generator
    count : int
    context : int, optional
        The tokens of a slot; by default the generator's context.
    """

    def __init__(self, generator: Generator, count: int, context: int | None) -> None:
        self.decoder = generator.decoder(context, count)
        floats = generator.activations != "int8"
        for weights in generator.model.parameters.values():
            floats = floats or (isinstance(weights, np.ndarray) and weights.ndim == 2)
        self._exact = not floats
        self.all = [Slot(i, np.zeros(self.decoder.capacity, np.int32)) for i in range(count)]
        self.free = list(self.all)
        self._clock = 0

    def take(self, prompt: _Tokens) -> Slot:
        """Return a free slot for a prompt.

        It is the one with the longest common beginning, if it loses less than that, and less than
        a block: so a conversation goes on. Else it is the one not used for longest, as the
        beginning can be copied.
        """
        slot = max(self.free, key=lambda one: (self._common(one, prompt), -self.length(one)))
        common = self._common(slot, prompt)
        if self.length(slot) - common >= min(common, BLOCK):
            slot = min(self.free, key=lambda one: one.used)
        self.free.remove(slot)
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back; its tokens stay until it is taken."""
        self._clock += 1
        slot.used = self._clock
        self.free.append(slot)

    def length(self, slot: Slot) -> int:
        """Return the number of tokens in a slot."""
        return self.decoder.length_of(slot.number)

    def clear(self, slot: Slot) -> None:
        """Empty a slot."""
        self.decoder.truncate(0, slot.number)
        slot.prompt_blocks = 0

    def reuse(self, slot: Slot, prompt: _Tokens, passed: int) -> int:
        """Let a slot begin with what any slot has of the prompt, if that is more than ``passed``.

        Parameters
        ----------
        slot : Slot
        prompt : int32[T]
        passed : int
            The tokens of the prompt that the slot has already; 0: what it has is of another.

        Returns
        -------
        int
            The tokens of the prompt that the slot has then, at most T - 1.
        """
        source = max(self.all, key=lambda one: (self._shared(one, prompt), one is slot))
        shared = self._shared(source, prompt)
        if passed and shared <= passed:
            return passed
        self.decoder.copy(source.number, slot.number, shared)
        slot.tokens[:shared] = prompt[:shared]
        slot.prompt_blocks = min(source.prompt_blocks, shared // BLOCK * BLOCK)
        return shared

    def next_block(self, prompt: _Tokens, passed: int, short: bool) -> _Tokens:
        """Return the tokens of a prompt that pass next.

        Parameters
        ----------
        prompt : int32[T]
        passed : int
        short : bool
            Whether others wait: then they are fewer, where that changes no bit.
        """
        end = passed // BLOCK * BLOCK + BLOCK
        if short and self._exact:
            end = min(end, passed + _SHORT_BLOCK)
        return prompt[passed:end]

    def append_prompt(self, slot: Slot, block: _Tokens) -> None:
        """Note a block of a prompt that the decoder has got."""
        end = self.length(slot)
        slot.tokens[end - block.size : end] = block
        if end % BLOCK == 0:
            slot.prompt_blocks = end

    def append(self, slot: Slot, token: int) -> None:
        """Note a sampled token that the decoder has got."""
        slot.tokens[self.length(slot) - 1] = token

    def _common(self, slot: Slot, prompt: _Tokens) -> int:
        """Return how many tokens of a prompt, without its last, a slot begins with."""
        size = min(self.length(slot), prompt.size - 1)
        different = np.flatnonzero(slot.tokens[:size] != prompt[:size])
        return int(different[0]) if different.size else size

    def _shared(self, slot: Slot, prompt: _Tokens) -> int:
        """Return how many of them can be taken from it."""
        common = self._common(slot, prompt)
        return common if self._exact else min(common, slot.prompt_blocks) // BLOCK * BLOCK
