"""Shows what the model will see of the data.

    python -m runtime.preview --config configs/tiny_lora_sft.yaml                     the first examples
    python -m runtime.preview --config configs/tiny_lora_sft.yaml --jsonl rows.jsonl  every processed row, one a line

Requires: text/token_cache.py.
Next: train.py.
"""
from errors import run_script
from runtime.load_config import load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "data"))   # --help and mistakes do not wait for torch

import runtime.device  # noqa: F401  before torch: see guard_amdsmi there

from checkpoint.files import find_checkpoint
from data import print_counts, print_row, write_jsonl
from families import read_config_json
from runtime.build import ENCODERS
from templates import fit_tokenizer
from text.template_check import choose_template
from text.token_cache import kept_in, load_examples, nothing_to_learn
from text.tokenizer import load_tokenizer


def main(argv):
    """Show the first examples, and with --jsonl FILE write all training rows, also those that training skips."""
    config = load_config(argv, "data")
    base = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
    tokenizer = load_tokenizer(base, config.split_special_tokens)
    model_type = read_config_json(base).get("model_type")
    template, why = choose_template(config.template, tokenizer, model_type, config.force_template)
    fit_tokenizer(template, tokenizer)
    train, _, report = load_examples(config, tokenizer, template, ENCODERS[config.stage], bool(config.jsonl),
                                     kept_in(config, "data"))
    if config.jsonl:
        packed = bool(config.packing) and config.stage == "sft"
        write_jsonl(config.jsonl, train, config.stage, config.cutoff_len if packed else 0, tokenizer.pad_id)
        print(f"{len(train):,} training rows written to {config.jsonl}")
    print(f"template: {template.name} ({why})")
    print_counts(report)
    for number, example in enumerate(train[:3], 1):
        print_row(tokenizer, example, config.stage, f"example {number}")
    if not report.examples["train"]:
        raise ValueError(nothing_to_learn(config, report, "train", len(train)))


if __name__ == "__main__":
    run_script(main)
