"""Numbers of a server in Prometheus' text form (exposition format 0.0.4)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds of the buckets, in seconds.
_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """How often a time was how long."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count a time."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        """Yield the lines of the text."""
        counts = list(accumulate(self._counts))
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], counts, strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {counts[-1]}"


class Metrics:
    """What a server counts itself; engines have numbers of their own.

    All methods are for one thread.
    """

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds, self._first = Histogram(), Histogram()

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request; ``path`` is one of the server's own."""
        self._requests[path, status] += 1
        self._seconds.add(seconds)

    def first_token(self, seconds: float) -> None:
        """Count the time until the first token of a request."""
        self._first.add(seconds)

    def text(self, models: Mapping[str, Mapping[str, float]], connections: int) -> str:
        """Return all numbers.

        Parameters
        ----------
        models : mapping of str to mapping of str to float
            Numbers of the engines, by the names of their models. Names of totals end in ``_total``.
        connections : int
            Those that are open.
        """
        lines = list(
            _family(
                "http_requests_total",
                [
                    ((("path", path), ("status", str(status))), count)
                    for (path, status), count in sorted(self._requests.items())
                ],
            )
        )
        lines += _family("http_connections", [((), connections)])
        for name, histogram in (
            ("http_request_seconds", self._seconds),
            ("first_token_seconds", self._first),
        ):
            lines.append(f"# TYPE legacy1bit_{name} histogram")
            lines += histogram.lines(f"legacy1bit_{name}")
        for name in sorted({name for numbers in models.values() for name in numbers}):
            samples = [
                ((("model", model),), numbers[name])
                for model, numbers in models.items()
                if name in numbers
            ]
            lines += _family(name, samples)
        return "\n".join(lines) + "\n"


def _family(name: str, samples: Sequence[tuple[Labels, float]]) -> Iterable[str]:
    """Yield the lines of a counter or a gauge."""
    yield f"# TYPE legacy1bit_{name} {'counter' if name.endswith('_total') else 'gauge'}"
    for labels, value in samples:
        inside = ",".join(f'{label}="{_escape(text)}"' for label, text in labels)
        yield f"legacy1bit_{name}{f'{{{inside}}}' if inside else ''} {value:.12g}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
