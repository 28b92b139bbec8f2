"""text/jinja_sandbox.py: chat templates of checkpoints are programs by strangers."""
import re
import time

import pytest

from tests.chats import CHATML, checked
from text import jinja_sandbox as sandbox


@pytest.mark.parametrize(
    "jinja, message",
    [
        ("{% for", "it is not a jinja template"),
        ("{{ other + 'x' }}", "'other' is undefined"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ 'a' * 10 ** 11 }}", "memory"),
        ("{{ 'a' * 10 ** 6 }}", "more than 20000 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('x') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('no') }}", "^no$"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "stopped after 2 seconds",
        ),
    ],
)
def test_chat_templates_that_cannot_be_rendered(tmp_path, jinja, message):
    pytest.importorskip("jinja2")
    began = time.monotonic()
    [(text, why), second] = sandbox.render_chats(jinja, {}, [{"messages": []}] * 2)
    assert text is None and re.search(message, why) and "\n" not in why and second == (text, why)
    assert time.monotonic() - began < 15
    if "stopped" not in message:  # once is slow enough
        assert all("chat template refuses this: " in line for line in checked(tmp_path, jinja))


def test_without_jinja2_there_is_a_message(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [(text, why)] = sandbox.render_chats(CHATML, {}, [{"messages": []}])
    assert (
        text is None
        and why == "jinja2 is not installed, so chat templates cannot be read: pip install jinja2"
    )
