"""runtime/resize_vocab.py: new tokens, the rows they get, and who finds them again."""
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import chat
import eval as eval_script
import merge
import train
from checkpoint.load import load_model
from checkpoint.read_config import read_model_config
from checkpoint.work_folder import files_under
from parallel import Ranks
from runtime.preview import main as preview
from runtime.resize_vocab import (MARK, RESIZED_BASE, TABLES, grow_table, resized_base,
                                  resized_beside)
from tests.common import CURVES, ROOT, load_argv, needs_shared, refusal, run_recorded
from tests.ranks import forked, outcomes
from tests.tiny_models import checkpoint_of, tensors_in
from text.tokenizer import load_tokenizer

TOKENS = ["adapter_name_or_path=null", "add_tokens=assistant, developed",
          "add_special_tokens=created"]
SHORT = ["max_steps=2"]


def resize(folder, output, *settings, template="llama3"):
    """The folder that a run with these settings trains."""
    config = load_argv(f"model_name_or_path={folder}", f"output_dir={output}",
                       f"template={template}", *settings)
    return resized_base(config, folder, [], Ranks())


def with_tokenizer(folder):
    """The checkpoint, with the tokenizer of the recorded runs."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CURVES / "tiny_llama3" / name, folder / name)
    return folder


# ---- the rows -----------------------------------------------------------------------------------


def test_new_rows_are_the_mean_and_noise():
    """By LLaMA-Factory's noise_init: standard deviation 1 / sqrt(hidden), drawn by the seed."""
    table = 3 + torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    one, again, other = (grow_table(table, 1000, table, {}, True, draw) for draw in draws)
    assert torch.equal(one[:50], table) and torch.equal(one, again)
    assert not torch.equal(one[50:], other[50:])
    noise = one[50:] - table.mean(dim=0)
    assert abs(noise.std() - 1 / 16) < 1e-3 and abs(noise.mean()) < 1e-3


def test_described_rows_are_the_mean_of_their_words():
    """Also those of the head; rows that only fill up are the mean of all."""
    generator = torch.Generator().manual_seed(0)
    embedding, head = torch.randn(2, 10, 4, generator=generator)
    found = grow_table(head, 16, embedding, {11: [2, 3], 12: []}, False, generator)
    assert torch.allclose(found[11], embedding[[2, 3]].mean(dim=0))
    assert torch.allclose(found[[10, 12, 15]], head.mean(dim=0).expand(3, 4))
    half = grow_table(head.bfloat16(), 16, embedding, {11: [2]}, True, generator)
    assert half.dtype == torch.bfloat16 and 0 < (half[11] - embedding[2]).abs().max() < 2


# ---- the checkpoint -----------------------------------------------------------------------------


@needs_shared
def test_the_resized_base_computes_as_its_base(tmp_path):
    """Logits of old tokens are unchanged; tokenizer, sizes and tables fit each other."""
    base = CURVES / "tiny_llama3"
    folder = resize(base, tmp_path, *TOKENS[1:])
    tokenizer, sizes = load_tokenizer(folder), read_model_config(folder)
    assert [tokenizer.id_of(t) for t in ("assistant", "developed", "created")] == [1006, 1007, 1008]
    assert sizes.vocab_size == 1024 and tokenizer.vocab_size == 1009
    assert tokenizer.encode("an assistant created") == [
        *load_tokenizer(base).encode("an "), 1006, *load_tokenizer(base).encode(" "), 1008]
    assert tokenizer.decode([1006, 1008], skip_special_tokens=True) == "assistant"

    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (model.logits(model(ids)) for model in map(load_model, (base, folder)))
    assert torch.equal(before, after[..., :1006])
    assert (folder / "model-base.safetensors").is_symlink()
    assert (folder / "generation_config.json").is_file()


@needs_shared
@pytest.mark.filterwarnings("ignore::Warning")
def test_other_programs_read_the_resized_base(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")   # 4 reads both tables
    folder = resize(CURVES / "tiny_llama3", tmp_path, *TOKENS[1:])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "an assistant created, developed"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == load_tokenizer(folder).encode(text)
    ours = load_model(folder)
    with torch.no_grad():
        assert (theirs(ids).logits - ours.logits(ours(ids))).abs().max() < 1e-5


@needs_shared
@pytest.mark.parametrize("name", ["internlm2", "qwen", "glm4_original", "qwen2", "gemma2"])
def test_every_familys_tables(name, tmp_path):
    """Vendors' names of tensors and of the vocabulary's size; tied heads."""
    base = checkpoint_of(name, tmp_path / "copy")
    if not (tmp_path / "copy").exists():
        shutil.copytree(base, tmp_path / "copy", copy_function=shutil.copyfile)
    base = with_tokenizer(tmp_path / "copy")
    old = read_model_config(base).vocab_size
    if old > 1006:
        pytest.skip("has room for the tokens")
    folder = resize(base, tmp_path / "out", "force_template=true", *TOKENS[1:])
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before, after = (model.logits(model(ids)) for model in map(load_model, (base, folder)))
    assert after.shape[-1] == 1024 and torch.allclose(before, after[..., :old], atol=1e-6)


@needs_shared
@pytest.mark.parametrize("names", ["lm_head", "embed_tokens", "both"])
def test_a_tied_head_under_any_name(names, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(CURVES / "tiny_qwen2", base, copy_function=shutil.copyfile)
    fields = json.loads((base / "config.json").read_text())
    assert fields["tie_word_embeddings"]
    tensors = load_file(base / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    if names != "lm_head":
        tensors["model.embed_tokens.weight"] = table
    if names != "embed_tokens":
        tensors["lm_head.weight"] = table.clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = resize(base, tmp_path / "out", "add_tokens=assistant", template="qwen")
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:len(table)], table)
    assert len(model.lm_head.weight) % 64 == 0 and len(model.lm_head.weight) > len(table)


@needs_shared
def test_tokens_that_have_room_get_no_rows(tmp_path):
    """As in LLaMA-Factory; what a text describes starts from it all the same."""
    first = resize(CURVES / "tiny_llama3", tmp_path / "a", "add_tokens=assistant")
    before = tensors_in(first)
    second = resize(first, tmp_path / "b", "add_tokens=developed")
    assert not (second / TABLES).is_symlink()           # the first run may be deleted
    shutil.rmtree(tmp_path / "a")
    after = tensors_in(second)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_model_config(second).vocab_size == 1024

    words = tmp_path / "words.yaml"
    words.write_text("created: a text\n")
    third = resize(second, tmp_path / "c", f"new_special_tokens_config={words}",
                   "init_special_tokens=desc_init")
    table = tensors_in(third)["model.embed_tokens.weight"]
    known = before["model.embed_tokens.weight"]
    ids = load_tokenizer(second).encode("a text")
    assert torch.allclose(table[1008], known[ids].mean(dim=0)) and torch.equal(table[9], known[9])


@needs_shared
def test_the_templates_stop_words_get_rows(tmp_path, capsys):
    """With resize_vocab: true alone, as in LLaMA-Factory."""
    base = CURVES / "tiny_llama3"
    folder = resize(base, tmp_path, "resize_vocab=true", template="qwen")
    assert read_model_config(folder).vocab_size == 1024
    assert load_tokenizer(folder).id_of("<|im_end|>") == 1006
    assert "1,006 -> 1,007 tokens, 1,006 -> 1,024 rows" in capsys.readouterr().out
    again = resize(base, tmp_path, "resize_vocab=true", template="qwen")
    assert again == folder and capsys.readouterr().out == ""
    same = resize(base, tmp_path / "same", "resize_vocab=true")
    assert read_model_config(same).vocab_size == 1006


@needs_shared
def test_a_system_without_links(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.symlink", refuse)
    folder = resize(CURVES / "tiny_llama3", tmp_path, *TOKENS[1:])
    assert "model.safetensors is copied" in capsys.readouterr().out
    assert not any(path.is_symlink() for path in folder.iterdir())
    load_model(folder)


# ---- mistakes -----------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("text, message", [
    (None, "cannot be read"), ("- a\n- b\n", "must hold lines"), ("a: [1]\n", "is not a token"),
    ("1: one\n", "is not a token"), ("a: b: c\n", "is no yaml"), ("\xff", "must hold lines")])
def test_a_bad_file_of_tokens(text, message, tmp_path):
    path = tmp_path / "tokens.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        resize(CURVES / "tiny_llama3", tmp_path / "out", f"new_special_tokens_config={path}")
    assert str(path) in str(caught.value)


@needs_shared
def test_empty_and_known_tokens(tmp_path, capsys):
    with pytest.raises(ValueError, match="an empty token"):
        resize(CURVES / "tiny_llama3", tmp_path / "a", 'add_tokens=["", "x"]')
    resize(CURVES / "tiny_llama3", tmp_path / "b", "add_special_tokens=<|eot_id|>,qqq")
    assert "note: in the vocabulary already: '<|eot_id|>'" in capsys.readouterr().out


def test_keys_that_do_nothing_are_said():
    notes = load_argv("init_special_tokens=desc_init").notes
    assert any("needs the texts of new_special_tokens_config" in note for note in notes)
    notes = load_argv("add_special_tokens=a", "new_special_tokens_config=b.yaml").notes
    assert any("add_special_tokens is not used" in note for note in notes)
    notes = load_argv("add_tokens=a", "finetuning_type=freeze").notes
    assert any("freeze_extra_modules" in note for note in notes)
    assert "noise_init, desc_init" in refusal("init_special_tokens=mean")


# ---- runs ---------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("method", [
    "finetuning_type=lora", "finetuning_type=full", "finetuning_type=oft", "quantization_bit=4"])
def test_a_run_and_what_reads_it(method, tmp_path, monkeypatch, capsys):
    """Embedding and head are trained; chat, evaluation and merging use the resized base."""
    out, merged = tmp_path / "out", tmp_path / "merged"
    run_recorded("sft_llama3", out, monkeypatch, *TOKENS, *SHORT, method)
    arguments = ["config.yaml", f"output_dir={out}", "adapter_name_or_path=null", method]
    chat.main([*arguments, "--prompt", "Hi", "max_new_tokens=2"])
    eval_script.main([*arguments, "do_eval=true", "eval_dataset=train", "compare=true"])
    found = json.loads((out / "comparison.json").read_text())
    assert len(found["losses"] if "losses" in found else found) > 0
    if "full" in method:
        assert load_file(out / "model.safetensors")["lm_head.weight"].shape[0] == 1024
        return
    stored = json.loads((out / "adapter_config.json").read_text())
    assert stored["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert "warning" not in capsys.readouterr().err
    merge.main([*arguments, f"export_dir={merged}"])
    assert "warning" not in capsys.readouterr().out
    merge.main([*arguments, "--check_adapter", str(out)])
    assert f"for the names in {out / RESIZED_BASE}\n" in capsys.readouterr().out
    assert tensors_in(merged)["lm_head.weight"].shape[0] == 1024
    assert not (merged / MARK).exists()                 # it is a base like any other
    assert load_tokenizer(merged).id_of("created") == 1008
    assert not [path for path in merged.iterdir() if path.is_symlink()]


@needs_shared
@pytest.mark.filterwarnings("ignore::Warning")
def test_the_merged_model_is_what_peft_adds_up(tmp_path, monkeypatch):
    """PEFT reads the adapter on the resized base, and cannot on the original one."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    peft = pytest.importorskip("peft")
    out, merged = tmp_path / "out", tmp_path / "merged"
    run_recorded("sft_llama3", out, monkeypatch, *TOKENS, *SHORT, "learning_rate=0.01",
                 "warmup_ratio=0", "lora_rank=4")
    merge.main(["config.yaml", f"output_dir={out}", "adapter_name_or_path=null",
                f"export_dir={merged}"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.tensor([load_tokenizer(merged).encode("the assistant created")])
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(load(out / RESIZED_BASE), out)(ids).logits
        assert (load(merged)(ids).logits - adapted).abs().max() < 1e-5
        assert (load(out / RESIZED_BASE)(ids).logits - adapted).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="size mismatch"):    # as docs/differences.md says
        peft.PeftModel.from_pretrained(load(CURVES / "tiny_llama3"), out)


@needs_shared
def test_resumed_as_never_stopped(tmp_path, monkeypatch):
    saves = ["save_strategy=steps", "save_steps=2", "max_steps=4"]
    run_recorded("sft_llama3", tmp_path / "a", monkeypatch, *TOKENS, *saves)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    shutil.rmtree(tmp_path / "b/checkpoint-4")
    again = ["resume_from_checkpoint=true"]
    run_recorded("sft_llama3", tmp_path / "b", monkeypatch, *TOKENS, *saves, *again)
    a, b = (load_file(tmp_path / run / "adapter_model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="made for another vocabulary"):
        run_recorded("sft_llama3", tmp_path / "b", monkeypatch, *TOKENS, *saves, *again,
                     "add_tokens=other")


@needs_shared
def test_two_ranks_train_as_one(tmp_path, monkeypatch):
    """The noise is that of the seed, whoever draws it."""
    same = [*TOKENS, *SHORT, "even_batches=false", "join_micro_batches=false"]
    one = run_recorded("sft_llama3", tmp_path / "one", monkeypatch, *same)
    case = CURVES / "sft_llama3"
    paths = [f"model_name_or_path={case.parent / 'tiny_llama3'}", f"dataset_dir={case / 'data'}"]
    [(code, text, _)] = outcomes(forked(
        2, ROOT / "train.py", case / "config.yaml", f"output_dir={tmp_path / 'two'}", *paths, *same,
        "plot_loss=false", "gradient_accumulation_steps=2"))
    assert code == 0, text
    two = json.loads((tmp_path / "two/trainer_state.json").read_text())
    losses = [[row["loss"] for row in state["log_history"] if "loss" in row]
              for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@needs_shared
def test_a_further_stage_starts_from_the_resized_base(tmp_path, monkeypatch):
    """With the same keys or without them; the first run's folder may then be moved."""
    first, second = tmp_path / "first", tmp_path / "second"
    run_recorded("sft_llama3", first, monkeypatch, *TOKENS, *SHORT)
    state = run_recorded("sft_llama3", second, monkeypatch, f"adapter_name_or_path={first}", *SHORT)
    same = run_recorded("sft_llama3", tmp_path / "third", monkeypatch, *TOKENS, *SHORT,
                        f"adapter_name_or_path={first}")
    assert state["log_history"][0]["loss"] == same["log_history"][0]["loss"]
    first.rename(tmp_path / "moved")
    assert resized_beside([second]) == second / RESIZED_BASE
    assert resized_beside([tmp_path / "moved"]) == tmp_path / "moved" / RESIZED_BASE
    load_model(second / RESIZED_BASE)
    shutil.rmtree(second / RESIZED_BASE)
    with pytest.raises(FileNotFoundError, match="a base with new tokens, which is not there"):
        resized_beside([second])


@needs_shared
def test_a_further_stage_with_further_tokens(tmp_path, monkeypatch, capsys):
    """Those that have rows train on; those that have none are said before anything is written."""
    first, second, plain = (tmp_path / name for name in ("first", "second", "plain"))
    run_recorded("sft_llama3", first, monkeypatch, *TOKENS, *SHORT)
    further = [*TOKENS[1:], *SHORT, f"adapter_name_or_path={first}"]
    run_recorded("sft_llama3", second, monkeypatch, *further, "add_tokens=other")
    many = ",".join(f"<{i}>" for i in range(20))
    with pytest.raises(ValueError, match="for 1,024 rows, and the new tokens need 1,088. Merge it"):
        run_recorded("sft_llama3", tmp_path / "third", monkeypatch, *further, f"add_tokens={many}")
    assert not (tmp_path / "third" / RESIZED_BASE).exists()
    assert "trains neither" not in capsys.readouterr().out

    run_recorded("sft_llama3", plain, monkeypatch, TOKENS[0], *SHORT)
    on_plain = [*TOKENS[1:], *SHORT, f"adapter_name_or_path={plain}"]
    run_recorded("sft_llama3", tmp_path / "fourth", monkeypatch, *on_plain)
    assert f"new tokens: {plain} trains neither embedding nor head" in capsys.readouterr().out
    run_recorded("sft_llama3", tmp_path / "fifth", monkeypatch, *on_plain,
                 "create_new_adapter=true")
    assert "trains neither" not in capsys.readouterr().out


@needs_shared
def test_a_reference_without_the_new_tokens(tmp_path, monkeypatch):
    """Ids beyond its rows are found before a model is loaded."""
    base = CURVES / "tiny_llama3"
    rows = [{"instruction": "Hi", "chosen": "yes <step>", "rejected": "no"}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    about = {"pairs": {"file_name": "rows.json", "ranking": True,
                       "columns": {"prompt": "instruction", "chosen": "chosen",
                                   "rejected": "rejected"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(about))
    keys = ["adapter_name_or_path=null", "stage=dpo", "dataset=pairs", f"dataset_dir={tmp_path}",
            "add_special_tokens=<step>", *SHORT]
    with pytest.raises(ValueError, match="knows ids 0 to 1005, and the data hold token id 1006"):
        run_recorded("sft_llama3", tmp_path / "out", monkeypatch, *keys, f"ref_model={base}")
    resized = tmp_path / "out" / RESIZED_BASE
    run_recorded("sft_llama3", tmp_path / "other", monkeypatch, *keys, f"ref_model={resized}")


@needs_shared
def test_a_base_that_was_moved(tmp_path):
    """The link is named, and where it points."""
    base = shutil.copytree(CURVES / "tiny_llama3", tmp_path / "base")
    folder = resize(base, tmp_path / "out", *TOKENS[1:])
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="is a link to .*base/model.safetensors, which is"):
        load_model(folder)


@needs_shared
def test_a_full_run_that_overwrites_one_with_new_tokens(tmp_path, monkeypatch, capsys):
    """It is compared with the base that it started from."""
    full = ["finetuning_type=full", "adapter_name_or_path=null", *SHORT]
    arguments = ["config.yaml", f"output_dir={tmp_path}", *full[:2], "do_eval=true",
                 "eval_dataset=train", "compare=true"]
    run_recorded("sft_llama3", tmp_path, monkeypatch, *full, *TOKENS[1:])
    eval_script.main(arguments)
    assert re.search(f"base +{tmp_path / RESIZED_BASE}", capsys.readouterr().out)
    run_recorded("sft_llama3", tmp_path, monkeypatch, *full)
    eval_script.main(arguments)
    assert re.search(r"base +../tiny_llama3\n", capsys.readouterr().out)


@needs_shared
def test_a_dry_run_and_a_preview_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(CURVES / "sft_llama3")
    arguments = ["config.yaml", f"output_dir={tmp_path / 'out'}", *TOKENS]
    train.main([*arguments, "dry_run=true"])
    assert "1,006 -> 1,024 rows" in capsys.readouterr().out
    preview(arguments)
    assert "1006" in capsys.readouterr().out and not files_under(tmp_path)


@needs_shared
def test_from_scratch_without_weights(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    shutil.copyfile(CURVES / "tiny_llama3/config.json", base / "config.json")
    run_recorded("sft_llama3", tmp_path / "out", monkeypatch, *TOKENS, *SHORT,
                 f"model_name_or_path={with_tokenizer(base)}", "finetuning_type=full",
                 "train_from_scratch=true")
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].shape[0] == 1024
    assert (tmp_path / "out" / RESIZED_BASE / MARK).is_file()
