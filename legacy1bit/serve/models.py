"""The models of a server: by name, loaded on demand, within a memory limit."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

from legacy1bit.formats.adapters import resolve
from legacy1bit.formats.published import read_model
from legacy1bit.generator import MOST_CONTEXT, Generator
from legacy1bit.packed import packed_bytes
from legacy1bit.serve.engine import Engine, Stats
from legacy1bit.serve.requests import Closed
from legacy1bit.serve.slots import cache_bytes
from legacy1bit.threads import default_threads


@dataclass(frozen=True)
class Source:
    """A model that can be loaded.

    Attributes
    ----------
    name : str
        What requests call it.
    path : Path
    adapters : tuple of str
        On it, ``PATH[:SCALE]`` each.
    """

    name: str
    path: Path
    adapters: tuple[str, ...] = ()


def named_sources(models: Sequence[str], adapters: Sequence[str] = ()) -> list[Source]:
    """Return models as they are named on the command line.

    Parameters
    ----------
    models : sequence of str
        ``NAME=PATH`` each, or a path, whose last part is the name, without ``.gguf``.
    adapters : sequence of str
        ``NAME=PATH[:SCALE]`` each; without a name for the only model.

    Raises
    ------
    ValueError
        If two models have one name, or an adapter has none that a model has.
    """
    sources: dict[str, Source] = {}
    for text in models:
        name, path = _split_name(text)
        name = name or Path(path).resolve().name.removesuffix(".gguf")
        if not name or not path:
            raise ValueError(f"the model is {text!r}, expected NAME=PATH or a path")
        if name in sources:
            raise ValueError(f"two models are named {name}: give one another, NAME=PATH")
        sources[name] = Source(name, Path(path))
    for text in adapters:
        name, path = _split_name(text)
        if not name and len(sources) == 1:
            (name,) = sources
        if name not in sources:
            raise ValueError(
                f"the adapter is {text!r}, expected MODEL=PATH, a model of {', '.join(sources)}"
            )
        one = sources[name]
        sources[name] = Source(name, one.path, (*one.adapters, path))
    return list(sources.values())


def _split_name(text: str) -> tuple[str, str]:
    """Return the name before an equals sign, if it is no part of a path; and the rest."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and "/" not in name else ("", text)


@dataclass(eq=False)
class _Loaded:
    """A model in memory."""

    source: Source
    path: Path
    engine: Engine
    nbytes: int
    used: int
    leases: int = 0
    stale: bool = False

    def close(self) -> None:
        self.engine.close()
        self.engine.generator.close()


class Lease:
    """A model that is held: it stays loaded until ``release``, or the end of a ``with``.

    Attributes
    ----------
    name : str
    path : Path
        Of its files: where it is an adapter's run, those of the model below.
    engine : Engine
    """

    def __init__(self, loaded: _Loaded, give_back: Callable[[_Loaded], None]) -> None:
        self.name, self.path, self.engine = loaded.source.name, loaded.path, loaded.engine
        self._held: _Loaded | None = loaded
        self._give_back = give_back

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        held, self._held = self._held, None
        if held is not None:
            self._give_back(held)


class Models:
    """Models by name, each with its engine, loaded when they are first asked for.

    Parameters
    ----------
    sources : sequence of Source
    slots, context, queue
        Of each engine; see ``Engine``.
    threads : int, optional
        By default ``default_threads()``.
    memory : int, optional
        The most bytes of weights and caches together. Another model takes the place of those that
        nobody holds, the one not used for longest first.
    form, head
        How weights are packed; see ``PackedModel``. With float matrices in int8, a text is the same
        whatever runs beside it.

    Notes
    -----
    Every method may be called from any thread. One model is loaded at a time.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        slots: int = 4,
        context: int | None = None,
        queue: int = 64,
        threads: int | None = None,
        memory: int | None = None,
        form: str = "2bit",
        head: str = "int8",
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self._slots, self._context, self._queue = slots, context, queue
        self._threads, self._memory = threads, memory
        self._form, self._head = form, head
        self._changed = threading.Condition()
        self._loaded: list[_Loaded] = []
        self._loading = self._ending = False
        self._clock = count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """The names of the models, in the order in which they were given."""
        return list(self._sources)

    def acquire(self, name: str) -> Lease:
        """Hold a model, which is loaded if it must be.

        Raises
        ------
        KeyError
            If there is no model of this name.
        Closed
            If the server ends.
        MemoryError
            If it does not fit beside those that are held.
        OSError, ValueError
            If it cannot be loaded.
        """
        source = self._sources[name]
        with self._changed:
            self._changed.wait_for(lambda: not self._loading or self._find(name))
            if self._ending:
                raise Closed("the server ends, and takes no new requests")
            if found := self._find(name):
                return self._lease(found)
            self._loading = True
        loaded = None
        try:
            loaded = self._load(source)
        finally:
            with self._changed:
                self._loading = False
                if loaded is not None:
                    self._loaded.append(loaded)
                    lease = self._lease(loaded)
                self._changed.notify_all()
        return lease

    def card(self, name: str) -> dict[str, Any]:
        """Return what is known of a model, without its path; most of it while it is loaded."""
        source = self._sources[name]
        with self._changed:
            found = self._find(name)
            card: dict[str, Any] = {"loaded": found is not None, "adapters": len(source.adapters)}
            if found is not None:
                engine, model = found.engine, found.engine.generator.model
                config = model.config
                card |= {
                    "parameters": sum(math.prod(one.shape) for one in model.parameters.values()),
                    "context": engine.context,
                    "slots": engine.stats().slots,
                    "bytes": found.nbytes,
                    "vocab_size": config.vocab_size,
                    "model_dim": config.model_dim,
                    "num_blocks": config.num_blocks,
                    "num_heads": config.num_heads,
                    "scheme": config.scheme,
                }
        return card

    def stats(self) -> Mapping[str, Stats]:
        """Return the numbers of the models that are loaded."""
        with self._changed:
            return {one.source.name: one.engine.stats() for one in self._loaded if not one.stale}

    def reload(self) -> None:
        """Load every model anew when it is next asked for; requests that run end with the old."""
        with self._changed:
            self._changed.wait_for(lambda: not self._loading)
            for one in self._loaded:
                one.stale = True
            self._changed.notify_all()
        self._close(self._loaded)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests, and wait until the others have ended; return whether they have."""
        with self._changed:
            self._ending = True
            return self._changed.wait_for(
                lambda: not self._loading and not any(one.leases for one in self._loaded), timeout
            )

    def close(self) -> None:
        """Cancel the requests that are left, and release all models."""
        with self._changed:
            self._ending = True
            self._changed.wait_for(lambda: not self._loading)
        self._close(self._loaded, held=True)

    def _find(self, name: str) -> _Loaded | None:
        fresh = (one for one in self._loaded if one.source.name == name and not one.stale)
        return next(fresh, None)

    def _lease(self, loaded: _Loaded) -> Lease:
        loaded.leases += 1
        loaded.used = next(self._clock)
        return Lease(loaded, self._give_back)

    def _give_back(self, loaded: _Loaded) -> None:
        with self._changed:
            loaded.leases -= 1
            self._changed.notify_all()
        if loaded.stale:
            self._close([loaded])

    def _close(self, models: Sequence[_Loaded], held: bool = False) -> None:
        """Close models that are loaded; of those that are held only if asked for."""
        with self._changed:
            gone = [one for one in models if one in self._loaded and (held or not one.leases)]
            self._loaded = [one for one in self._loaded if one not in gone]
        for one in gone:
            one.close()

    def _load(self, source: Source) -> _Loaded:
        path, _ = resolve(source.path, ())
        config, _, _ = read_model(path)
        context = min(config.sequence_length, self._context or MOST_CONTEXT)
        cache = cache_bytes(config, context, self._slots)
        self._make_room(source.name, packed_bytes(config) + cache)
        generator = Generator.load(
            source.path,
            default_threads() if self._threads is None else self._threads,
            self._form,
            self._head,
            context=self._context,
            adapters=source.adapters,
        )
        engine = Engine(generator, self._slots, self._context, self._queue)
        return _Loaded(source, path, engine, generator.model.nbytes + cache, next(self._clock))

    def _make_room(self, name: str, nbytes: int) -> None:
        """Close models that nobody holds, until another one fits."""
        while self._memory is not None:
            with self._changed:
                taken = sum(one.nbytes for one in self._loaded)
                idle = sorted((one for one in self._loaded if not one.leases), key=_used)
            if taken + nbytes <= self._memory:
                return
            if not idle:
                raise MemoryError(
                    f"{name} takes about {nbytes / 1e6:,.0f} MB beside {taken / 1e6:,.0f} MB of "
                    f"models in use, expected at most {self._memory / 1e6:,.0f} MB"
                )
            self._close(idle[:1])


def _used(loaded: _Loaded) -> int:
    return loaded.used
