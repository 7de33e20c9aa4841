"""The metrics file: an object a line, complete at every moment, cut back when a run goes on; and
TensorBoard's events.
"""

import contextlib
import errno
import json
import math
import os
import sys

import numpy as np
import pytest

from helpers.events import expected_events, set_apart, shown, without_tensorboardx
from legacy1bit.logger import METRICS_FILE, MetricsLogger, StepLog, read_metrics

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


NESTED = {
    "step": 1,
    "full_precision": False,
    "weights": {"blocks.0.ffn.wi": {"-1": 0.25, "0": 0.5, "1": 0.25}, "output": {}},
}


def test_log_keeps_records_within_records(tmp_path):
    logger = MetricsLogger(tmp_path)
    logger.log(NESTED)
    assert logger.path.read_text(encoding="utf-8") == json.dumps(NESTED) + "\n"
    assert read_metrics(logger.path) == [NESTED]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_log_writes_null_within_records_too(tmp_path, number):
    logger = MetricsLogger(tmp_path)
    logger.log({"step": 1, "weights": {"a": {"0": number, "1": 0.5}}})
    (record,) = read_metrics(logger.path)
    assert record == {"step": 1, "weights": {"a": {"0": None, "1": 0.5}}}


def test_logger_without_events_has_nothing_to_close(tmp_path):
    logger = MetricsLogger(tmp_path)
    logger.log(NESTED)
    logger.close()
    assert [file.name for file in tmp_path.iterdir()] == [METRICS_FILE]


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


def test_read_metrics_refuses_a_last_line_that_was_whole(path):
    """Cut short is what has no end of its line: others were there, and are damaged."""
    path.write_text('{"step": 1}\n{"step": 2\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        read_metrics(path)
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        StepLog(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2\n'


def test_read_metrics_takes_no_more_memory_than_a_line_needs(path):
    """A file of zeros may take no room on the disk."""
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="line 4: expected a JSON object"):
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


def test_logger_refuses_records_that_are_too_deep(path):
    """What is read may be deeper than what can be written again, but from Python 3.12 on is not."""
    path.write_bytes(b'{"step": 1, "a": ' + b'{"a": ' * 800 + b"1" + b"}" * 801 + b"\n")
    content = path.read_bytes()
    assert len(read_metrics(path)) == 1
    refused = pytest.raises(ValueError, match=r"metrics\.jsonl: a record is nested too deeply")
    with refused if sys.version_info < (3, 12) else contextlib.nullcontext():
        MetricsLogger(path.parent, 1000)
    assert path.read_bytes() == content


def test_logger_goes_on_with_numbers_in_lists_that_are_not_finite(path):
    path.write_text('{"step": 1, "a": {"b": [NaN, [Infinity, 2]]}}\n')
    StepLog(path, resume_at=1)
    assert read_metrics(path) == [{"step": 1, "a": {"b": [None, [None, 2]]}}]


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


# --- TensorBoard ----------------------------------------------------------------------------------


def test_events_have_the_curve_of_the_training_loss(tmp_path):
    pytest.importorskip("tensorboardX")
    logger = MetricsLogger(tmp_path, tensorboard=True)
    logger.log({"step": 20, "train_loss": 2.5, "train_losses": [[10, 3.0], [20, 2.0]]})
    logger.close()
    curve = {("train_losses", 10): 3.0, ("train_losses", 20): 2.0}
    assert shown(tmp_path) == curve | {("train_loss", 20): 2.5}


def event_record(step, loss):
    shares = {"-1": 0.125, "0": 1 / 3, "1": 1 - 1 / 3 - 0.125, "flipped": 1 / step}
    return {
        "step": step,
        "val_loss": loss,
        "val_tokens": 100,
        "full_precision": step < 20,
        "weights": {"blocks.0.attention.wq": shares, "blocks.0.ffn.wi": shares},
    }


def test_events_hold_every_number_of_a_record(tmp_path):
    records = [event_record(step, 1.0 / step) for step in (10, 20, 30)]
    logger = MetricsLogger(tmp_path, tensorboard=True)
    for record in records:
        logger.log(record)
    logger.close()
    assert shown(tmp_path) == expected_events(records)
    assert ("weights/blocks.0.ffn.wi/-1", 30) in shown(tmp_path)
    assert read_metrics(logger.path) == records


def test_events_are_in_the_file_as_soon_as_they_are_logged(tmp_path):
    """A run that is killed then has them in both of its records."""
    logger = MetricsLogger(tmp_path, tensorboard=True)
    for step in (10, 20):
        logger.log(event_record(step, 1.0))
        assert shown(tmp_path) == expected_events(read_metrics(logger.path))
    logger.close()


def test_events_of_an_earlier_attempt_are_not_overwritten(tmp_path):
    """Also where it began in the same second."""
    for step in (10, 20, 30):
        logger = MetricsLogger(tmp_path, step - 10, tensorboard=True)
        logger.log(event_record(step, 1.0))
        logger.close()
    assert shown(tmp_path) == expected_events(read_metrics(logger.path))


def test_events_leave_out_what_json_has_no_number_for_or_hold_it(tmp_path):
    """A loss that is no number must not end a run."""
    logger = MetricsLogger(tmp_path, tensorboard=True)
    logger.log({"step": 1, "val_loss": math.nan, "top1": None, "weights": {"a": {"0": math.inf}}})
    logger.close()
    assert not any(math.isfinite(number) for number in shown(tmp_path).values())
    assert read_metrics(logger.path)[0]["val_loss"] is None


@pytest.mark.parametrize("step", [10, 15, 20, 30])
def test_events_after_the_checkpoint_are_no_longer_shown(tmp_path, step):
    logger = MetricsLogger(tmp_path, tensorboard=True)
    for at in (10, 20, 30):
        logger.log(event_record(at, 1.0))
    logger.close()
    set_apart(tmp_path, "0")
    logger = MetricsLogger(tmp_path, step, tensorboard=True)
    for at in (20, 30, 40):
        if at > step:
            logger.log(event_record(at, 2.0))
    logger.close()
    records = read_metrics(logger.path)
    assert [record["step"] for record in records] == [10, 20, 30, 40]
    losses = [record["val_loss"] for record in records]
    assert losses == [1.0 + (at > step) for at in (10, 20, 30, 40)]
    assert shown(tmp_path) == expected_events(records)


def test_events_need_tensorboardx(tmp_path, monkeypatch):
    """One sentence says what to do, and nothing is written."""
    without_tensorboardx(monkeypatch)
    with pytest.raises(ValueError, match=r"tensorboardX, which is not installed: pip install"):
        MetricsLogger(tmp_path, tensorboard=True)
    assert list(tmp_path.iterdir()) == []
    MetricsLogger(tmp_path).log(NESTED)
    assert read_metrics(tmp_path / METRICS_FILE) == [NESTED]


def test_events_do_not_begin_in_a_run_whose_metrics_are_damaged(path):
    path.write_text("{}\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        MetricsLogger(path.parent, 20, tensorboard=True)
    assert [file.name for file in path.parent.iterdir()] == [METRICS_FILE]
