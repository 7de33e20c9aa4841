"""What is kept of the computer that a run was trained on."""

import json

import pytest

from legacy1bit.system.hardware import cpu_name, machine


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"processor\t: 0\nmodel name\t: A CPU (R) @ 2 GHz\n", "A CPU (R) @ 2 GHz"),
        (b"vendor_id\t: \xff\nmodel name\t: A\xae CPU\n", "A\N{REPLACEMENT CHARACTER} CPU"),
    ],
)
def test_cpu_name_is_text_whatever_the_bytes(content, name, tmp_path):
    table = tmp_path / "cpuinfo"
    table.write_bytes(content)
    assert cpu_name(table) == name
    name.encode()


def test_cpu_name_without_a_table_is_what_python_knows(tmp_path):
    assert cpu_name(tmp_path / "missing") != ""


def test_machine_can_be_written_as_json():
    assert json.loads(json.dumps(machine())) == machine()
