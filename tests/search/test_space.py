"""Where the search for settings looks, and the grid."""

import itertools
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.studies import SPACE
from legacy1bit.hyperparams import ModelConfig, TrainingConfig
from legacy1bit.search.space import (
    Dimension,
    GridSearch,
    apply,
    default_space,
    grid_search_create,
    grid_search_destroy,
    grid_search_next_config,
    grid_search_reset,
    read_space,
)

few = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("space.toml").write_text(SPACE)


def test_space_is_read():
    assert read_space("space.toml") == (
        Dimension("learning_rate", None, 1e-3, 1e-2, None, True),
        Dimension("model_dim", None, 8, 24, 8),
        Dimension("activation", ("relu2", "relu")),
        Dimension("float_steps", None, 0.0, 0.5, of_steps=True),
    )


def test_default_space_has_the_defaults_in_it():
    base = {**asdict(ModelConfig()), **asdict(TrainingConfig())}
    space = read_space(default_space())
    assert len(space) > 8
    for dimension in space:
        assert dimension.contains(base[dimension.name]), dimension.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no settings to search"),
        ("[learning_rat]\nlow = 1", "line 1: .*'learning_rat'.*'learning_rate'"),
        ("\n[steps]\nlow = 1\nhigh = 2", "line 2: .*'steps'"),
        ("[threads]\nlow = 1\nhigh = 2", "line 1: .*'threads'"),
        ("model_dim = 4", "line 1: model_dim is 4, expected a table"),
        ("[model_dim]\nlow = 8\nhight = 16", "line 3: .*'hight'.*'high'"),
        ("[model_dim]\nlow = 8", r"line 1: model_dim.high is None, expected a whole number"),
        ("[model_dim]\nlow = 8.5\nhigh = 16", "line 2: model_dim.low is 8.5, expected a whole"),
        ("[model_dim]\nlow = true\nhigh = 16", "line 2: model_dim.low is True, expected a whole"),
        ("[model_dim]\nlow = 0\nhigh = 16", "line 2: model_dim.low is 0, expected 1 to"),
        ("[model_dim]\nlow = 16\nhigh = 8", "line 3: model_dim.high is 8, expected 16 or more"),
        ("[model_dim]\nlow = 8\nhigh = 16\nstep = 0", "line 4: model_dim.step is 0, expected it a"),
        ("[clip]\nlow = 0\nhigh = 1\nlog = true", "line 2: clip.low is 0, expected it above 0"),
        ("[clip]\nlow = nan\nhigh = 1", "line 2: clip.low is nan, expected a number"),
        ("[clip]\nlow = 0\nhigh = 1\nstep = inf", "line 4: clip.step is inf, expected a number"),
        (f"[clip]\nlow = {10**400}\nhigh = 1", "line 2: clip.low is 10+, expected 0.0 to"),
        (f"[clip]\nlow = 0\nhigh = 1\nstep = {10**400}", "line 4: clip.step is 10+, expected it"),
        (f"[seed]\nlow = 0x{16**5000:x}", "line 1: .*'seed'"),
        (f"[model_dim]\nlow = 0x{16**5000:x}", "line 2: model_dim.low is a number of more than"),
        ("[clip]\nlow = 1\nhigh = 2\nlog = 1", "line 4: clip.log is 1, expected true or false"),
        ("[clip]\nlow = 1\nhigh = 2\nlog = true\nstep = 1", "line 5: clip.step is 1, expected no"),
        ("[clip]\nlow = 1\nhigh = 2\nof_steps = true", "line 4: clip.of_steps is True, expected"),
        ("[scheme]\nlow = 1\nhigh = 2", "line 1: scheme is not a number, expected choices"),
        ("[scheme]\nchoices = []", "line 2: scheme.choices is \\[\\], expected a list"),
        ("[scheme]\nchoices = ['ternary', 'tertiary']", "line 2: scheme.choices .*'tertiary'"),
        ("[num_heads]\nchoices = [2, 0]", "line 2: num_heads.choices .* 0, expected 1 to"),
        ("[num_heads]\nchoices = [2]\nfor_bytes = 1", "line 3: num_heads.for_bytes is 1, expected"),
        (
            "[clip]\nlow = 0\nhigh = 1\nstep = 1e-300",
            "line 4: clip.step is 1e-300, expected at most",
        ),
        (
            "[clip]\nlow = 0\nhigh = 1\nstep = 5e-324",
            "line 4: clip.step is 5e-324, expected at most",
        ),
        (f"[clip]\nlow = 0\nhigh = 1{'0' * 400}", "line 3: clip.high is 10*, expected 0"),
        (
            f"[clip]\nlow = 0\nhigh = 1\nstep = 1{'0' * 400}",
            "line 4: clip.step is 10*, expected it",
        ),
        ("[num_heads]\nchoices = [2]\nlow = 1", "line 1: num_heads has choices, expected nothing"),
        ("[clip]\nlow = 1\n[clip]\n", "line 3"),
        ("[clip\n", "line 1"),
    ],
)
def test_space_says_what_is_wrong(content, message):
    Path("space.toml").write_text(content)
    with pytest.raises(ValueError, match=f"^space.toml.*{message}"):
        read_space("space.toml")


def test_read_space_takes_the_names_of_earlier_versions():
    text = "[matrix_ratio]\nlow = 2\nhigh = 6\nlog = true\n[decay_share]\nchoices = [0.5, 1.0]\n"
    Path("space.toml").write_text(text)
    assert [one.name for one in read_space("space.toml")] == ["muon_lr_ratio", "decay_fraction"]


@few
@given(st.data())
def test_dimension_contains_its_values(data):
    low = data.draw(st.integers(1, 50))
    step = data.draw(st.integers(1, 9))
    count = data.draw(st.integers(0, 9))
    rest = data.draw(st.integers(0, step - 1))
    dimension = Dimension("model_dim", None, low, low + count * step + rest, step)
    values = dimension.values()
    assert values == tuple(range(low, low + count * step + 1, step))
    assert all(dimension.contains(value) for value in values)
    assert not dimension.contains(low - 1)
    assert dimension.contains(low + 1) == (step == 1 and count > 0)


def test_values_of_a_range_have_no_end():
    for dimension in (
        Dimension("clip", None, 0.0, 1.0),
        Dimension("model_dim", None, 8, 64, None, log=True),
    ):
        with pytest.raises(ValueError, match=f"{dimension.name} has a range, expected choices or"):
            dimension.values()
    assert Dimension("clip", None, 0.0, 1.0, 0.1).values() == tuple(i * 0.1 for i in range(11))


@pytest.mark.parametrize("step", [5e-324, 1e-300, 1e-7])
def test_values_that_nobody_waits_for_are_refused(step):
    dimension = Dimension("clip", None, 0.0, 1.0, step)
    with pytest.raises(ValueError, match=r"clip has .*, expected at most 1,000,000"):
        dimension.values()


@pytest.mark.parametrize(("low", "step"), [(0.05, 0.1), (0.1, 0.1), (0.3, 0.7)])
def test_dimension_contains_its_values_where_they_are_rounded(low, step):
    dimension = Dimension("clip", None, low, low + 20 * step, step)
    assert all(dimension.contains(value) for value in dimension.values())
    assert not dimension.contains(low + step / 3)


# --- The grid -------------------------------------------------------------------------------------


@few
@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4, unique=True), max_size=4))
def test_grid_has_every_combination_once(lists):
    search = GridSearch({f"setting {i}": values for i, values in enumerate(lists)})
    found = [tuple(search[i].values()) for i in range(len(search))]
    assert found == list(itertools.product(*lists))
    assert search.total == len(found)
    assert all(list(search[i]) == [f"setting {k}" for k in range(len(lists))] for i in range(1))
    for number in (-1, search.total):
        with pytest.raises(IndexError, match=f"no number {number}"):
            search[number]


def test_grid_search_goes_through_all_configs():
    search = grid_search_create([0.1, 0.2], [8, 16], [1], [2, 3, 4])
    assert search.total == 12
    for _ in range(2):
        found = []
        while (
            configs := grid_search_next_config(search, ModelConfig(), TrainingConfig())
        ) is not None:
            model, training = configs
            assert (model.num_blocks, model.scheme) == (1, "ternary")
            found.append((training.learning_rate, model.model_dim, training.batch_size))
        assert found == list(itertools.product([0.1, 0.2], [8, 16], [2, 3, 4]))
        assert grid_search_next_config(search, ModelConfig(), TrainingConfig()) is None
        grid_search_reset(search)
    grid_search_destroy(search)
    with pytest.raises(ValueError, match="model_dim has no values"):
        grid_search_create([0.1], [], [1], [2])


def test_an_optimizer_brings_its_own_rate():
    assert apply({"optimizer": "sgd"}, ModelConfig(), TrainingConfig())[1].learning_rate == 0.1
    given = TrainingConfig(learning_rate=0.5)
    assert apply({"optimizer": "sgd"}, ModelConfig(), given)[1].learning_rate == 0.5
    chosen = {"optimizer": "sgd", "learning_rate": 0.25}
    assert apply(chosen, ModelConfig(), TrainingConfig())[1].learning_rate == 0.25


def test_sizes_that_follow_from_others_follow_what_is_searched():
    chosen = {"model_dim": 96, "num_heads": 2, "gated": True, "norm": "rms", "num_kv_heads": 1}
    model, _ = apply(chosen, ModelConfig(), TrainingConfig())
    assert (model.head_dim, model.ffn_dim, model.num_kv_heads) == (48, 288, 1)
    assert (model.gated, model.norm) == (True, "rms")
    # A width that was given stays.
    model, _ = apply({"num_heads": 2}, ModelConfig(ffn_dim=100, head_dim=20), TrainingConfig())
    assert (model.head_dim, model.ffn_dim) == (20, 100)
