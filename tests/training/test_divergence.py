"""What a training that went wrong says of where and why."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest

from helpers.runs import make
from legacy1bit.hyperparams import TrainingConfig
from legacy1bit.training.divergence import (
    TrainingDiverged,
    bad_activation,
    bad_gradient,
    bad_weights,
    diverged,
    remedy,
)

NAMES = (
    "blocks.0.attention.wq", "blocks.1.ffn.wo", "embedding.weight", "output.weight",
    "blocks.1.norm2.gamma", "final_norm.beta", "blocks.0.attention.bo",
)  # fmt: skip


def train_and_look(run):
    for _ in range(3):
        run.train_step()
    run._evaluate(False)


@pytest.fixture
def run(tmp_path):
    return make(tmp_path / "run", num_blocks=3)


def test_healthy_model_has_nothing_wrong(run):
    batch = run._next_batch()
    run.close()
    assert bad_weights(run.model.latent) is None
    assert bad_activation(run.model, batch) is None
    run.train_step()
    run.close()
    assert bad_gradient(run.gradients) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_weights_are_named(run, name, number):
    run.model.latent[name].flat[1] = number
    count = run.model.latent[name].size
    assert bad_weights(run.model.latent) == f"{name}: 1 of {count:,} values"
    expected = rf"first in {name}: .*the largest weight is"
    with pytest.raises(TrainingDiverged, match=expected), contextlib.closing(run):
        train_and_look(run)


# Where a weight of 3e38 first makes a number that is not finite.
OVERFLOWS = {
    "blocks.1.attention.wq": "block 1: queries",
    "blocks.2.attention.wk": "block 2: keys",
    "blocks.1.attention.wv": "block 1: values",
    "blocks.1.ffn.wi": "block 1: the feed-forward layer, ",
    "blocks.0.norm1.gamma": "block 0: ",
    "final_norm.gamma": "the final norm, ",
    "output.weight": "the logits, ",
}


# A scale of codes is at most 65504: theirs do not.
@pytest.mark.parametrize(
    ("name", "floats"),
    [*((name, 100) for name in OVERFLOWS), ("blocks.0.norm1.gamma", 0), ("final_norm.gamma", 0)],
)
def test_layer_that_overflows_is_named(tmp_path, name, floats):
    run = make(tmp_path / "run", num_blocks=3, float_steps=floats)
    run.model.latent[name][...] = 3e38
    if run.model.latent[name].ndim == 2:
        # What has the signs of a norm's output adds up.
        block = name[: len("blocks.0")]
        inside = (f"{block}.norm1", f"{block}.norm2")
        for norm in inside if block.startswith("blocks") else ("final_norm",):
            run.model.latent[f"{norm}.gamma"][...] = 100.0
        run.model.latent[name][:, 1::2] *= -1
    run.model.quantize(1)
    run.model.use_full_precision(floats > 0)
    batch = run._next_batch()
    run.close()
    found = bad_activation(run.model, batch)
    assert found is not None
    assert found.startswith(OVERFLOWS[name])
    assert "of an input of up to " in found
    with pytest.raises(
        TrainingDiverged, match=rf"(loss|norm) is .* at step 1 \(first in {found[:8]}"
    ):
        run.train_step()
    run.close()


def test_look_that_overflows_names_the_layer(tmp_path):
    run = make(tmp_path / "run")
    run.model.latent["final_norm.gamma"][...] = 3e38
    told = r"after step 0 the model's logits are not finite \(first in the final norm, of .*try"
    with pytest.raises(TrainingDiverged, match=told):
        run._evaluate(False)


def test_embedding_that_overflows_is_named(run):
    run.model.parameters["embedding.weight"][...] = np.inf
    batch = run._next_batch()
    run.close()
    assert bad_activation(run.model, batch) == "the embedding"


def test_first_gradient_on_the_way_back_is_named(run):
    for name in ("embedding.weight", "blocks.0.ffn.wi", "blocks.2.attention.wq", "blocks.2.ffn.wo"):
        run.gradients.parameters[name].flat[0] = np.nan
        assert bad_gradient(run.gradients).startswith(f"the gradient of {name}: 1 of ")
    run.gradients.parameters["final_norm.gamma"][...] = np.inf
    assert bad_gradient(run.gradients) == "the gradient of final_norm.gamma: 8 of 8 values"
    run.gradients.parameters["output.weight"][0, 0] = np.inf
    assert bad_gradient(run.gradients).startswith("the gradient of output.weight: 1 of ")


def test_remedy_fits_the_settings(run):
    run.model.latent["blocks.1.ffn.wo"][2, 3] = -7.5
    told = remedy(run.model, replace(run.config, learning_rate=0.3, warmup_steps=100))
    assert told == (
        "the largest weight is 7.5, in blocks.1.ffn.wo: "
        "try a lower --learning-rate than 0.3, such as 0.1"
    )
    worse = TrainingConfig(learning_rate=3.0, clip=0.0, warmup_steps=0, weight_decay=30.0)
    told = remedy(run.model, worse)
    for hint in ("such as 1,", "a --clip of 1", "more --warmup-steps", "a lower --weight-decay"):
        assert hint in told


def test_error_tells_all(run):
    error = diverged("the loss is nan at step 3", run.model, run.config)
    assert str(error).startswith("the loss is nan at step 3; the largest weight is ")
    run.model.latent["output.weight"][0, 0] = np.nan
    error = diverged("the loss is nan at step 3", run.model, run.config)
    assert "at step 3 (first in output.weight: 1 of " in str(error)
    assert "the largest weight is nan, in output.weight" in str(error)
