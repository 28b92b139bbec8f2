"""Requests per second of serve.py, one client against many, on this machine.

    python bench/serve.py --seconds 60 --clients 32
    python bench/serve.py --model path/to/model --seconds 60
    python bench/serve.py --peer-python PATH        also transformers' own server; PATH is a python
                                                    with transformers[serving]

Starts serve.py at a free port of 127.0.0.1, sends questions with `temperature: 0` from one client,
then from many at once, each of which asks again as soon as it is answered, and prints tokens/s and
the median and 95th percentile of the seconds until the first token and until the whole answer. The
server and the clients share the cores.

Requires: serve.py.
Next: bench/NOTES.md.
"""
import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(ROOT / "models/tiny"))
    parser.add_argument("--seconds", type=float, default=60, help="of each of the two rounds")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="the most of an answer")
    parser.add_argument("--peer-python", help="a python that has transformers[serving]")
    options = parser.parse_args()
    servers = {"serve.py": start_server}
    if options.peer_python:
        servers["transformers serve"] = start_peer
        servers["transformers serve --continuous-batching"] = partial(
            start_peer, more=["--continuous-batching"])
    for name, start in servers.items():
        print(name)
        process, port, model = start(options)
        try:
            alone = load(port, model, 1, options)
            many = load(port, model, options.clients, options)
        finally:
            process.terminate()
            process.wait(30)
        for clients, found in ((1, alone), (options.clients, many)):
            print_round(clients, found)
        if alone["results"] and many["results"]:
            print(f"{options.clients} clients / one: {many['rate'] / alone['rate']:.2f} x tokens/s")


def start_server(options) -> tuple[subprocess.Popen, int, str]:
    """serve.py as a process of its own, its port, and its name for the model."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve.py"), f"model_name_or_path={options.model}", "port=0",
         "use_cpu=true", f"max_num_seqs={options.clients}"], stderr=subprocess.PIPE, text=True,
        cwd=ROOT)
    for line in process.stderr:
        if line.startswith("serving"):
            break
    else:
        raise SystemExit("serve.py did not start")
    threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
    return process, int(line.split("127.0.0.1:")[1].split("/")[0]), Path(options.model).name


def start_peer(options, more: Sequence[str] = ()) -> tuple[subprocess.Popen, int, str]:
    """transformers' own server as start_server starts ours."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [options.peer_python, "-m", "transformers.cli.transformers", "serve", options.model,
         "--port", str(port), "--host", "127.0.0.1", "--device", "cpu", *more],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(120):
        try:
            one_request(port, "Who are you?", 2, options.model)
            return process, port, options.model
        except (OSError, ValueError):
            time.sleep(1)
    process.kill()
    raise SystemExit("transformers serve did not answer within 120 s")


def load(port: int, model: str, clients: int, options) -> dict:
    """What so many clients measure; each asks again until the seconds are over."""
    results, failures = [], []
    end = time.monotonic() + options.seconds

    def ask(client: int):
        number = 0
        while time.monotonic() < end:
            number += 1
            try:
                results.append(one_request(port, f"What is {client} + {number}?", options.tokens,
                                           model))
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures.append(error)

    start = time.monotonic()
    threads = [threading.Thread(target=ask, args=[client]) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.monotonic() - start
    return {"rate": sum(tokens for _, _, tokens in results) / spent, "results": results,
            "failures": failures, "requests": len(results) / spent}


def one_request(port: int, question: str, tokens: int, model: str) -> tuple[float, float, int]:
    """(seconds to the first token, seconds to the last, tokens) of a streamed answer."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True,
            "max_tokens": tokens, "stream_options": {"include_usage": True}, "model": model}
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body),
                       {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise ValueError(f"status {reply.status}")
    first = None
    for line in reply:
        if line.startswith(b"data: {"):
            first = first or time.monotonic() - start
            last = json.loads(line[6:])
    connection.close()
    return first, time.monotonic() - start, last["usage"]["completion_tokens"]


def print_round(clients: int, found: dict):
    """One line of figures."""
    def both(values):
        cuts = statistics.quantiles(values, n=20)
        return f"{1000 * cuts[9]:.0f} / {1000 * cuts[18]:.0f} ms"

    if len(found["results"]) < 2:
        return print(f"{clients:3} clients: {len(found['results'])} answers; "
                     f"{len(found['failures'])} failures: {found['failures'][:1]}")
    first, whole, _ = zip(*found["results"])
    print(f"{clients:3} clients: {found['rate']:,.0f} tokens/s, {found['requests']:.1f} "
          f"requests/s, first token p50 / p95 {both(first)}, answer {both(whole)}, "
          f"{len(found['results']):,} answers, {len(found['failures'])} failures")


if __name__ == "__main__":
    main()
