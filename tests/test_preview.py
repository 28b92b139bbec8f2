"""runtime/preview.py: --jsonl writes rows, and never over a file of somebody else."""
import json

import pytest

from runtime import preview
from tests.common import ROOT, read_jsonl


def show(tmp_path, *more):
    preview.main([f"model_name_or_path={ROOT}/models/tiny", "template=chatml", "max_samples=4",
                  f"output_dir={tmp_path}/out", *more])


def test_jsonl_is_written_and_may_be_written_again(tmp_path):
    for count in (4, 2):
        show(tmp_path, f"dataset={ROOT}/data/tiny_review.jsonl", f"max_samples={count}",
             f"jsonl={tmp_path}/rows.jsonl")
        rows = read_jsonl(tmp_path / "rows.jsonl")
        assert len(rows) == count and rows[0].keys() == {"input_ids", "labels"}


@pytest.mark.parametrize("content", [
    (ROOT / "data/tiny_review.jsonl").read_text(), "[1]\n", "notes\n", "{}" * 9, "[" * 100_000,
    json.dumps([{"instruction": "a", "output": "b"}]), '{"input_ids": [1], "text": "mine"}\n',
])
def test_no_other_file_is_overwritten(content, tmp_path):
    """The dataset itself among them."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="rows.jsonl exists and holds no rows that --jsonl has"):
        show(tmp_path, f"dataset={path}", f"jsonl={path}")
    assert path.read_text() == content
