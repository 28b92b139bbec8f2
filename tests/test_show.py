"""checkpoint/show.py: the drawing of a decoder against the files and by hand."""
import json
import math
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from checkpoint.read_config import model_config
from checkpoint.show import draw
from tests.common import GOLDEN, ROOT, needs_shared
from tests.tiny_models import RECORDED_MODELS, STACKED, TINY


# ---- python -m checkpoint.show DIR ---------------------------------------------------------------


# a line of the drawing: name, shape, bias, parameters, experts
ROW = re.compile(
    r"  (\S+) +(\d+(?: x \d+)*|no weights)( \+ bias)?(?: +([\d,]+)(?: x (\d+) experts)?"
    r"| the embedding's)?"
)


@needs_shared
@pytest.mark.parametrize("name", RECORDED_MODELS)
def test_drawing_has_the_names_and_shapes_of_the_file(name):
    folder = GOLDEN / "models" / name
    config = model_config(json.loads((folder / "config.json").read_text()))
    stored = {}
    for file in folder.glob("model*.safetensors"):
        stored |= {name: list(tensor.shape) for name, tensor in load_file(file).items()}
    stored = {name: shape for name, shape in stored.items() if not re.search("inv_freq", name)
              and not name.startswith(config.skips or "-")}
    text, total, blocks = draw(config), 0, 1
    for line in text.split("parameters: ")[0].splitlines():
        if found := re.match(r"  (\d+) blocks? \((.*)\) such as", line):
            blocks = int(found[1])
        if found := ROW.fullmatch(line):
            tensor, shape, bias, count, experts = found.groups()
            if "layers" not in tensor:
                blocks = 1
            if shape != "no weights":
                shape = [int(n) for n in shape.split(" x ")]
                if line.endswith("the embedding's"):
                    assert config.tie_word_embeddings
                    continue
                held = [n for n in (tensor, tensor + ".weight", tensor + ".bias") if n in stored]
                assert stored[held[0]] == shape and len(held) == (2 if bias else 1), (line, held)
                assert int(count.replace(",", "")) == sum(math.prod(stored[n]) for n in held), line
                total += blocks * int(count.replace(",", "")) * int(experts or 1)
    assert total == sum(math.prod(shape) for shape in stored.values()) > 10000
    assert f"  {total:,} parameters" in text


def test_drawing_of_llama_and_of_differences_from_it():
    text = draw(model_config({**TINY, "model_type": "llama"}))
    assert "llama: 2 blocks, hidden_size 32" in text and "nothing: this is plain Llama" in text
    assert "4 heads on 2 key/value heads, head_dim 8" in text
    assert "rope default, theta 10000" in text
    text = draw(model_config({**STACKED, "num_hidden_layers": 4, "interleave_moe_layer_step": 2,
                              "num_experts_per_tok": 2, "attention_chunk_size": 8,
                              "no_rope_layers": [1, 1, 1, 0]}))
    assert "2 blocks (0, 2) such as" in text and "2 blocks (1, 3) such as" in text
    assert "chunks of 8 tokens in blocks 0-2" in text and "blocks 3 without rotation" in text
    assert "router sigmoid" in text and "scale_input" in text and "qk_norm unit" in text
    per_expert = 3 * 32 * 48
    total = int(re.search(r"  ([\d,]+) parameters,", text)[1].replace(",", ""))
    # 2 layers, 4 of 6 experts idle
    assert f"{total - 2 * 4 * per_expert:,} of them used by a token" in text


def test_the_command_prints_the_drawing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    run = subprocess.run([sys.executable, "-m", "checkpoint.show", str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True)
    assert (run.returncode == 0
            and run.stdout.strip() == draw(model_config(TINY)).strip()), run.stderr
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "qwen9"}))
    run = subprocess.run([sys.executable, "-m", "checkpoint.show", str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and "qwen9" in run.stderr
