"""The longest row that fits on a card by the memory plan, for QLoRA; nothing is run.

    python bench/planned_length.py                                  Llama-3-8B; 8, 24 and 80 GB
    python bench/planned_length.py --shape qwen2.5-7b --rank 32 --cards 16,48 --bits 16

One row a pass, adapters on all linear layers, a base in nf4, attention that never holds all scores
(sdpa-flash). A card counts as so many 10**9 free bytes, of which a plan fills 90 %.

Requires: random_model.py beside this file (shapes).
Next: docs/speed.md, runtime/memory.py (the plan).
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench.common import table
from bench.random_model import SHAPES, raw_config
from checkpoint.read_config import model_config
from lora import LoRAConfig
from methods.quant import QuantFormat
from runtime.memory import Plan, Workload, all_in, lightest, memory_plan
from settings.config import Config

STEP = 1000             # tokens: lengths are multiples of it
LONGEST = 4000          # of these


def planned(workload: Workload, tokens: int, card: int) -> Plan:
    """The plan of one row with so many tokens on a card with so many bytes."""
    config = Config()
    start = memory_plan(config, replace(workload, rows=[[tokens]]))
    return lightest(start, card, config)


def longest_row(workload: Workload, card: int) -> int:
    """The tokens of the longest row that fits, a multiple of STEP."""
    fits, too_long = 0, LONGEST
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if planned(workload, middle * STEP, card).fits(card):
            fits = middle
        else:
            too_long = middle
    return fits * STEP


HEADER = ["card", "planned tokens", "planned bytes", "page-locked main memory", "tile of the MLPs"]


def row_of_table(workload: Workload, gigabytes: int) -> list[str]:
    """The cells below HEADER for a card."""
    card = gigabytes * 10**9
    tokens = longest_row(workload, card)
    if not tokens:
        return [f"{gigabytes} GB", "none fit", "", "", ""]
    plan = planned(workload, tokens, card)
    return [f"{gigabytes} GB", f"{tokens:,}", f"{plan.total / 1e9:.1f} GB",
            f"{plan.offloaded / 1e9:.1f} GB", f"{plan.workload.mlp_tile:,} tokens"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4, help="of the frozen base")
    parser.add_argument("--cards", default="8,24,80", help="their free memory in GB")
    asked = parser.parse_args(argv)
    sizes = model_config(raw_config(asked.shape))
    formats = all_in(QuantFormat("nf4"), sizes) if asked.bits == 4 else None
    workload = Workload(sizes, LoRAConfig(r=asked.rank), [[STEP]], torch.bfloat16, "sdpa-flash",
                        "cuda", fast=True, quant_formats=formats)
    workload = memory_plan(Config(), workload).workload     # one model without storage for all
    workload = replace(workload, recompute=None)
    print(table(HEADER, [row_of_table(workload, int(card)) for card in asked.cards.split(",")]))


if __name__ == "__main__":
    main()
