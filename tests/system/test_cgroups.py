"""What control groups allow, as their files tell it."""

import os
import sys
import threading

import pytest

from legacy1bit.system.cgroups import can_start_threads, core_quotas, free_memory


def told(groups, files, folder):
    """Write what the system tells of groups; return the table of those of this process."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    table = folder / "table"
    table.write_text(groups + "\n")
    return table


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/", {}, []),
        ("0::/", {"cpu.max": "max 100000\n"}, []),
        ("0::/", {"cpu.max": "150000 100000\n"}, [2]),
        ("0::/", {"cpu.max": "50000 100000\n"}, [1]),
        ("0::/a/b", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "300000 100000\n"}, [4, 3]),
        ("4:memory:/m\n2:cpu,cpuacct:/c", {"cpu,cpuacct/c/cpu.cfs_quota_us": "250000\n"}, []),
        (
            "4:memory:/m\n2:cpu,cpuacct:/c",
            {
                "cpu,cpuacct/c/cpu.cfs_quota_us": "250000\n",
                "cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
            },
            [3],
        ),
        (
            "1:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            [],
        ),
        ("0::/", {"cpu.max": "nonsense\n"}, []),
        ("0::/", {"cpu.max": "inf 100000\n"}, []),
        ("\nnonsense\n4\n5:cpu", {"cpu.max": "100000 100000\n"}, []),
    ],
)
def test_quotas_of_control_groups(groups, files, cores, tmp_path):
    assert core_quotas(told(groups, files, tmp_path), tmp_path) == cores


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are characters")
@pytest.mark.parametrize("name", [b"\xff", b"a\x0bb", b"a\x85b", "a\u2028b".encode(), b"a:b"])
def test_groups_of_any_name_are_read(name, tmp_path):
    group = os.fsdecode(name)
    files = {f"{group}/cpu.max": "150000 100000\n"} | version_2(f"{group}/", 100, 40)
    table = told("", files, tmp_path)
    table.write_bytes(b"0::/" + name + b"\n")
    assert core_quotas(table, tmp_path) == [2]
    assert free_memory(table, tmp_path) == [60]


def test_numbers_that_are_not_text_set_no_limit(tmp_path):
    files = {"cpu.max": "", **version_2("", 100, 40)}
    table = told("0::/", files, tmp_path)
    (tmp_path / "cpu.max").write_bytes(b"\xff 100000\n")
    (tmp_path / "memory.current").write_bytes(b"\xff\n")
    assert core_quotas(table, tmp_path) == []
    assert free_memory(table, tmp_path) == []


def test_can_start_threads_leaves_none_behind():
    before = threading.active_count()
    assert can_start_threads()
    assert can_start_threads(5)
    assert threading.active_count() == before


def test_can_start_threads_counts_those_at_the_same_time(monkeypatch):
    start = threading.Thread.start

    def limited(thread):
        if threading.active_count() >= most:
            raise RuntimeError("can't start new thread")
        start(thread)

    most = threading.active_count() + 2
    monkeypatch.setattr(threading.Thread, "start", limited)
    assert [can_start_threads(count) for count in (1, 2, 3)] == [True, True, False]


def test_nothing_is_told_where_there_are_no_control_groups(tmp_path):
    assert core_quotas(tmp_path / "missing", tmp_path) == []
    assert free_memory(tmp_path / "missing", tmp_path) == []


def version_2(folder, most, used, stat=""):
    files = {"memory.max": most, "memory.current": used, "memory.stat": stat}
    return {f"{folder}{name}": f"{content}\n" for name, content in files.items()}


def version_1(folder, most, used, stat=""):
    files = {"memory.limit_in_bytes": most, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"memory/{folder}{name}": f"{content}\n" for name, content in files.items()}


STAT = "anon 1\nfile 999\ninactive_file 30\nactive_file 7\ninactive_anon 5"
STAT_1 = "cache 999\ninactive_file 1\ntotal_inactive_file 30\ntotal_active_file 7"


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/", {}, []),
        ("0::/", version_2("", "max", 50), []),
        ("0::/", version_2("", 100, 40), [60]),
        # Files that were read are no reason to refuse anything.
        ("0::/", version_2("", 100, 95, STAT), [42]),
        ("0::/", version_2("", 100, 250), [0]),
        ("0::/a/b", version_2("a/", 100, 40) | version_2("a/b/", 80, 30), [60, 50]),
        ("0::/a", {"a/memory.max": "100\n"}, []),
        ("0::/a", {"a/memory.max": "100\n", "a/memory.current": "30\n"}, [70]),
        ("0::/", version_2("", "nonsense", 4), []),
        ("0::/", version_2("", 100, 40, "active_file nonsense"), []),
        ("3:cpu:/c\n4:memory:/m", version_1("m/", 100, 95, STAT_1), [42]),
        ("3:cpu:/c\n4:memory:/m", version_1("", 100, 40) | version_1("m/", 90, 40), [60, 50]),
    ],
)
def test_memory_of_control_groups(groups, files, free, tmp_path):
    assert free_memory(told(groups, files, tmp_path), tmp_path) == free
