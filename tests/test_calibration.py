"""text/calibration.py: windows of drawn rows, and mistakes in the file."""
import json

import pytest
import torch

from settings.config import Config
from tests.common import ROOT
from text.calibration import calibration_rows
from text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(ROOT / "models/tiny")


def settings(path, samples=6, length=12, **changes):
    return Config(export_quantization_dataset=str(path), export_quantization_nsamples=samples,
                  export_quantization_maxlen=length, **changes)


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_windows_of_rows_that_are_longer_by_the_seed(tmp_path):
    long = ["The sky is blue. " * 9, "Two and two is four, and three is more. " * 5]
    path = write_texts(tmp_path / "texts.jsonl", ["short", *long, ""])
    rows = calibration_rows(settings(path), TOKENIZER)
    assert rows.shape == (6, 12) and rows.dtype == torch.int64
    encoded = [TOKENIZER.encode(text) for text in long]
    for row in rows.tolist():
        assert any(ids[i:i + 12] == row for ids in encoded for i in range(len(ids)))
    assert len({tuple(row) for row in rows.tolist()}) > 2
    assert torch.equal(rows, calibration_rows(settings(path), TOKENIZER))
    assert not torch.equal(rows, calibration_rows(settings(path, seed=1), TOKENIZER))


@pytest.mark.parametrize("rows, sentence", [
    ('{"text": "short"}\n', "too few rows of more than export_quantization_maxlen: 12 tokens"),
    ('{"content": "x"}\n', "no text under `text`; its keys are content"),
    ('{"text": 3}\n', "no text under `text`; `text` is 3"),
    ('{"text": 3\n', "no text under `text`; it is not a JSON object .* at character 11"),
    ('[[5]]', "no text under `text`; it is no object but"),
    ("", "has no rows"),
])
def test_rows_that_cannot_be_used(rows, sentence, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(rows)
    with pytest.raises(ValueError, match=sentence):
        calibration_rows(settings(path), TOKENIZER)


def test_a_file_that_is_missing(tmp_path):
    write_texts(tmp_path / "c4_demo.jsonl", ["x"])
    with pytest.raises(FileNotFoundError, match="did you mean"):
        calibration_rows(settings(tmp_path / "c4_dem.jsonl"), TOKENIZER)
