"""The metrics file: an object a line, complete at every moment, cut back when a run goes on."""

import errno
import json
import math
import os

import numpy as np
import pytest

from legacy1bit.logger import METRICS_FILE, MetricsLogger, read_metrics

RECORDS = [{"step": step, "val_loss": 1.0 / step, "note": "\u00e9\n"} for step in (10, 20, 30)]


@pytest.fixture
def path(tmp_path):
    """A file of three records."""
    logger = MetricsLogger(tmp_path)
    for record in RECORDS:
        logger.log(record)
    return tmp_path / METRICS_FILE


def test_log_writes_an_object_a_line(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == RECORDS
    assert read_metrics(path) == RECORDS


def test_log_keeps_every_bit_of_a_number(tmp_path):
    numbers = {"step": 1 << 40, "a": 0.1 + 0.2, "b": 5e-324, "c": 1.7976931348623157e308}
    MetricsLogger(tmp_path).log(numbers)
    assert read_metrics(tmp_path / METRICS_FILE) == [numbers]


def test_log_leaves_a_complete_file_after_every_record(tmp_path):
    logger = MetricsLogger(tmp_path)
    assert read_metrics(logger.path) == []
    for count, record in enumerate(RECORDS, 1):
        logger.log(record)
        assert read_metrics(logger.path) == RECORDS[:count]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_log_writes_null_where_json_has_no_number(tmp_path, number):
    logger = MetricsLogger(tmp_path)
    logger.log({"step": 1, "val_loss": number})
    assert logger.path.read_text(encoding="utf-8") == '{"step": 1, "val_loss": null}\n'


def test_read_metrics_passes_over_a_line_cut_short(path):
    whole = path.read_bytes()
    last = whole.rindex(b"{")
    for size in range(last, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert read_metrics(path) == RECORDS[:2]


@pytest.mark.parametrize("line", ["{", '{"step": 2', "", "nan?", "[1", "5", "[]", "null", '"text"'])
def test_read_metrics_refuses_a_damaged_line(path, line):
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[1] = line
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_metrics(path)


def test_read_metrics_needs_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_metrics(tmp_path / "missing")


@pytest.mark.parametrize(("step", "kept"), [(9, 0), (10, 1), (15, 1), (20, 2), (30, 3), (99, 3)])
def test_logger_drops_what_happened_after_the_checkpoint(path, step, kept):
    logger = MetricsLogger(path.parent, step)
    assert read_metrics(path) == RECORDS[:kept]
    logger.log({"step": 40})
    assert read_metrics(path) == [*RECORDS[:kept], {"step": 40}]
    assert [file.name for file in path.parent.iterdir()] == [METRICS_FILE]


def test_logger_mends_a_file_that_a_crash_cut_short(path):
    path.write_bytes(path.read_bytes()[:-5])
    MetricsLogger(path.parent, 30).log({"step": 40})
    assert read_metrics(path) == [*RECORDS[:2], {"step": 40}]


def test_logger_of_a_new_run_begins_an_empty_file(path):
    MetricsLogger(path.parent)
    assert path.read_bytes() == b""


def test_logger_goes_on_without_a_file(tmp_path):
    logger = MetricsLogger(tmp_path, 20)
    logger.log(RECORDS[0])
    assert read_metrics(logger.path) == RECORDS[:1]


@pytest.mark.parametrize("line", ["{}", '{"step": null}', '{"step": "10"}', '{"val_loss": 1.0}'])
def test_logger_refuses_records_without_a_step(path, line):
    path.write_text(line + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        MetricsLogger(path.parent, 20)
    assert path.read_bytes() == before


def test_logger_needs_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        MetricsLogger(tmp_path / "missing")


def test_logger_loses_nothing_on_a_full_disk(path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        MetricsLogger(path.parent, 20)
    assert read_metrics(path) == RECORDS
    assert [file.name for file in path.parent.iterdir()] == [METRICS_FILE]
