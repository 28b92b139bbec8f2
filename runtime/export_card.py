"""README.md of an exported folder, a model card: base, data, licence, method, figures measured.

Requires: runtime/report.py (tables of a card), text/tokenizer.py (reading JSON).
Next: merge.py.
"""
import re
import shlex
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

from checkpoint.files import hub_name
from runtime.report import markdown_table
from runtime.resize_vocab import trained_on
from settings.config import Config
from text.tokenizer import read_json

FORMATS = {
    "gguf": "a GGUF file for llama.cpp",
    "gguf-lora": "a GGUF file of the adapter alone, for llama.cpp",
    "peft": "the adapter alone, in PEFT's format",
    "fp8": "8 bits by compressed-tensors, rounded to the nearest, a scale for each row",
    "w4a16": "4 bits by compressed-tensors, rounded to the nearest, a scale for 128 columns",
    "base": "the format of the base, changed matrices rounded to the nearest",
    "bnb-nf4": "4 bits by bitsandbytes, nf4 with nested scales",
}
SETTINGS = ("stage", "finetuning_type", "lora_rank", "lora_alpha", "learning_rate",
            "num_train_epochs", "max_steps", "cutoff_len", "template", "seed")


def finish_folder(config: Config, base: Path, adapters: list[Path], losses: dict):
    """Write README.md into export_dir, and print the command that uploads the folder.

    losses: {model: (loss per token, share of equal next tokens)}; {} where none were measured.
    """
    folder = Path(config.export_dir)
    name = folder.resolve().name
    card = export_card(config, base, adapters, name, losses)
    (folder / "README.md").write_text(card, encoding="utf-8")
    command = shlex.join(["hf", "upload", name, str(folder)])
    print(f"upload    {command}     (README.md is its model card)")


def export_card(config: Config, base: Path, adapters: list[Path], name: str, losses: dict) -> str:
    """The text of README.md. name: of the model."""
    base_name = (trained_on(adapters[0]) if adapters else None) or config.model_name_or_path
    on_hub = hub_name(base_name)
    trained = read_json(adapters[-1] / "train_config.json") if adapters else {}
    data = in_backticks(trained.get("dataset"))
    kind = "adapter" if config.export_format in ("peft", "gguf-lora") else "model"
    lines = [
        *front_matter(on_hub, license_of(base), config),
        f"# {name}",
        "",
        f"A {kind} made from "
        + (f"`{on_hub}`" if on_hub else f"a model in a local folder, `{Path(base_name).name}`,")
        + (f" by training on {data}" if data else "")
        + f": {method_in_words(config, kind, len(adapters))}.",
        "",
    ]
    if settings := {key: trained[key] for key in SETTINGS if trained.get(key) is not None}:
        lines += [*markdown_table("setting of the training", settings), ""]
    if losses:
        rows = {model: f"{loss:.4f} (same next token {same:.1%})"
                for model, (loss, same) in losses.items()}
        lines += [*markdown_table("loss per token of", rows), ""]
    return "\n".join([*lines, "Made with Pocket Factory.", ""])


def in_backticks(names: list[str] | str | None) -> str:
    """Names of datasets as Markdown, "" for none."""
    names = [names] if isinstance(names, str) else names or []
    return ", ".join(f"`{name}`" for name in names)


def front_matter(base_name: str | None, license_lines: list[str], config: Config) -> list[str]:
    """The lines that the hub reads. base_name: on the hub; None for a local folder."""
    lines = ["---"]
    if base_name:
        lines.append(f"base_model: {base_name}")
    lines += license_lines
    if config.export_format == "peft":
        lines.append("library_name: peft")
    elif config.export_format not in ("gguf", "gguf-lora"):
        lines.append("library_name: transformers")
    return [*lines, "pipeline_tag: text-generation", "tags:", "- pocket-factory", "---", ""]


def license_of(base: Path) -> list[str]:
    """The lines on the licence in the base's own model card, or on its LICENSE file, or none."""
    card = base / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = re.findall(r"^license(?:_name|_link)?: *\S.*$", head[1] if head else "", re.MULTILINE)
    if not lines and (files := sorted(base.glob("LICENSE*"))):
        lines = ["license: other", f"license_link: {files[0].name}"]
    return lines


def method_in_words(config: Config, kind: str, adapters: int) -> str:
    """How the export was made."""
    words = []
    if adapters and kind == "model":
        words.append("adapter merged, W + scale * B A, summed in float32 and rounded once")
    if bits := config.export_quantization_bit:
        order = ", act-order" if config.export_quantization_desc_act else ""
        words.append(
            f"{bits} bits by GPTQ (arXiv:2210.17323{order}), groups of 128 columns, calibrated on "
            f"{config.export_quantization_nsamples} rows of "
            f"`{Path(config.export_quantization_dataset).name}`")
    if config.export_format:
        words.append(FORMATS[config.export_format])
    return "; ".join(words) or "a copy"
