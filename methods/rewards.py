"""Call the reward functions of stages ppo and grpo, in a process of their own.

    rewards = Rewards(["data/rewards.py:arithmetic"], weights=None, timeout=10)
    parts = rewards.score({"prompt": …, "row": …, "where": …}, answer)      # a number of each

A reward function is Python that a user writes: `score(prompt, answer, row) -> number`. prompt is
the last question, row the row of the dataset as it was read, with its own answer. One that raises,
returns no finite number, hangs or ends its process gives NaN for that answer and a sentence with
the row; the run goes on.

    python methods/rewards.py data/rewards.py:arithmetic    the process: JSON lines in and out

Requires: nothing, so that the process starts fast.
Next: methods/rollouts.py. Examples: data/rewards.py.
"""
import ast
import importlib.util
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

MAX_SAID = 3            # problems of one rollout that are printed
START_SECONDS = 120     # a file of rewards may import large packages


class Rewards:
    """Reward functions, given as FILE:FUNCTION. names: theirs; weights: None for 1 each.

    more: names of rewards that are computed elsewhere; they come last. Raises ValueError or
    FileNotFoundError if a function is not there or its file cannot be imported.
    """

    def __init__(self, functions: list[str], weights: list[float] | None, timeout: float,
                 more: Sequence[str] = ()):
        self.functions = [absolute(name) for name in functions]
        self.names = [name.rpartition(":")[2] for name in functions]
        if len(set(self.names)) < len(self.names):
            self.names = list(functions)
        self.names += more
        self.weights = weights or [1.0] * len(self.names)
        self.timeout = timeout
        self.process = None
        self.unread = b""
        self.problems: list[str] = []
        self.last_problem = ""
        if functions:
            self.start()

    def total(self, parts: list[float]) -> float:
        """The weighted sum of the rewards; NaN if one is."""
        return math.fsum(weight * part for weight, part in zip(self.weights, parts))

    def score(self, row: dict, answer: str) -> list[float]:
        """The reward of each function for an answer, NaN where it has failed."""
        parts = []
        for number, name in enumerate(self.names[:len(self.functions)]):
            value, problem = self.call(number, row["prompt"], answer, row["row"])
            if problem:
                self.problems.append(f"reward {name}, {row['where']}: {problem}; the answer was "
                                     f"{shortened(answer)!r}. It is not scored")
            parts.append(value)
        return parts

    def report(self, unscored: int):
        """Print the problems since the last report, on standard error."""
        for problem in self.problems[:MAX_SAID]:
            print(problem, file=sys.stderr, flush=True)
        if len(self.problems) > MAX_SAID:
            print(f"… {len(self.problems) - MAX_SAID} more; {unscored} answers are not scored",
                  file=sys.stderr, flush=True)
        if self.problems:
            self.last_problem = self.problems[0]
        self.problems = []

    # ---- the process

    def start(self):
        """Start the process; wait until it has imported the functions."""
        command = [sys.executable, str(Path(__file__).resolve()), *self.functions]
        self.unread = b""
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        ready = self.read_line(START_SECONDS)
        if ready is None or "error" in ready:
            self.stop()
            reason = ready["error"] if ready else f"not imported within {START_SECONDS} s"
            raise ValueError(f"reward: {reason}")

    def stop(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()

    def call(self, number: int, prompt: str, answer: str, row) -> tuple[float, str]:
        """(the reward, "") or (NaN, what went wrong)."""
        request = json.dumps({"function": number, "prompt": prompt, "answer": answer, "row": row})
        try:
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
            reply = self.read_line(self.timeout)
        except BrokenPipeError:
            reply = {"ended": True}
        if reply is None:
            self.stop()
            self.start()
            return math.nan, f"it took more than {self.timeout:g} s (reward_timeout)"
        if "ended" in reply:
            self.stop()
            code = self.process.returncode
            self.start()
            return math.nan, f"it ended its process (exit code {code})"
        return reply.get("reward", math.nan), reply.get("error", "")

    def read_line(self, seconds: float) -> dict | None:
        """What the process says next; None if it says nothing in time."""
        end = time.monotonic() + seconds
        file = self.process.stdout.fileno()
        while b"\n" not in self.unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:
                return None
            part = os.read(file, 2**16)
            if not part:
                return {"ended": True, "error": "the process of the reward functions ended"}
            self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)


def absolute(name: str) -> str:
    """FILE:FUNCTION with the whole path. Raises ValueError for another form."""
    file, colon, function = name.rpartition(":")
    if not colon or not function.isidentifier():
        raise ValueError(f"reward: {name!r} is not FILE:FUNCTION, as rewards.py:score")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"reward: {name}: there is no file {file}")
    return f"{os.path.abspath(file)}:{function}"


def missing_function(name: str) -> str:
    """Why FILE:FUNCTION names no function, by reading the file without running it; "" if it may.

    A file that imports everything of another one may have any function.
    """
    file, _, function = name.rpartition(":")
    try:
        tree = ast.parse(Path(file).read_bytes(), file)
    except (SyntaxError, ValueError) as error:
        return f"{file} cannot be read as Python: {error}"
    defined, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.alias):
            imported.add((node.asname or node.name).partition(".")[0])
    if function in defined | imported or "*" in imported:
        return ""
    return without_function(file, function, defined)


def without_function(file: str, function: str, names) -> str:
    """The sentence for a file without a function. names: those that it has."""
    near = get_close_matches(function, [name for name in names if name[0] != "_"], 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{file} has no function {function}{hint}"


def shortened(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


# ---- in the other process -----------------------------------------------------------------------


def load_function(name: str):
    """The function FILE:FUNCTION. Raises ValueError that names file, function and remedy."""
    file, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise ValueError(f"{file} cannot be imported: {described(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(without_function(file, function, vars(module)))
    return found


def described(error: BaseException) -> str:
    """An error with the line of the user's file that raised it."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    where = f" in line {place.tb_lineno} of {place.tb_frame.f_code.co_filename}" if place else ""
    return f"{type(error).__name__}: {error}{where}"


def reward_for(functions: list, request: dict) -> dict:
    """{"reward": number} or {"error": sentence}."""
    function = functions[request["function"]]
    try:
        value = function(request["prompt"], request["answer"], request["row"])
    except Exception as error:
        return {"error": f"it raised {described(error)}"}
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return {"error": f"it returned {shortened(repr(value))}, not a number"}
    if not math.isfinite(number):
        return {"error": f"it returned {number}, not a finite number"}
    return {"reward": number}


def serve_rewards(names: list[str]):
    """Answer requests until standard input ends. What functions print goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(reply: dict):
        print(json.dumps(reply), file=out, flush=True)

    try:
        functions = [load_function(name) for name in names]
    except ValueError as error:
        return send({"error": str(error)})
    send({"ready": True})
    requests = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)        # a function that reads input finds none
    for line in requests:
        send(reward_for(functions, json.loads(line)))


if __name__ == "__main__":
    sys.path.pop(0)                 # the folder of this file, whose names may hide packages
    serve_rewards(sys.argv[1:])
