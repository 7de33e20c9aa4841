"""How well a model predicts several texts that are mixed: each of them, and the mix."""

import math

import numpy as np
import pytest

from helpers.models import make_config, random_model
from legacy1bit.data.shards import TokenStore
from legacy1bit.data.tokenizer import train_bpe
from legacy1bit.dataset import MixedDataset, TokenDataset
from legacy1bit.training.evaluation import evaluate

TEXTS = (b"the cat sat on the mat. " * 20, b"a dog lay by the log, and it slept. " * 30)
WEIGHTS = (1.0, 0.25)


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    return train_bpe([TEXTS[0]], 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(make_config(vocab_size=tokenizer.vocab_size, sequence_length=16))


@pytest.fixture(scope="module")
def datasets(tokenizer):
    stores = [TokenStore([tokenizer.encode(text)]) for text in TEXTS]
    return [TokenDataset(store, 16, tokenizer.vocab_size) for store in stores]


@pytest.fixture(scope="module")
def mix(datasets):
    return MixedDataset(list(zip(("a.txt", "b.txt"), WEIGHTS, datasets, strict=True)))


@pytest.mark.parametrize("limit", [0, 64])
def test_losses_of_texts_add_up_to_that_of_the_mix(model, datasets, mix, tokenizer, limit):
    metrics = evaluate(model, mix, limit=limit, tokenizer=tokenizer)
    alone = [evaluate(model, one, limit=-(-limit // 2), tokenizer=tokenizer) for one in datasets]
    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    assert metrics.parts == (("a.txt", 0.8, alone[0]), ("b.txt", 0.2, alone[1]))
    for name in ("loss", "top1", "top3", "top5"):
        values = [getattr(one, name) for one in alone]
        assert math.isclose(getattr(metrics, name), float(shares @ values), rel_tol=1e-12)
    assert alone[0].loss != alone[1].loss
    assert metrics.tokens == alone[0].tokens + alone[1].tokens
    assert metrics.bytes == alone[0].bytes + alone[1].bytes
    # Of a token that is drawn from the mix.
    size = sum(share * one.bytes / one.tokens for share, one in zip(shares, alone, strict=True))
    assert math.isclose(metrics.bits_per_byte, metrics.loss / size / math.log(2), rel_tol=1e-12)
    assert metrics.record()["val_losses"] == {"a.txt": alone[0].loss, "b.txt": alone[1].loss}
    assert "val_losses" not in alone[0].record()
    if limit:
        assert metrics.tokens < evaluate(model, mix).tokens


def test_an_evaluation_that_is_stopped_has_something_of_each_text(model, mix):
    metrics = evaluate(model, mix, stop=lambda: True)
    assert all(one.tokens > 0 for *_, one in metrics.parts)
