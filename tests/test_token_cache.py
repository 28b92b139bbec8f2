"""text/token_cache.py: examples read from the cache equal those that were written."""
import json
import os
import re
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest

from runtime import show_data
from runtime.build import STAGES
from settings.config import DATA, FIXED, KEYS
from tests.common import ROOT
from tests.rows import ask, ids_and_labels, make_config, write_dataset
from text import token_cache
from text.token_cache import ABOUT, Examples, SplitWriter

ROWS = [ask(f"w{i % 90} w3", " ".join(f"w{(i + k) % 100}" for k in range(1 + i % 7)))
        for i in range(60)]
SETTINGS = {"plain": {}, "packed": {"packing": True, "cutoff_len": 20},
            "held out": {"val_size": 0.2},
            "joined": {"packing": True, "neat_packing": False, "cutoff_len": 20},
            "some": {"max_samples": 13}}


def load(folder, words, kept="store", keep_unlearnable=False, **settings):
    config = make_config(folder, {"preprocessing_batch_size": 8, **settings})
    return token_cache.load_examples(config, *words, STAGES[config.stage].encode, keep_unlearnable,
                                     folder / kept if kept else None)


def contents(examples):
    """Ids, labels, lengths and positions of all examples."""
    return [(*pair, example.lengths,
             None if example.position_ids is None else example.position_ids.tolist())
            for pair, example in zip(ids_and_labels(examples), examples)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_second_run_reads_the_cache_of_the_first(tmp_path, words, settings, capsys, monkeypatch):
    write_dataset(tmp_path, ROWS, {})
    made = load(tmp_path, words, **settings)
    show_data.print_counts(made[2])
    first = capsys.readouterr().out
    monkeypatch.setattr(token_cache, "encode_batch", None)             # tokenizing would fail now
    read = load(tmp_path, words, **settings)
    show_data.print_counts(read[2])
    second = capsys.readouterr().out
    assert "tokenized rows: made in" in first
    assert f"tokenized rows: read from {tmp_path / 'store'}" in second
    assert [line for line in first.splitlines() if "tokenized rows" not in line] == [
        line for line in second.splitlines() if "tokenized rows" not in line]
    for one, other in zip(made[:2], read[:2]):
        assert contents(one) == contents(other)
        assert one.sign == other.sign
        assert one.longest == other.longest
        assert one.largest_id == max([0, *(int(example.input_ids.max()) for example in one)])
        assert one.longest == max([0, *(max(example.lengths) for example in one)])
        assert one.sizes.tolist() == [len(example.input_ids) for example in one]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_many_processes_give_the_same_as_one(tmp_path, words, settings):
    write_dataset(tmp_path, ROWS, {})
    one = load(tmp_path, words, None, preprocessing_num_workers=1, **settings)
    two = load(tmp_path, words, None, preprocessing_num_workers=3, **settings)
    assert list(map(contents, one[:2])) == list(map(contents, two[:2]))
    assert token_cache.report_to_json(one[2]) == token_cache.report_to_json(two[2])


def test_the_checksum_covers_all_ids_and_labels_in_order(tmp_path, words):
    """Checkpoints of earlier releases hold it. A row without a label is not included."""
    write_dataset(tmp_path, [*ROWS, ask("w1 w2 w3 w4 w5 w6 w7 w8 w9", "w1")], {})
    examples, crc = load(tmp_path, words, cutoff_len=4)[0], 0
    for example in examples:
        crc = zlib.crc32(example.labels.tobytes(), zlib.crc32(example.input_ids.tobytes(), crc))
    assert examples.sign == f"60 rows, {crc:08x}"
    everything = load(tmp_path, words, cutoff_len=4, keep_unlearnable=True)[0]
    assert len(everything) == 61 and contents(everything)[:60] == contents(examples)


CHANGES = {"cutoff_len": {"cutoff_len": 5}, "packing": {"packing": True}, "seed": {"seed": 7},
           "val_size": {"val_size": 0.5},
           "train_on_prompt": {"train_on_prompt": True}, "default_system": {"default_system": "w5"}}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_tokenized_again(tmp_path, words, name):
    write_dataset(tmp_path, ROWS, {})
    load(tmp_path, words)
    again = load(tmp_path, words, **CHANGES[name])
    assert re.search(rf"made in .*changed: .*{name}", again[2].origin)
    assert list(map(contents, again[:2])) == list(
        map(contents, load(tmp_path, words, None, **CHANGES[name])[:2])
    )
    assert "read from" in load(tmp_path, words, **CHANGES[name])[2].origin


def test_a_changed_byte_in_the_data_is_noticed(tmp_path, words):
    """Although size and modification time of the file are the same."""
    write_dataset(tmp_path, ROWS, {})
    before, file = load(tmp_path, words)[0], tmp_path / "rows.json"
    times = os.stat(file)
    file.write_text(file.read_text().replace("w3", "w4", 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after, _, report = load(tmp_path, words)
    assert before.sign != after.sign and "train file" in report.origin


def test_a_changed_tokenizer_template_or_program_is_noticed(tmp_path, words, monkeypatch):
    from dataclasses import replace
    write_dataset(tmp_path, ROWS, {})
    tokenizer, template = words
    load(tmp_path, words)
    assert ("template"
            in load(tmp_path, (tokenizer, replace(template, user=("w7", "{{content}}"))))[2].origin)
    tokenizer.add_tokens(["w1 w2"])
    assert "changed: tokenizer, template" in load(tmp_path, words)[2].origin.replace(
        "template, tokenizer", "tokenizer, template"
    )
    monkeypatch.setattr(token_cache, "PROGRAM", token_cache.PROGRAM[1:])
    assert "changed: program" in load(tmp_path, words)[2].origin
    assert "read from" in load(tmp_path, words)[2].origin


def test_overwrite_cache_tokenizes_again(tmp_path, words):
    write_dataset(tmp_path, ROWS, {})
    load(tmp_path, words)
    assert "made in" in load(tmp_path, words, overwrite_cache=True)[2].origin


def test_every_setting_that_changes_rows_is_in_the_key():
    """settings/config.py knows the settings that make a resumed run another one; the others do
    not change tokens."""
    of_the_model = set("""
        model_name_or_path model_revision adapter_name_or_path create_new_adapter ref_model
        ref_model_adapters train_from_scratch base_precision quantization_bit quantization_method
        quantization_type double_quantization finetuning_type lora_rank lora_alpha lora_dropout
        lora_target additional_target use_rslora use_dora pissa_init pissa_iter use_llama_pro
        use_adam_mini freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
        pure_bf16 optim use_muon use_galore galore_rank galore_target use_apollo apollo_target
        apollo_rank apollo_proj apollo_layerwise use_badam badam_mode badam_start_block
        badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode fp8
        oft_rank oft_block_size oft_target module_dropout resize_vocab add_tokens
        add_special_tokens new_special_tokens_config init_special_tokens
        rope_scaling teacher_model teacher_adapters teacher_quantization_bit
    """.split())
    of_the_order = {"token_budget", "disable_shuffling", "data_seed", "dataloader_drop_last",
                    "even_batches", "num_iterations", "ppo_epochs", "ppo_buffer_size"}
    # see cache_key; distill_lambda by packing_of
    otherwise = {"template", "packing", "neat_packing", "dataset", "eval_dataset", "dataset_dir",
                 "distill_lambda"}
    other_run = {key for key, spec in KEYS.items() if spec.metadata["on_resume"] in (FIXED, DATA)}
    assert other_run == set(token_cache.DATA_KEYS) | of_the_model | of_the_order | otherwise


def test_an_incomplete_cache_is_not_used(tmp_path, words):
    write_dataset(tmp_path, ROWS, {})
    whole = contents(load(tmp_path, words)[0])
    (tmp_path / "store" / ABOUT).write_text('{"key": {"cut')
    train, _, report = load(tmp_path, words)
    assert contents(train) == whole and "cannot be read" in report.origin
    with pytest.raises(ValueError, match="is not empty and holds no tokenized rows"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").touch()
        load(tmp_path, words, "other")
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_refused_rows_leave_no_files(tmp_path, words):
    write_dataset(tmp_path, [*ROWS, ask("w1", "")], {})
    with pytest.raises(ValueError, match="1 bad row"):
        load(tmp_path, words, "new/store", preprocessing_num_workers=2)
    assert not (tmp_path / "new").exists()


def test_all_bad_rows_are_counted(tmp_path, words):
    """Although no row is tokenized after the first of them."""
    rows = [ask("w1", "" if i % 10 == 3 else "w2") for i in range(200)]
    write_dataset(tmp_path, rows, {})
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"(?s)^20 bad rows\n.*row 4: .*… and 15 more"):
            load(tmp_path, words, preprocessing_num_workers=processes)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data import EncodedRows
from text.token_cache import SplitWriter, new_cache, write_about
part = EncodedRows()
part.add([1, 2], [-100, 2], True)
with new_cache(Path({folder!r})) as work:
    writer = SplitWriter(work, "train")
    writer.add(part)
    writer.close()
    if {moment} == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write_about(work, {{"key": {{"a": "1"}}}})
    if {moment} == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment, whole", [(0, True), (1, False), (2, False)])
def test_a_kill_in_the_middle_leaves_no_cache(tmp_path, moment, whole):
    folder = tmp_path / "run" / "tokenised"
    code = KILLED.format(root=str(ROOT), folder=str(folder), moment=moment)
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == (-signal.SIGKILL if moment else 0)
    assert (token_cache.read_about(folder, {"a": "1"})[0] is not None) is whole
    with token_cache.new_cache(folder) as work:
        assert [path.name for path in work.iterdir()] == [token_cache.WORK_MARK]
    assert [path.name for path in folder.parent.iterdir()] == ["tokenised"]


def test_a_cache_without_examples(tmp_path):
    about = SplitWriter(tmp_path, "eval").close()
    examples = Examples(tmp_path, "eval", about, apart=True)
    assert len(examples) == 0 and not examples and list(examples) == [] and examples.longest == 0


def test_examples_beyond_two_gigabytes(tmp_path):
    """Offsets in 64 bits: sizes that add up to more than 2^31 tokens, in a sparse file."""
    sizes = np.full(3, 2**30, np.int32)
    with open(tmp_path / "train.tokens", "wb") as file:
        file.truncate(4 * (4 * 2**30 + 2 * 3))
        file.seek(4 * 4 * 2**30)
        file.write(np.array([1, 2, 3, -100, 2, 3], np.int32).tobytes())
    sizes[2] = 3
    np.savez(tmp_path / "train.npz", sizes=sizes, learnable=np.ones(3, np.int8))
    last = Examples(tmp_path, "train", {"largest_id": 3, "crc": 0}, apart=False)[-1]
    assert (last.input_ids.tolist(), last.labels.tolist()) == ([1, 2, 3], [-100, 2, 3])


def test_each_evaluation_dataset_is_a_split(tmp_path, words):
    for name, rows in (("a", ROWS[:5]), ("b", ROWS[5:8]), ("c", ROWS[8:12])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    write_dataset(tmp_path, ROWS, {})
    settings = {"dataset": ["a.json"], "eval_dataset": ["b.json", "c.json", "b.json"]}
    made, read = (load(tmp_path, words, eval_on_each_dataset=True, **settings) for _ in range(2))
    assert "read from" in read[2].origin
    for train, evals, report in (made, read):
        assert len(train) == 5
        assert {name: len(rows) for name, rows in evals.items()} == {"b.json": 3, "c.json": 4}
        assert report.examples == {"train": 5, "eval": 7}
    together = load(tmp_path, words, kept="other", **settings)[1]
    assert [row for rows in read[1].values() for row in contents(rows)] == contents(together)


def test_a_partial_folder_of_someone_else_stays(tmp_path):
    """Only one with the mark is removed: a killed run has left that."""
    path = tmp_path / "rows"
    theirs = tmp_path / "rows.host.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    left = tmp_path / "rows.left.partial"               # and then the power failed
    left.mkdir()
    (left / token_cache.WORK_MARK).write_text("rows")
    with token_cache.new_cache(path) as work:
        token_cache.write_about(work, {})
    assert (theirs / "thesis.txt").read_text() == "mine"
    assert [p.name for p in path.iterdir()] == [token_cache.ABOUT]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows", "rows.host.partial"]


def test_two_hosts_of_one_name_do_not_meet(tmp_path):
    """Each has a folder of its own, and neither takes the other's for that of a killed run."""
    path = tmp_path / "rows"
    with token_cache.new_cache(path) as ours:
        (ours / "tokens.bin").write_bytes(b"ours")
        code = ("import sys; from pathlib import Path; from text import token_cache\n"
                "with token_cache.new_cache(Path(sys.argv[1])) as work:\n"
                "    token_cache.write_about(work, {'key': 'theirs'})")
        subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=True)
        assert (ours / "tokens.bin").read_bytes() == b"ours"
        assert "theirs" in (path / token_cache.ABOUT).read_text()
        token_cache.write_about(ours, {"key": "ours"})
    assert "ours" in (path / token_cache.ABOUT).read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]
