"""A training step and some text in one instruction set after the other, for programs that watch
memory: ``make test-memcheck`` runs this under valgrind.

    python tests/step_and_text.py FOLDER [INSTRUCTION_SET ...]
"""

import sys
from pathlib import Path

from helpers.models import MODELS, OPTION_MODELS
from legacy1bit import math_ops
from legacy1bit.data.corpus import text_corpus
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.logger import MetricsLogger
from legacy1bit.training.trainer import Trainer

TEXT = b"the cat sat on the mat. " * 40
SHAPE = {"num_blocks": 1, "model_dim": 36, "num_heads": 3, "sequence_length": 24}
# What is left of a vector, groups, dense matrices, rounded activations, every optimizer, and what
# published models have.
CHOSEN = {
    "defaults": {"gradient_accumulation": 2},
    "float": {"optimizer": "adamw"},
    "2bit, groups": {"optimizer": "sgd", "gradient_checkpointing": True},
    "b158": {"threads": 2},
    "llama": {},
    "yarn, adjacent, fraction": {},
}


def train_and_write(folder, name):
    """One step, measured before and after and saved; then text from what was saved."""
    config = ModelConfig(**{**SHAPE, **{**MODELS, **OPTION_MODELS}[name]})
    training = TrainingConfig(steps=1, batch_size=3, warmup_steps=0, **CHOSEN[name])
    corpus = text_corpus(TEXT, "text", config.sequence_length, config.vocab_size)
    folder.mkdir(parents=True)
    trainer = Trainer(folder, config, training, corpus, {"name": "text"})
    trainer.train(MetricsLogger(folder))
    for form in ("2bit", "trits") if name == "defaults" else ("2bit",):
        generator = Generator.load(folder, training.threads, form)
        # A prompt of several tokens, more text than the context holds, several sequences.
        assert generator.complete("the cat", 40).tokens == 40
        assert len(generator.batch(["a", "the"], 5)) == 2
        generator.log_probabilities("the cat sat")


if __name__ == "__main__":
    for level in sys.argv[2:] or math_ops.simd_levels():
        math_ops.set_simd_level(level)
        for name in CHOSEN:
            train_and_write(Path(sys.argv[1], level, name), name)
        print(level, flush=True)
