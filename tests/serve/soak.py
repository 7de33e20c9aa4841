"""A server with random clients, for as long as one likes: ``make soak MINUTES=30``.

They ask for texts, chats, JSON and embeddings, go away, stall, send garbage, and go back and forth
between two models of which one fits into memory; SIGHUP reloads these. A fault is

* a text that is not the one of ``Generator.complete`` for its seed, or a wrong embedding;
* a request of a client that waits for its answer, and gets neither it nor a reason (429 or 503);
* a status 500, or anything in the log that is no line of it;
* memory that is not flat within 5 percent after a third of the time, at most five minutes;
* requests that still run when all clients have gone, or an end that is none.
"""

import argparse
import collections
import contextlib
import http.client
import importlib.util
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from helpers.models import make_config, random_model
from helpers.paths import ROOT
from legacy1bit.generator import Generator
from legacy1bit.hyperparams import SamplingConfig
from legacy1bit.model import save_model
from legacy1bit.packed import packed_bytes
from legacy1bit.serve.slots import cache_bytes

CONTEXT, SLOTS, CLIENTS = 250, 4, 12
CONFIGS = {
    "small": make_config(vocab_size=256, sequence_length=CONTEXT),
    "large": make_config(vocab_size=256, sequence_length=CONTEXT, model_dim=48, num_blocks=3),
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
# Seconds between two reloads, and for which most clients ask for the same model.
RELOAD, TURN = 7.0, 4.0
# Flat: no tenth of the time is further from another.
FLAT = 1.05


def prepare(folder):
    """The models' paths, what can be asked for, and the right answers."""
    rng, asked = np.random.default_rng(0), []
    paths = {name: folder / name for name in CONFIGS}
    for name, config in CONFIGS.items():
        save_model(random_model(config), paths[name])
        with Generator.load(paths[name], 1, head="int8") as generator:
            for i in range(24):
                words = " ".join(rng.choice(["it", "was", "a", "dark", "night"], 3 + i))
                sampling = {"temperature": float(rng.choice([0.0, 0.8, 1.0])), "top_p": 0.9}
                body = {"model": name, "max_tokens": 10 + 4 * i, "seed": i, **sampling}
                chat = i % 3 == 0
                prompt = f"User: {words}\nAssistant: " if chat else words
                stop = ["\nUser:"] if chat else []
                right = generator.complete(
                    prompt, body["max_tokens"], SamplingConfig(**sampling), i, stop
                ).text
                said = {"messages": [{"role": "user", "content": words}]}
                asked.append((chat, {**body, **(said if chat else {"prompt": words})}, right))
            mean = generator.embed("Hello").astype(np.float64).mean(axis=0)
            asked.append(("vector", {"model": name, "input": "Hello"}, mean / np.linalg.norm(mean)))
    return paths, asked


class Soak:
    """Clients of one server, and what they have seen.

    Attributes
    ----------
    port, pid : int
    asked : list
        What can be asked for.
    seen : Counter
        What happened how often.
    faults : list of str
    """

    def __init__(self, port, pid, asked):
        self.port, self.pid, self.asked = port, pid, asked
        self.seen, self.faults = collections.Counter(), []
        self.ended = threading.Event()

    def client(self, number):
        """Ask until the end."""
        rng = random.Random(number)
        actions = [self.ask] * 12 + [self.go_away] * 3 + [self.garbage, self.look, self.ask_json]
        actions += [self.stall] * (number % 4 == 0)
        while not self.ended.is_set():
            action = rng.choice(actions)
            try:
                action(rng)
            except Exception as error:
                self.faults.append(f"{action.__name__}: {error!r}"[:500])

    def choose(self, rng):
        """A request, most likely for the model whose turn it is."""
        names = list(CONFIGS)
        turn = names[int(time.monotonic() / TURN) % 2]
        name = turn if rng.random() < 0.97 else rng.choice(names)
        return rng.choice([one for one in self.asked if one[1]["model"] == name])

    def send(self, connection, path, body):
        connection.request(
            "POST", path, json.dumps(body), {"content-type": "application/json"}
        )  # fmt: skip
        return connection.getresponse()

    def connect(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        return contextlib.closing(connection)

    def told_why(self, status, answer):
        """Whether a request was refused with a reason that says to come again."""
        if status not in (429, 503):
            return False
        self.seen[f"status {status}, {answer['error']['code']}"] += 1
        return True

    def ask(self, rng):
        """Ask, wait for the answer, compare."""
        kind, body, right = self.choose(rng)
        path = {True: "/v1/chat/completions", False: "/v1/completions", "vector": "/v1/embeddings"}
        stream = kind != "vector" and rng.random() < 0.5
        with self.connect() as connection:
            for _ in range(rng.randint(1, 3)):
                sent = {**body, "stream": True} if stream else body
                answer = self.send(connection, path[kind], sent)
                data = answer.read()
                if answer.headers["content-type"] == "application/json":
                    record = json.loads(data)
                    if self.told_why(answer.status, record):
                        time.sleep(0.05)
                        continue
                assert answer.status == 200, data[:300]
                if kind == "vector":
                    got = np.array(record["data"][0]["embedding"])
                    assert np.allclose(got, right, rtol=1e-4, atol=1e-6), "a wrong embedding"
                else:
                    got = self.streamed(data) if stream else self.text_of(record["choices"][0])
                    assert got == right, f"{body} gave {got!r}, expected {right!r}"
                self.seen["vectors" if kind == "vector" else "texts"] += 1

    @staticmethod
    def text_of(choice):
        said = choice.get("message") or choice.get("delta")
        return choice["text"] if said is None else said.get("content", "")

    def streamed(self, data):
        *events, end, rest = data.decode().split("\n\n")
        assert (end, rest) == ("data: [DONE]", ""), f"a stream ends with {data[-300:]!r}"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        return "".join(self.text_of(chunk["choices"][0]) for chunk in chunks)

    def ask_json(self, rng):
        """Ask for JSON of a schema."""
        if importlib.util.find_spec("llguidance") is None:
            return
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        _, body, _ = self.choose(rng)
        body = {"model": body["model"], "prompt": "a", "max_tokens": 40, "response_format": form}
        with self.connect() as connection:
            answer = self.send(connection, "/v1/completions", body)
            record = json.loads(answer.read())
        if not self.told_why(answer.status, record):
            assert answer.status == 200, record
            [choice] = record["choices"]
            assert json.loads(choice["text"])["a"] in (True, False)
            self.seen["JSON"] += 1

    def go_away(self, rng):
        """Ask, and be gone before the answer is whole."""
        kind, body, _ = self.choose(rng)
        if kind == "vector":
            return
        path = "/v1/chat/completions" if kind else "/v1/completions"
        sent = {**body, "max_tokens": 100, "n": rng.randint(1, 4), "stream": rng.random() < 0.7}
        with self.connect() as connection:
            connection.request(
                "POST", path, json.dumps(sent), {"content-type": "application/json"}
            )  # fmt: skip
            connection.sock.settimeout(rng.choice([0.001, 0.01, 0.05]))
            with contextlib.suppress(TimeoutError):
                connection.sock.recv(rng.choice([1, 300, 4000]))
        self.seen["gone"] += 1

    def garbage(self, rng):
        """Send what is no request, or a part of one."""
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n\r\n{"
        data = rng.choice(
            [rng.randbytes(300), whole[: rng.randrange(len(whole))], whole + b"x" * 99]
        )
        with contextlib.suppress(OSError), self.socket() as client:
            client.sendall(data)
            client.settimeout(0.05)
            client.recv(1000)
        self.seen["garbage"] += 1

    def stall(self, rng):
        """Hold a connection, and do nothing with it, or do not read the answer."""
        body = json.dumps({"prompt": "a", "max_tokens": 200, "stream": True, "n": 4}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        whole = b"%b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
        with contextlib.suppress(OSError), self.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(whole if rng.random() < 0.5 else whole[: rng.randrange(len(whole))])
            self.ended.wait(rng.uniform(0.5, 3.0))
        self.seen["stalled"] += 1

    def look(self, rng):
        """Read what the server says of itself."""
        with self.connect() as connection:
            for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/"):
                connection.request("GET", path)
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200, path
        self.seen["looks"] += 1

    def socket(self):
        return socket.create_connection(("127.0.0.1", self.port), 30)

    def unfinished(self):
        """What still runs or waits, by the server's own numbers."""
        with self.connect() as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        found = re.findall(r"^legacy1bit_(?:running|waiting)\{.*\} (\d+)$", text, re.M)
        return sum(map(int, found))

    def memory(self):
        """MiB that the server takes."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) / 1024

    def read_log(self, lines):
        """Count the statuses of the log, and find what does not belong there."""
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                self.faults.append(f"in the log: {line[:300]}")
                continue
            self.seen["reloads"] += record.get("reload") == "done"
            failed = record.get("status") == 500 or "failed" in str(record.get("reload"))
            # Both models do not fit at once, as it should be.
            expected = "MB of models in use" in str(record.get("error"))
            if failed or ("error" in record and not expected):
                self.faults.append(f"in the log: {line[:300]}")


def run(minutes, seed, folder):
    """Return how many faults there were."""
    paths, asked = prepare(folder)
    sizes = [packed_bytes(one) + cache_bytes(one, CONTEXT, SLOTS) for one in CONFIGS.values()]
    command = [sys.executable, "-m", "legacy1bit.main", "serve", "--port", "0"]
    command += [part for name, path in paths.items() for part in ("--model", f"{name}={path}")]
    command += ["--template", "plain", "--slots", str(SLOTS), "--memory-limit"]
    # What is loaded is a little larger than foreseen.
    command += [str(int(1.1 * max(sizes)))]
    environment = {
        **os.environ, "MALLOC_ARENA_MAX": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }  # fmt: skip
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True
    ) as server:  # fmt: skip
        try:
            line = server.stderr.readline()
            soak = Soak(int(re.search(r":(\d+) ", line)[1]), server.pid, asked)
            reader = threading.Thread(target=soak.read_log, args=(server.stderr,))
            reader.start()
            samples = drive(soak, server, minutes, seed)
            server.send_signal(signal.SIGTERM)
            if server.wait(60) != 0:
                soak.faults.append(f"the server ends with {server.returncode}")
            reader.join()
        finally:
            server.kill()
    middles = report(samples)
    if max(middles) > FLAT * min(middles):
        soak.faults.append(f"memory is not flat: {min(middles):.1f} to {max(middles):.1f} MiB")
    print(", ".join(f"{what}: {count}" for what, count in sorted(soak.seen.items())))
    for fault, count in collections.Counter(soak.faults).most_common(20):
        print(f"FAULT ({count}): {fault}")
    print(f"{len(soak.faults)} faults")
    return len(soak.faults)


def drive(soak, server, minutes, seed):
    """Let clients ask for so long; return the memory in time, without its beginning."""
    clients = [
        threading.Thread(target=soak.client, args=(seed + i,), daemon=True) for i in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    begin, samples = time.monotonic(), []
    warm = begin + min(20 * minutes, 300)
    reload = begin + RELOAD
    while (now := time.monotonic()) < begin + 60 * minutes and server.poll() is None:
        if now > warm:
            samples.append(soak.memory())
        if now > reload:
            reload = now + RELOAD
            server.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    soak.ended.set()
    for client in clients:
        client.join(150)
        if client.is_alive():
            soak.faults.append("a client waits for an answer without end")
    end = time.monotonic() + 20
    while soak.unfinished() and time.monotonic() < end:
        time.sleep(0.1)
    if count := soak.unfinished():
        soak.faults.append(f"{count} requests still run without clients")
    return samples


def report(samples):
    """Print the memory of each tenth of the time, and return it."""
    middles = [statistics.median(part) for part in np.array_split(samples, 10) if len(part)]
    print("MiB:", *(f"{one:.1f}" for one in middles))
    return middles


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, metavar="X", help="default: 30")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the clients")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return min(run(arguments.minutes, arguments.seed, Path(folder)), 1)


if __name__ == "__main__":
    sys.exit(main())
