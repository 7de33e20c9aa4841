"""TensorBoard's events of a run."""

import struct
import sys

import numpy as np

from legacy1bit.logger import EVENTS_FOLDER


def events_of(path):
    """The events of one file: a length, its checksum, the event, its checksum, and so on."""
    from tensorboardX.proto import event_pb2

    content, start, events = path.read_bytes(), 0, []
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        events.append(event_pb2.Event.FromString(content[start + 12 : start + 12 + length]))
        start += 12 + length + 4
    assert start == len(content)
    return events


def shown(folder):
    """The numbers that TensorBoard shows of a run, by name and step."""
    from tensorboardX.proto.event_pb2 import SessionLog

    numbers = {}
    for path in sorted((folder / EVENTS_FOLDER).glob("events.out.tfevents.*")):
        for event in events_of(path):
            if event.session_log.status == SessionLog.START:
                # A run that starts anew forgets what came after.
                numbers = {key: n for key, n in numbers.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in numbers
                numbers[value.tag, event.step] = value.simple_value
    return numbers


def numbers_of(record, prefix=""):
    """The numbers of a record by their paths, rounded to float32 as events hold them."""
    numbers = {}
    for key, value in record.items():
        if isinstance(value, dict):
            numbers |= numbers_of(value, f"{prefix}{key}/")
        elif value is not None and key not in ("step", "train_losses"):
            numbers[prefix + key] = float(np.float32(value))
    return numbers


def expected_events(records):
    numbers = {
        (name, record["step"]): number
        for record in records
        for name, number in numbers_of(record).items()
    }
    for record in records:
        for step, loss in record.get("train_losses", ()):
            numbers["train_losses", step] = float(np.float32(loss))
    return numbers


def set_apart(folder, name):
    """Files are named by the second in which they begin: as if the last had begun earlier."""
    (path,) = (folder / EVENTS_FOLDER).glob("events.out.tfevents.1[0-9]*")
    path.rename(path.with_name(f"events.out.tfevents.{name}"))


def without_tensorboardx(monkeypatch):
    """As where it is not installed."""
    names = [name for name in sys.modules if name.startswith("tensorboardX.")]
    for name in ("tensorboardX", *names):
        monkeypatch.setitem(sys.modules, name, None)
