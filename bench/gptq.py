"""Loss that 4, 3 and 2 bits add to trained models: rounded to the nearest, and by GPTQ.

    python data/make_tiny_world.py                  first: the conversations, 10 MB, not in git
    python bench/gptq.py                            three families, trained for minutes each

The models have the sizes and the recipe of models/tiny (configs/tiny_pretrain.yaml) and are trained
from scratch for a few hundred steps. GPTQ is calibrated on conversations of the training; the
losses are of conversations held out.

Requires: common.py beside this file.
Next: docs/export.md, which has the figures; methods/gptq.py.
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import merge
import torch
from bench.common import table
from checkpoint.files import write_tensors
from checkpoint.load import load_model
from checkpoint.read_config import read_model_config
from evals.compare import mean_loss
from exporting.gptq_export import GROUP_SIZE, quantized_layers
from methods.gptq import round_to_nearest
from model import CausalLM
from runtime.build import STAGES
from settings.load_config import load_config
from text.load_text import load_text
from text.token_cache import load_examples

TINY = ROOT / "models/tiny"
WORLD = ROOT / "data/tiny_world.jsonl"
FAMILIES = {        # changes of models/tiny's config.json
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen3": {},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
               "query_pre_attn_scalar": 32, "sliding_window": 512},
}
RECIPE = ("configs/tiny_pretrain.yaml", "val_size=500", "use_cpu=true", "disable_tqdm=true")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "bench/.work/gptq")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training, 1,500 tokens each")
    asked = parser.parse_args()
    if not WORLD.is_file():
        parser.error("no data/tiny_world.jsonl: run python data/make_tiny_world.py first")
    asked.folder.mkdir(parents=True, exist_ok=True)
    texts = asked.folder / "texts.jsonl"
    write_texts(texts)

    rows = []
    for family in asked.families:
        model = trained(family, asked.folder, asked.steps)
        rows += [[family, bits, *losses] for bits, losses in losses_of(model, asked.bits, texts)]
    print(table(["family", "bits", "base", "nearest", "GPTQ", "act-order"],
                [[str(cell) if column < 2 else f"{cell:.4f}" for column, cell in enumerate(row)]
                 for row in rows]))


def trained(family: str, folder: Path, steps: int) -> Path:
    """The folder of a trained model of this family."""
    start, out = folder / f"{family}-start", folder / family
    shutil.copytree(TINY, start, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    fields = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    fields |= {"model_type": family, **FAMILIES[family]}
    (start / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    command = [sys.executable, "train.py", *RECIPE, f"model_name_or_path={start}",
               f"output_dir={out}", f"max_steps={steps}", "plot_loss=false"]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


def write_texts(path: Path, count: int = 3000):
    """Conversations of the training as rows of plain text, four in a row."""
    with open(WORLD, encoding="utf-8") as file:
        talks = [json.loads(next(file))["messages"] for _ in range(count)]
    said = ["".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in talk)
            for talk in talks]
    together = ("".join(said[i:i + 4]) for i in range(0, count, 4))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in together),
                    encoding="utf-8")


def losses_of(model: Path, all_bits: list[int], texts: Path):
    """(bits, losses per token on rows held out of base, nearest, GPTQ and act-order), of each."""
    config = load_config([*RECIPE, f"model_name_or_path={model}-start", f"output_dir={model}"],
                         "train")
    text = load_text(config, model, [], read_model_config(model))
    _, held_out, _ = load_examples(config, text.tokenizer, text.template, STAGES["sft"].encode,
                                   folder=None, writes=False)

    def loss_of(folder: Path) -> float:
        return mean_loss(load_model(folder, torch.float32), held_out, "cpu")

    base = loss_of(model)
    out = model.parent / "quantized"
    for bits in all_bits:
        losses = [base]
        write_nearest(model, bits, out)
        losses.append(loss_of(out))
        for act_order in ("false", "true"):
            shutil.rmtree(out)
            merge.main([f"model_name_or_path={model}", f"export_dir={out}",
                        f"export_quantization_bit={bits}", f"export_quantization_dataset={texts}",
                        "export_quantization_maxlen=128", "export_quantization_nsamples=128",
                        f"export_quantization_desc_act={act_order}"])
            losses.append(loss_of(out))
        shutil.rmtree(out)
        yield bits, losses


def write_nearest(model: Path, bits: int, out: Path):
    """The checkpoint with the matrices that GPTQ quantizes rounded to the nearest."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*"))
    loaded = with_rounded_matrices(load_model(model), bits)
    stored = loaded.config.stored_name
    weights = {stored(name): p.data for name, p in loaded.named_parameters()}
    write_tensors(out, {name: (tuple(p.shape), p.dtype) for name, p in weights.items()},
                  lambda name: [weights[name]])


def with_rounded_matrices(model: CausalLM, bits: int) -> CausalLM:
    """The model, whose matrices that GPTQ quantizes are rounded to the nearest in place."""
    for number, name in quantized_layers(model)[0].values():
        layer = model.model.layers[number].get_submodule(name)
        layer.weight.data = round_to_nearest(layer.weight, bits, GROUP_SIZE).dequantize()
    return model


if __name__ == "__main__":
    main()
