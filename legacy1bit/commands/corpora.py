"""Where the text of a run comes from."""

import hashlib
from pathlib import Path
from typing import Any

from legacy1bit.data_utils import load_text_from_file
from legacy1bit.dataset import Corpus, story_corpus, text_corpus
from legacy1bit.hyperparams import ModelConfig

STORIES = "stories"

_STORIES = 20000
_MOST_STORIES = 10_000_000
_HELD_OUT_STORIES = 256

# What is kept of where a corpus came from: of a text, and of the stories.
_SOURCE_KINDS = ({"name": str, "path": str, "sha256": str}, {"stories": int, "seed": int})


def source_of(data: str | None, count: int | None, seed: int) -> dict[str, Any]:
    """Return where a corpus comes from, so that it can be made again."""
    if data is None:
        return {"name": STORIES, "stories": _STORIES if count is None else count, "seed": seed}
    if count is not None:
        raise ValueError("--stories and --data exclude each other")
    text = load_text_from_file(data)
    return {
        "name": Path(data).name,
        "path": str(Path(data).resolve()),
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }


def corpus_of(source: dict[str, Any], config: ModelConfig) -> Corpus:
    """Return the corpus that ``source_of`` described.

    Raises
    ------
    ValueError
        If the text has changed since, or is too short.
    """
    told = source.get("name") == STORIES and "path" not in source
    for key, kind in _SOURCE_KINDS[told].items():
        if type(source.get(key)) is not kind:
            raise ValueError(f"the run's source has {key} {source.get(key)!r}, which is damaged")
    if told:
        if not 1 <= source["stories"] <= _MOST_STORIES:
            raise ValueError(f"stories is {source['stories']}, expected 1 to {_MOST_STORIES}")
        return story_corpus(
            source["stories"],
            _HELD_OUT_STORIES,
            source["seed"],
            config.sequence_length,
            config.pad_token,
        )
    text = load_text_from_file(source["path"])
    if hashlib.sha256(text).hexdigest() != source["sha256"]:
        raise ValueError(f"{source['path']} has changed since the run began")
    return text_corpus(text, source["name"], config.sequence_length, config.pad_token)
