"""Options under other names: those of other programs, and of earlier versions."""

import difflib
from collections.abc import Sequence

# Options of other programs, and the nearest ones here.
_ELSEWHERE = {
    **dict.fromkeys(("lr", "max-lr", "rate"), ("learning-rate",)),
    **dict.fromkeys(("wd", "decay"), ("weight-decay",)),
    **dict.fromkeys(("epochs", "epoch", "max-iters", "iterations", "max-steps"), ("steps",)),
    **dict.fromkeys(("time", "max-time"), ("minutes",)),
    **dict.fromkeys(("batch", "bs"), ("batch-size",)),
    **dict.fromkeys(("accumulate", "grad-accum"), ("gradient-accumulation",)),
    **dict.fromkeys(("warmup",), ("warmup-steps",)),
    **dict.fromkeys(("dim", "width", "n-embd", "d-model", "hidden-size"), ("model-dim",)),
    **dict.fromkeys(("layers", "n-layer", "num-layers", "depth"), ("blocks",)),
    **dict.fromkeys(("n-head", "num-heads", "num-attention-heads"), ("heads",)),
    **dict.fromkeys(
        ("ctx", "ctx-size", "context", "context-length", "block-size", "seq-len", "max-length"),
        ("sequence-length", "max-tokens"),
    ),
    **dict.fromkeys(("vocab", "vocabulary"), ("vocab-size",)),
    **dict.fromkeys(("dtype",), ("precision", "type")),
    **dict.fromkeys(("quantization", "quant"), ("scheme", "type")),
    **dict.fromkeys(("workers", "cores", "cpus", "num-threads"), ("threads",)),
    **dict.fromkeys(("input", "file", "text", "dataset", "train", "corpus"), ("data", "prompt")),
    **dict.fromkeys(("val", "valid", "eval", "test"), ("validation",)),
    **dict.fromkeys(("o", "output", "save", "name"), ("out",)),
    **dict.fromkeys(("m", "model", "run", "load", "checkpoint"), ("model", "resume")),
    **dict.fromkeys(("continue", "restart"), ("resume",)),
    **dict.fromkeys(("n", "length", "tokens", "n-predict", "max-new-tokens"), ("max-tokens",)),
    **dict.fromkeys(("temp", "t"), ("temperature",)),
    **dict.fromkeys(("num-samples", "samples"), ("count",)),
    **dict.fromkeys(("chat",), ("interactive",)),
}


def nearest_option(name: str, options: Sequence[str]) -> str | None:
    """Return the option that is probably meant by a name that is none; None if no one is near.

    Parameters
    ----------
    name : str
        Without dashes in front.
    options : sequence of str
        Those that there are, in the same form.
    """
    # Loaded where it is needed: with NumPy.
    from legacy1bit.hyperparams import ALIASES

    name = name.lower().replace("_", "-")
    today = ALIASES.get(name.replace("-", "_"), "").replace("_", "-")
    known = [option for option in (today, *_ELSEWHERE.get(name, ())) if option in options]
    near = known or difflib.get_close_matches(name, options, 1)
    return near[0] if near else None
