"""Print what the model will see of the data: counts, and examples as ids, text and loss.

    python -m runtime.preview --config configs/tiny_lora_sft.yaml       the first examples
    python -m runtime.preview my.yaml --jsonl rows.jsonl                write all processed rows

Requires: data.py, text/token_cache.py, runtime/show_data.py.
Next: train.py.
"""
from errors import run_script
from settings.config import Config
from settings.load_config import load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "data"))   # --help and mistakes do not wait for torch

import runtime.device  # noqa: F401  before torch: see guard_amdsmi there

from checkpoint.read_config import read_config_json
from runtime.build import STAGES
from runtime.named_folders import named_folder
from runtime.resize_vocab import add_new_tokens, new_tokens, read_descriptions
from runtime.show_data import check_rows_file, print_counts, print_example, write_jsonl
from text.load_text import fit_text
from text.token_cache import kept_in, load_examples, nothing_to_learn
from text.tokenizer import load_tokenizer


def main(argv):
    """Print the first examples; --jsonl FILE also writes all training rows."""
    config = load_config(argv, "data")
    if config.jsonl:
        check_rows_file(config.jsonl)
    tokenizer, text, train_set, report = training_rows(config, bool(config.jsonl))
    if config.jsonl:
        packed = bool(config.packing) and config.stage == "sft"
        pad_to = config.cutoff_len if packed else 0
        write_jsonl(config.jsonl, train_set, config.stage, pad_to, tokenizer.pad_id)
        print(f"{len(train_set):,} training rows written to {config.jsonl}")
    print(f"template: {text.template.name} ({text.origin})")
    print_counts(report)
    for number, example in enumerate(train_set[:3], 1):
        print_example(tokenizer, example, config.stage, f"example {number}")
    if not report.examples["train"]:
        raise ValueError(nothing_to_learn(config, report, "train", len(train_set)))


def training_rows(config: Config, keep_unlearnable: bool = False) -> tuple:
    """(tokenizer, text, training examples, report) of a config, as train.py would read them."""
    base = named_folder(config, "model_name_or_path")
    tokenizer = load_tokenizer(base, config.split_special_tokens)
    add_new_tokens(tokenizer, new_tokens(config, read_descriptions(config)))
    model_type = read_config_json(base).get("model_type")
    text = fit_text(tokenizer, config.template, config.force_template, model_type)
    train_set, _, report = load_examples(
        config, tokenizer, text.template, STAGES[config.stage].encode,
        keep_unlearnable=keep_unlearnable, folder=kept_in(config, "data"))
    return tokenizer, text, train_set, report


if __name__ == "__main__":
    run_script(main)
