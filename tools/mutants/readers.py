"""The mutation check of the readers of published models and adapters: faults seeded into Python.

The suite runs once, to learn which test enters which function. Then, for each fault, a forked
process gives the function the code of its faulty copy, and runs the tests that enter it until one
fails. ``make test-mutants`` runs it after that of the kernels; faults that change nothing are in
``equivalent.toml``, too.
"""

import argparse
import ast
import importlib
import os
import re
import signal
import sys
import time
from collections import defaultdict
from types import CodeType, FunctionType

import check
import pytest
import seed

MODULES = ("gguf_file", "safetensors_file", "published", "tensor_types", "adapters")
PATHS = [f"legacy1bit/formats/{name}.py" for name in MODULES]
TESTS = [
    "tests/formats/test_gguf_file.py",
    "tests/formats/test_safetensors_file.py",
    "tests/formats/test_published.py",
    "tests/formats/test_adapter_files.py",
    "tests/test_fuzz.py",
]
# For a function.
FAULTS = 6


def functions_of(path):
    """The functions and methods of a Python file."""
    source = (check.ROOT / path).read_text()
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    tree = ast.parse(source)
    owners = [
        ("", tree),
        *((node.name, node) for node in tree.body if isinstance(node, ast.ClassDef)),
    ]
    for owner, holder in owners:
        for node in holder.body:
            if isinstance(node, ast.FunctionDef):
                begin, body = lines[node.lineno - 1], lines[node.body[0].lineno - 1]
                text = source[begin : lines[node.end_lineno]]
                head = source[begin:body]
                yield seed.Function(
                    path, node.name, begin, body - begin, begin + len(text), text, head, owner=owner
                )


def code_of(function, fault):
    """The code of a function with a fault; None if it is no Python."""
    source = (check.ROOT / function.path).read_text()
    faulty = source[: function.begin] + fault.text + source[function.end :]
    name = f"{function.owner}.{function.name}".lstrip(".")
    try:
        left = [compile(faulty, str(check.ROOT / function.path), "exec")]
    except SyntaxError:
        return None
    while left:
        code = left.pop()
        if code.co_qualname == name:
            return code
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return None


def living(function):
    """The function itself, out of what decorates it."""
    module = importlib.import_module(function.path.removesuffix(".py").replace("/", "."))
    holder = vars(module)[function.owner] if function.owner else module
    found = vars(holder)[function.name]
    for name in ("__func__", "fget", "func", "__wrapped__"):
        found = getattr(found, name, found)
    assert isinstance(found, FunctionType), function.key
    return found


class Plugin:
    """Instead of running the tests once: once to see what they enter, then for each fault."""

    def __init__(self, functions, only, results):
        self.functions, self.only, self.results = functions, re.compile(only), results
        self.failed = False

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed

    def pytest_runtestloop(self, session):
        entering, seconds = self.survey(session.items)
        for function in self.functions:
            items = entering[living(function).__code__]
            items.sort(key=lambda item: seconds[item])
            for fault in function.faults:
                if self.only.search(fault.name) and (code := code_of(function, fault)):
                    self.attack(function, fault, code, items, seconds)
        return True

    def survey(self, items):
        """Which tests enter a function's code, and how long each test takes."""
        entering, seconds = defaultdict(list), {}
        wanted = {living(function).__code__ for function in self.functions}
        for item, following in zip(items, [*items[1:], None], strict=True):
            entered = set()

            def note(frame, event, argument, entered=entered):
                if event == "call" and frame.f_code in wanted:
                    entered.add(frame.f_code)

            began = time.monotonic()
            sys.setprofile(note)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.setprofile(None)
            seconds[item] = time.monotonic() - began
            for code in entered:
                entering[code].append(item)
        if self.failed:
            sys.exit("tests fail without a fault")
        return entering, seconds

    def attack(self, function, fault, code, items, seconds):
        def work():
            living(function).__code__ = code
            for item, following in zip(items, [*items[1:], None], strict=True):
                # An endless loop ends the process.
                signal.alarm(int(20 + 20 * seconds[item]))
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self.failed:
                    os._exit(1)

        status = check.forked(work)
        self.results[fault.name] = bool(status)
        print(f"{'noticed' if status else 'survived':8} {fault.name}", file=sys.stderr, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="faults whose names match")
    options = parser.parse_args()
    unfit = set(check.equivalents())
    functions = [function for path in PATHS for function in functions_of(path)]
    for function in functions:
        function.faults = seed.choose(function, FAULTS, unfit)
    results = {}
    os.chdir(check.ROOT)
    sys.path.insert(0, str(check.ROOT))
    arguments = ["-q", "-s", "-n", "0", "-p", "no:cacheprovider", "-p", "no:faulthandler", *TESTS]
    pytest.main(arguments, plugins=[Plugin(functions, options.only, results)])
    survivors = [name for name, noticed in results.items() if not noticed]
    print(f"{len(results)} faults, {len(results) - len(survivors)} noticed")
    if survivors:
        print("\nNobody noticed:\n" + "\n".join(survivors))
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
