"""The models of a server: which are loaded, and until when."""

import threading

import pytest

from helpers.models import wild_model
from legacy1bit.generator import Generator
from legacy1bit.model import save_model
from legacy1bit.packed import PackedModel
from legacy1bit.serve.engine import Engine
from legacy1bit.serve.models import Models, Source, named_sources
from legacy1bit.serve.requests import Closed, GenerationRequest, Piece
from legacy1bit.serve.slots import cache_bytes

CONTEXT = 64


@pytest.fixture
def sources(tmp_path):
    for i, name in enumerate("abc"):
        save_model(wild_model(i, sequence_length=CONTEXT), tmp_path / name)
    return [Source(name, tmp_path / name) for name in "abc"]


def text_of(engine, prompt=b"ab"):
    request = GenerationRequest(engine.generator.encode(prompt), 20, seed=4)
    return "".join(event.text for event in engine.submit(request) if isinstance(event, Piece))


def loaded(models):
    return [name for name in models.names if models.card(name)["loaded"]]


def size_of(models, name):
    with models.acquire(name):
        return models.card(name)["bytes"]


def test_models_are_loaded_when_they_are_asked_for(sources):
    with Models(sources, slots=2, threads=1) as models:
        assert models.names == ["a", "b", "c"]
        assert loaded(models) == []
        texts = {}
        for name, source in zip("ab", sources, strict=False):
            with models.acquire(name) as lease:
                assert (lease.name, lease.path) == (name, source.path)
                texts[name] = text_of(lease.engine)
            alone = Generator.load(source.path, 1, head="int8")
            assert texts[name] == alone.complete(b"ab", 20, seed=4).text
        assert texts["a"] != texts["b"]
        assert loaded(models) == ["a", "b"]
        assert sorted(models.stats()) == ["a", "b"]
        with models.acquire("a") as lease, models.acquire("a") as other:
            assert lease.engine is other.engine
            assert models.stats()["a"].requests == 1
        card = models.card("a")
        assert (card["context"], card["slots"], card["vocab_size"]) == (CONTEXT, 2, 256)
        with pytest.raises(KeyError):
            models.acquire("d")


def test_a_model_says_what_it_takes(sources):
    with Models(sources, slots=3) as models, models.acquire("a") as lease:
        model = lease.engine.generator.model
        assert models.card("a")["bytes"] == model.nbytes + cache_bytes(model.config, CONTEXT, 3)


def test_the_cache_takes_what_it_says():
    packed = PackedModel(wild_model(sequence_length=2048))
    generator = Generator(packed, threads=1)
    sizes = [generator.decoder(2048, sequences).nbytes for sequences in (4, 12)]
    ids = 4 * 8 * 2048
    found = sizes[1] - sizes[0] - ids
    # The logits of the sequences, and their tokens.
    assert found - 8 * 4 * 256 == cache_bytes(packed.config, 2048, 8)


def test_a_model_takes_the_place_of_the_one_not_used_for_longest(sources):
    with Models(sources[:1], threads=1) as models:
        size = size_of(models, "a")
    with Models(sources, threads=1, memory=2 * size) as models:
        for name in "abac":
            models.acquire(name).release()
        assert loaded(models) == ["a", "c"]
        held = models.acquire("a")
        models.acquire("b").release()
        assert loaded(models) == ["a", "b"]
        with models.acquire("b"), pytest.raises(MemoryError, match="c takes about 0 MB beside"):
            models.acquire("c")
        assert text_of(held.engine)
        held.release()
        held.release()
        models.acquire("c").release()
        assert loaded(models) == ["b", "c"]
    with Models(sources, threads=1, memory=size // 2) as models:
        with pytest.raises(MemoryError, match="expected at most"):
            models.acquire("a")
        assert loaded(models) == []


def test_a_reload_changes_models_when_nobody_holds_them(sources):
    with Models(sources, threads=1) as models:
        models.acquire("b").release()
        lease = models.acquire("a")
        before = text_of(lease.engine)
        save_model(wild_model(9, sequence_length=CONTEXT), sources[0].path)
        models.reload()
        assert loaded(models) == []
        assert text_of(lease.engine) == before
        with models.acquire("a") as other:
            after = text_of(other.engine)
            assert after != before
            assert text_of(lease.engine) == before
        lease.release()
        with pytest.raises(Closed):
            text_of(lease.engine)
        with models.acquire("a") as other:
            assert text_of(other.engine) == after


def test_a_model_that_cannot_be_loaded_leaves_the_others(sources, tmp_path):
    sources = [
        *sources,
        Source("gone", tmp_path / "gone"),
        Source("adapted", tmp_path / "a", ("x",)),
    ]
    with Models(sources, threads=1) as models:
        for name in ("gone", "adapted"):
            with pytest.raises((OSError, ValueError)):
                models.acquire(name)
        assert text_of(models.acquire("a").engine)
        assert loaded(models) == ["a"]


def test_many_threads_load_a_model_once(sources, monkeypatch):
    loads, load = [], Generator.load.__func__

    def counted(cls, path, *arguments, **named):
        loads.append(path)
        return load(cls, path, *arguments, **named)

    monkeypatch.setattr(Generator, "load", classmethod(counted))
    texts = []

    def work(number):
        with models.acquire("ab"[number % 2]) as lease:
            texts.append((lease.name, text_of(lease.engine)))

    with Models(sources, threads=1, queue=100) as models:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert models.drain(1)
        with pytest.raises(Closed, match="no new requests"):
            models.acquire("a")
    assert sorted(path.name for path in loads) == ["a", "b"]
    assert len(texts) == 20
    assert len(set(texts)) == 2


def test_models_that_are_drained_wait_for_those_that_are_held(sources):
    with Models(sources, threads=1) as models:
        lease = models.acquire("a")
        assert not models.drain(0.01)
        threading.Timer(0.05, lease.release).start()
        assert models.drain(20)
        engine = lease.engine
    assert isinstance(engine, Engine)
    with pytest.raises(Closed):
        text_of(engine)


def test_names_of_the_command_line(tmp_path):
    assert named_sources(["x=runs/a=1", "runs/b=2", "c.gguf"]) == [
        Source("x", named_sources(["y=runs/a=1"])[0].path),
        Source("b=2", named_sources(["y=runs/b=2"])[0].path),
        Source("c", named_sources(["y=c.gguf"])[0].path),
    ]
    assert named_sources(["runs/b"], ["l:0.5", "b=m"])[0].adapters == ("l:0.5", "m")
    assert [one.adapters for one in named_sources(["a=x", "b=y"], ["b=l"])] == [(), ("l",)]
    for models, adapters, message in (
        (["a=x", "a=y"], [], "two models are named a"),
        (["/"], [], "the model is '/', expected NAME=PATH"),
        (["a="], [], "the model is 'a=', expected NAME=PATH"),
        (["a=x", "b=y"], ["l"], "the adapter is 'l', expected MODEL=PATH, a model of a, b"),
        (["a=x"], ["c=l"], "the adapter is 'c=l', expected MODEL=PATH, a model of a"),
    ):
        with pytest.raises(ValueError, match=message):
            named_sources(models, adapters)
