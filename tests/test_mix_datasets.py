"""text/mix_datasets.py: the rows and the order of LLaMA-Factory's merged datasets."""
import json
import zlib

import pytest

from tests.common import ROOT
from tests.rows import ALPACA, load_rows, write_info
from text.mix_datasets import mixed_order

RECORDED = json.loads((ROOT / "tests/recorded/mixed_orders.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: "-".join(
    str(case[key]) for key in ("lengths", "strategy", "probabilities", "seed")))
def test_recorded_orders(case):
    found = mixed_order(case["lengths"], case["strategy"], case["probabilities"], case["seed"])
    found = found.tolist()
    assert found[:20] == case["first"]
    assert len(found) == case["count"]
    assert zlib.crc32(",".join(map(str, found)).encode()) == case["crc32"]


def test_rows_of_three_datasets(tmp_path):
    """max_samples counts for each dataset before they are mixed."""
    for name, count in (("a", 5), ("b", 2), ("c", 9)):
        rows = [{**ALPACA, "output": f"{name}{number}"} for number in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    write_info(tmp_path, **{name: {"file_name": f"{name}.json"} for name in "abc"})

    def outputs(**settings):
        return [row.data["output"] for row in load_rows(tmp_path, "a,b,c", **settings)]

    assert outputs(mix_strategy="interleave_under") == ["a0", "b0", "c0", "a1", "b1", "c1"]
    assert outputs(mix_strategy="interleave_over", max_samples=3) == [
        "a0", "b0", "c0", "a1", "b1", "c1", "a2", "b0", "c2"]
    drawn = outputs(mix_strategy="interleave_under", interleave_probs=[0, 1, 0])
    assert drawn == ["b0", "b1"]
