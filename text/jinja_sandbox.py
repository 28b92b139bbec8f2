"""Runs the chat template that a checkpoint carries, and survives it.

A chat template is a jinja program that a stranger wrote and that came with the weights. It runs here in a process of
its own, inside jinja's sandbox, and gets 2 seconds of processor time and 1 GiB of memory: what it cannot do, or does
for too long, becomes a sentence.

    python text/jinja_sandbox.py < request.json        what that process does; render_chats writes the request, see below

Read next: templates.py, which compares our formats with what comes out of here.
Sources: the variables, filters and settings that published chat templates count on are those of transformers'
apply_chat_template (huggingface.co/docs/transformers/chat_templating).
"""
import datetime
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

CPU_SECONDS, MEMORY_BYTES, LONGEST_TEXT = 2, 2**30, 20_000
WALL_SECONDS = 30  # the process starts, and imports jinja2 from a disk that may be slow


def render_chats(source, tokens, chats):
    """Render conversations with a chat template.

    source: jinja text. tokens: {"bos_token": "<s>", ...}, as it may name them.
    chats: dicts of its variables, as {"messages": [{"role", "content"}, ...], "add_generation_prompt": true}.
    -> for each chat (text, ""), or (None, why there is none). Never raises for what the template does.
    """
    request = json.dumps({"source": source, "tokens": tokens, "chats": chats})
    try:
        done = subprocess.run([sys.executable, str(Path(__file__).resolve())], input=request.encode(),
                              capture_output=True, timeout=WALL_SECONDS)
        if done.returncode == 0:
            return [tuple(pair) for pair in json.loads(done.stdout)]
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        why = (last or ["it failed"])[0]
        if done.returncode < 0:
            name = signal.Signals(-done.returncode).name
            why = f"it ended by {name}"
            if name in ("SIGXCPU", "SIGKILL"):
                why = f"it was stopped after {CPU_SECONDS} seconds"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = f"it could not be run ({error})"
    return [(None, why)] * len(chats)


# ------------------------------------------------------------------------------------------- in the other process


def serve(request):
    """The request of render_chats -> its answer."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        sys.exit("jinja2 is not installed, so chat templates cannot be read: pip install jinja2")
    set_limits()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    try:
        template = environment.from_string(without_generation_marks(request["source"]))
    except Exception as error:
        return [(None, f"it is no jinja template ({explain(error)})")] * len(request["chats"])
    return [render(template, {**request["tokens"], **chat}) for chat in request["chats"]]


def set_limits():
    """From here on the process ends itself when it takes too long, and gets no more memory than it should need."""
    try:
        import resource
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # being stopped for its time leaves no file
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # not on this system; the parent's clock remains


def render(template, variables):
    """-> (text, "") or (None, why not)."""
    try:
        text, length = [], 0
        for piece in template.generate(**variables):
            text.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                return None, f"it writes more than {LONGEST_TEXT} characters"
        return "".join(text), ""
    except MemoryError:
        return None, f"it takes more than {MEMORY_BYTES // 2**30} GiB of memory"
    except Exception as error:  # anything: the template is a program
        return None, explain(error)


def without_generation_marks(source):
    """{% generation %} … {% endgeneration %}, which mark what is learned, become {% if true %} … {% endif %}."""
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)


def explain(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message):
    raise ValueError(message)


def now(form):
    return datetime.datetime.now().strftime(form)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(serve(json.load(sys.stdin))))
