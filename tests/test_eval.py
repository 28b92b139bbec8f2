"""eval.py: prompts, losses and answers against recorded LLaMA-Factory runs; a killed run that is
resumed equals an uninterrupted one."""
import importlib
import json
import math
import os
import subprocess
import sys
import zlib

import pytest

from evals import predictions
from evals.bleu_rouge import NAMES
from fast import batch_decode as answers
from runtime import finished as trained
from settings.load_config import load_config
from tests.common import CURVES, ROOT, RUN_SLOW, SHARED, needs_shared, read_jsonl
from tests.preference_runs import run_pairs
from tests.rows import cases_of, known, make_config, tokenizer_for, write_dataset
from text.chat_formats import TEMPLATES

evaluation = importlib.import_module("eval")  # keeps the builtin of that name
pytestmark = pytest.mark.usefixtures("day_of_recording")
# LLaMA-Factory's own yaml for predictions: greedy answers of a recorded adapter to 27 rows
RECIPE = f"""
model_name_or_path: {CURVES}/tiny_llama3
adapter_name_or_path: {CURVES}/sft_llama3/final
stage: sft
do_predict: true
finetuning_type: lora
eval_dataset: train
dataset_dir: {CURVES}/sft_eval/data
template: llama3
cutoff_len: 512
overwrite_output_dir: true
per_device_eval_batch_size: 4
predict_with_generate: true
do_sample: false
max_new_tokens: 40
report_to: none
use_cpu: true
"""


def run_eval(folder, *overrides, name="out"):
    """The output folder of a run of eval.py with RECIPE."""
    (folder / "predict.yaml").write_text(RECIPE)
    evaluation.main(
        [
            str(folder / "predict.yaml"),
            f"output_dir={folder / name}",
            "disable_tqdm=true",
            *overrides,
        ]
    )
    return folder / name


def results(folder, kind="all"):
    return json.loads((folder / f"{kind}_results.json").read_text())


# ---- against LLaMA-Factory -----------------------------------------------------------------------


@needs_shared
def test_recorded_prompts(tmp_path):
    """Prompt and label ids of every recorded row, also where thoughts are removed and answers end
    without eos."""
    checked = 0
    for line, rows, lines in cases_of("predict") + cases_of("templates_094"):
        if not line["predict"] or not known(line):
            continue
        write_dataset(tmp_path, rows, line["dataset_info"])
        config, template = (
            make_config(tmp_path, {"cutoff_len": 2048, **line["settings"]}),
            TEMPLATES[line["template"]],
        )
        tokenizer = tokenizer_for(template, SHARED / "tokenizers" / line["tokenizer"])
        found = predictions.prompts_of(
            predictions.read_prompt_rows(config), config, tokenizer, template
        )
        assert found == [(wanted["input_ids"], wanted["labels"]) for wanted in lines], line
        checked += len(found)
    assert checked > 150


@needs_shared
def test_recorded_predictions(tmp_path, monkeypatch):
    """What LLaMA-Factory 0.9.5 wrote for this yaml (transformers 5.6, CPU): the file byte for byte,
    and the scores."""
    found = run_eval(tmp_path)
    written = (found / "generated_predictions.jsonl").read_bytes()
    assert (len(written), zlib.crc32(written)) == (11519, 0x216909F6)
    ours = results(found, "predict")
    assert ours["predict_bleu-4"] == pytest.approx(3.803396296296296, abs=1e-9)
    if "predict_words" not in ours:
        for name, value in (("1", 0.6564777777777777), ("2", 0.2002), ("l", 0.6275888888888889)):
            assert ours[f"predict_rouge-{name}"] == pytest.approx(value, abs=1e-9)
    recorded = {f"predict_{name}" for name in NAMES} | {
        "predict_model_preparation_time",
        "predict_runtime",
        "predict_samples_per_second",
        "predict_steps_per_second",
    }
    assert set(ours) - {"predict_words"} == recorded and list(ours) == sorted(ours)


@needs_shared
def test_recorded_loss(tmp_path, monkeypatch):
    """eval_loss of a recorded training from its own yaml: rows held out by val_size, a smaller last
    batch."""
    monkeypatch.chdir(CURVES / "sft_eval")
    evaluation.main(
        ["config.yaml", f"output_dir={tmp_path}", "do_eval=true", "adapter_name_or_path=final"]
    )
    found, recorded = results(tmp_path, "eval"), results(CURVES / "sft_eval", "eval")
    assert found["eval_loss"] == pytest.approx(recorded["eval_loss"], abs=1e-5)
    assert (
        set(recorded) - {"epoch"} <= set(found)
        and not (tmp_path / "generated_predictions.jsonl").exists()
    )


# ---- against itself ------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("how", [(), ("do_sample=true", "seed=7")], ids=["greedy", "drawn"])
def test_batch_size_does_not_matter(tmp_path, how):
    files = [
        (
            run_eval(
                tmp_path,
                f"per_device_eval_batch_size={size}",
                "compare=false",
                *how,
                name=f"out{size}",
            )
            / "generated_predictions.jsonl"
        ).read_bytes()
        for size in (1, 8)
    ]
    assert files[0] == files[1]
    if how:
        other = run_eval(tmp_path, "compare=false", "do_sample=true", "seed=8", name="other")
        assert (other / "generated_predictions.jsonl").read_bytes() != files[0]


@needs_shared
@pytest.mark.parametrize("killed_after", [1, 20, 40] if RUN_SLOW else [20])
def test_a_killed_run_is_resumed(tmp_path, monkeypatch, capsys, killed_after):
    """Killed among the adapter's 27 answers or the base's, with its last line half-written: the
    files equal those of an uninterrupted run, and no answer is generated twice."""
    # an adapter of LLaMA-Factory does not say with which kernels it was trained
    settings = ["do_sample=true", "pin_kernels.attention=plain", "pin_kernels.matmul=torch"]
    want, made = run_eval(tmp_path, *settings, name="whole"), []
    honest = predictions.answer_all

    def dying(*args, **kwargs):
        for answer in honest(*args, **kwargs):
            if len(made) == killed_after:
                raise KeyboardInterrupt
            made.append(answer)
            yield answer

    monkeypatch.setattr(predictions, "answer_all", dying)
    with pytest.raises(KeyboardInterrupt):
        run_eval(tmp_path, *settings)
    newest = max((tmp_path / "out").glob("*.partial"), key=lambda path: path.stat().st_mtime_ns)
    with open(newest, "a") as file:
        file.write('{"row": 5, "tok')
    killed_after = -1
    found = run_eval(tmp_path, *settings)
    assert len(made) == 54 and "answers are kept from an earlier run" in capsys.readouterr().out
    for name in ("generated_predictions.jsonl", "generated_predictions.base.jsonl"):
        assert (found / name).read_bytes() == (want / name).read_bytes()
    assert not list(found.glob("*.partial"))
    timeless = [
        {
            key: value
            for key, value in results(folder).items()
            if not key.endswith(("time", "second"))
        }
        for folder in (found, want)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) >= 7


@needs_shared
def test_answers_of_other_settings_are_not_resumed(tmp_path, monkeypatch, capsys):
    def dying(*args, **kwargs):
        yield from list(answers.answer_all(*args, **kwargs))[:3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "answer_all", dying)
        with pytest.raises(KeyboardInterrupt):
            run_eval(tmp_path)
    found = run_eval(tmp_path, "max_new_tokens=5", "cutoff_len=300")
    assert (
        "answers of an earlier run are not used: max_new_tokens changed" in capsys.readouterr().out
    )
    assert len(read_jsonl(found / "generated_predictions.jsonl")) == 27


@needs_shared
def test_the_table_and_the_rows_that_changed(tmp_path, capsys):
    found = run_eval(tmp_path)
    text, sides = capsys.readouterr().out, json.loads((found / "comparison.json").read_text())
    assert (
        list(sides) == ["adapter", "base"]
        and sides["adapter"]["eval_loss"] < sides["base"]["eval_loss"]
    )
    for name in NAMES:
        assert f"predict_{name}" in sides["base"]
    for line in (
        "            loss  perplexity  bleu-4",
        "  adapter  6.685       800.4   3.803",
        "rows better",
    ):
        assert line in text, text
    best = text.split("\nrow ")[1]
    assert best.splitlines()[3].startswith("  base    ") and best.splitlines()[4].startswith(
        "  adapter "
    )
    assert results(found)["eval_token_loss"] == sides["adapter"]["eval_token_loss"]


@needs_shared
def test_the_token_cache_of_a_training_is_kept(tmp_path):
    """The evaluation has other rows; writing them into that folder would cost
    the training its own."""
    run_eval(
        tmp_path,
        "do_predict=false",
        "predict_with_generate=false",
        f"tokenized_path={tmp_path}/kept",
    )
    assert not (tmp_path / "kept").exists()


@needs_shared
def test_the_merged_model_is_compared_with_its_parts(tmp_path, capsys):
    import merge

    merge.main(
        [
            f"model_name_or_path={CURVES}/tiny_llama3",
            f"adapter_name_or_path={CURVES}/sft_llama3/final",
            "template=llama3",
            f"export_dir={tmp_path}/merged",
        ]
    )
    sides = run_eval(
        tmp_path, "do_predict=false", "predict_with_generate=false", f"export_dir={tmp_path}/merged"
    )
    found = json.loads((sides / "comparison.json").read_text())
    assert found["merged"]["eval_loss"] == pytest.approx(found["adapter"]["eval_loss"], abs=1e-5)
    assert abs(found["merged"]["eval_loss"] - found["base"]["eval_loss"]) > 0.1
    assert "example" in capsys.readouterr().out and not (sides / "predict_results.json").exists()


@needs_shared
@pytest.mark.parametrize(
    "name, more",
    [
        ("dpo_sigmoid", {}),
        ("kto_eval", {}),
        ("rm", {}),
        ("dpo_sigmoid", {"pref_loss": "orpo"}),
        (
            "dpo_sigmoid",
            {"finetuning_type": "full", "adapter_name_or_path": None, "learning_rate": 1e-4},
        ),
        ("dpo_sigmoid", {"ref_model": "tiny_llama3", "ref_model_adapters": "init_llama3"}),
    ],
    ids=str,
)
def test_preference_stages_evaluate_as_in_training(
    pairs_world, name, more, tmp_path, monkeypatch, capsys
):
    """After a short training: loss, rewards and accuracies equal those that training ended with."""
    settings = {
        "val_size": 6,
        "eval_strategy": "no",
        "do_eval": True,
        "max_steps": 2,
        "seed": 3,
        "per_device_eval_batch_size": 4,
    } | more
    run_pairs(pairs_world, name, tmp_path, monkeypatch, **settings)
    want = results(tmp_path, "eval")
    given = json.loads((tmp_path / "train_config.json").read_text())
    del given["versions"], given["kernels"]          # no settings
    given |= {
        "adapter_name_or_path": None,
        "do_eval": True,
        "do_predict": name == "dpo_sigmoid" and not more,
        "max_new_tokens": 4,
        "template": "llama3",
    }
    (tmp_path / "again.json").write_text(json.dumps(given))
    evaluation.main([str(tmp_path / "again.json")])
    found, text = results(tmp_path, "eval"), capsys.readouterr().out
    for key in (key for key in want if key != "epoch" and not key.endswith(("runtime", "second"))):
        assert found[key] == pytest.approx(want[key], abs=1e-5), key
    assert "eval_perplexity" not in found and "loss  accuracy" in text
    sides = json.loads((tmp_path / "comparison.json").read_text())
    if name == "rm":
        assert list(sides) == ["adapter"]
    elif more.get("pref_loss") != "orpo" and "ref_model" not in more and name != "kto_eval":
        assert sides["base"]["eval_loss"] == pytest.approx(math.log(2)), (
            "a model beside itself has no margin"
        )
    if (tmp_path / "generated_predictions.jsonl").exists():
        assert (
            given["do_predict"] and len(read_jsonl(tmp_path / "generated_predictions.jsonl")) == 6
        )


# ---- what the yaml means -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, answered",
    [
        ([], True),
        (["do_eval=true"], False),
        (["do_predict=true"], True),
        (["predict_with_generate=true"], True),
        (["do_eval=true", "do_predict=true"], True),
        (["do_predict=false"], False),
        (["stage=pt"], False),
    ],
)
def test_when_answers_are_generated(given, answered):
    config = load_config(["model_name_or_path=m", "output_dir=o", "dataset=d", *given], "eval")
    assert evaluation.wants_answers(config) == answered


def test_mistakes_are_named():
    for given, words in (
        (["output_dir=o"], "no rows to measure on"),
        (["dataset=d"], "output_dir"),
        (["dataset=d", "output_dir=o", "eval_dataset=e", "val_size=0.1"], "keep one"),
        (["dataset=d", "output_dir=o", "num_beams=4"], "beam search"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluation.main(["model_name_or_path=m", *given])


@needs_shared
def test_a_full_training_is_compared_with_its_base(tmp_path):
    config = load_config(
        [
            f"model_name_or_path={CURVES}/tiny_qwen2",
            f"output_dir={CURVES}/tiny_llama3",
            "dataset=d",
            "finetuning_type=full",
        ],
        "eval",
    )
    base, adapters, _ = trained.find_weights(config)
    sides = evaluation.sides_of(config, base, adapters)
    assert [(side.name, side.base.name) for side in sides] == [
        ("tuned", "tiny_llama3"),
        ("base", "tiny_qwen2"),
    ]


# ---- after training ----


def test_train_then_eval_from_one_yaml(tmp_path):
    """do_train and do_predict in one file: the result is measured after
    training, beside its base."""
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "--config",
            "configs/tiny_lora_sft.yaml",
            "do_train=true",
            "do_predict=true",
            "eval_dataset=tiny_questions",
            "max_samples=60",
            "max_steps=12",
            "warmup_ratio=0",
            "do_sample=false",
            "max_new_tokens=30",
            f"output_dir={tmp_path / 'out'}",
            "plot_loss=false",
            "use_cpu=true",
            "disable_tqdm=true",
        ],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    sides = json.loads((tmp_path / "out/comparison.json").read_text())
    assert sides["adapter"]["eval_loss"] < sides["base"]["eval_loss"]
    assert len(read_jsonl(tmp_path / "out/generated_predictions.jsonl")) == 60
    assert {"train_loss", "eval_loss", "predict_bleu-4"} <= results(tmp_path / "out").keys()


def test_train_refuses_what_llama_factory_refuses():
    for given in (["do_predict=true"], ["do_train=false"], ["predict_with_generate=true"]):
        with pytest.raises(ValueError, match="python eval.py with these settings"):
            load_config(["model_name_or_path=m", "output_dir=o", "dataset=d", *given], "train")
    load_config(["model_name_or_path=m", "output_dir=o", "dataset=d", "do_train=true"], "train")


def test_a_second_evaluation_in_the_same_folder_is_refused(tmp_path):
    """While the first one lives; and no file of another name is removed at the end."""
    (tmp_path / "generated_predictions.mine.partial").write_text("mine")
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from pathlib import Path; from runtime.resume import EVAL_LOCK, lock; "
         "lock(Path(sys.argv[1]), EVAL_LOCK); print('locked', flush=True); sys.stdin.read()",
         str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    argv = [f"model_name_or_path={ROOT}/models/tiny", f"output_dir={tmp_path}", "use_cpu=true",
            f"eval_dataset={ROOT}/data/tiny_questions.jsonl", "max_samples=2", "template=chatml",
            "do_sample=false", "max_new_tokens=2"]
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"another run is using .*process {holder.pid} on"):
            evaluation.main(argv)
    finally:
        holder.kill()
        holder.wait()
    evaluation.main(argv)
    assert (tmp_path / "comparison.json").is_file()
    assert (tmp_path / "generated_predictions.mine.partial").read_text() == "mine"
