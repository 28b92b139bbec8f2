"""Puts the repository root on the path, where the scripts are; fixtures of several files."""
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# a shell that starts the tests in the background lets them ignore Ctrl-C, and so would the programs
# that they start, whose reaction to Ctrl-C is tested
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    from tests.common import RUN_SLOW
    if not RUN_SLOW:
        terminalreporter.write_line("RUN_SLOW is not set: tests that take long, and two thirds of "
                                    "some lists of cases, were left out")


@pytest.fixture
def day_of_recording(monkeypatch):
    """The date on which the golden rows were recorded; the llama3 tool text names it."""
    from text import tool_calls
    monkeypatch.setattr(tool_calls, "today", lambda: "21 Nov 2026")


@pytest.fixture
def words():
    """(tokenizer, template): one token for each of w0, w1, …, and a template of bare texts."""
    from tokenizers import Tokenizer as Core, models, pre_tokenizers

    from templates import Template
    from text.fit_tokenizer import fit_tokenizer
    from text.tokenizer import Tokenizer
    names = ["[unk]", "</s>", *(f"w{n}" for n in range(200))]
    vocabulary = {word: i for i, word in enumerate(names)}
    core = Core(models.WordLevel(vocabulary, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(core, {"eos_token": "</s>", "unk_token": "[unk]"})
    template = Template(user=("{{content}}",))
    fit_tokenizer(template, tokenizer)
    return tokenizer, template


@pytest.fixture(scope="module")
def pairs_world(tmp_path_factory):
    """The folder that the recorded preference runs ran in."""
    from tests.common import SHARED
    if not SHARED.is_dir():
        pytest.skip("the recorded fixtures are not here")
    from tests.preference_runs import write_pairs_world
    here = tmp_path_factory.mktemp("pairs")
    write_pairs_world(here)
    return here
