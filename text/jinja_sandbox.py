"""Run the chat template of a checkpoint in a process of its own, with limits.

A chat template is a jinja program written by a stranger. It runs inside jinja's sandbox, with 2
seconds of processor time and 1 GiB of memory. If it fails or takes too long, the caller gets the
reason as a text.

    python text/jinja_sandbox.py < request.json     the process; render_chats writes its request

Requires: nothing, so that the process starts fast.
Next: text/template_check.py.
Sources: variables, filters and settings are those of transformers' apply_chat_template
(huggingface.co/docs/transformers/chat_templating), on which published chat templates rely.
"""
import datetime
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

CPU_SECONDS = 2
WALL_SECONDS = 30       # the process imports jinja2 from a disk that may be slow
MEMORY_BYTES = 2**30
MAX_CHARACTERS = 20_000


def render_chats(source: str, tokens: dict[str, str],
                 chats: list[dict]) -> list[tuple[str | None, str]]:
    """Render conversations with a chat template.

    source: jinja text. tokens: {"bos_token": "<s>", ...}, variables of the template. chats: more
    variables, as {"messages": [{"role", "content"}, ...], "add_generation_prompt": True}. Returns
    for each chat (text, "") or (None, reason). Never raises for what the template does.
    """
    request = json.dumps({"source": source, "tokens": tokens, "chats": chats})
    command = [sys.executable, str(Path(__file__).resolve())]
    try:
        done = subprocess.run(command, input=request.encode(), capture_output=True,
                              timeout=WALL_SECONDS)
        if done.returncode == 0:
            return [tuple(pair) for pair in json.loads(done.stdout)]
        reason = failure_reason(done)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = f"it could not be run ({error})"
    return [(None, reason)] * len(chats)


def failure_reason(done: subprocess.CompletedProcess) -> str:
    """Why the process failed, in words."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        if name in ("SIGXCPU", "SIGKILL"):
            return f"it was stopped after {CPU_SECONDS} seconds"
        return f"it ended by {name}"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it failed"


# ---- in the other process -----------------------------------------------------------------------


def answer_request(request: dict) -> list[tuple[str | None, str]]:
    """What render_chats returns, for its request."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        sys.exit("jinja2 is not installed, so chat templates cannot be read: pip install jinja2")
    set_limits()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        template = environment.from_string(replace_generation_tags(request["source"]))
    except Exception as error:
        reason = f"it is not a jinja template ({one_line_of(error)})"
        return [(None, reason)] * len(request["chats"])
    return [render_template(template, {**request["tokens"], **chat}) for chat in request["chats"]]


def set_limits():
    """Limit processor time and memory of this process, where the system can."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))    # no core file when it is stopped
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass    # the timeout of the parent remains


def render_template(template, variables: dict) -> tuple[str | None, str]:
    """Render one conversation: (text, "") or (None, reason)."""
    text = []
    length = 0
    try:
        for piece in template.generate(**variables):
            text.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                return None, f"it writes more than {MAX_CHARACTERS} characters"
        return "".join(text), ""
    except MemoryError:
        return None, f"it takes more than {MEMORY_BYTES // 2**30} GiB of memory"
    except Exception as error:      # anything: the template is a program
        return None, one_line_of(error)


def replace_generation_tags(source: str) -> str:
    """Replace {% generation %}, which marks what carries loss, by {% if true %}: jinja lacks it."""
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)


def one_line_of(error: Exception) -> str:
    """The message of an error in one line, or its type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- what chat templates may call, under the names they use -------------------------------------


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message: str):
    raise ValueError(message)


def strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer_request(json.load(sys.stdin))))
