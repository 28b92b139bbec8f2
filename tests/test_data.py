"""data.py against rows recorded from LLaMA-Factory (golden/data, golden/curves), and by hand."""
import json
import zlib

import numpy as np
import pytest

import data
import templates
from methods import preference
from runtime import preview, show_data, steps as runtime_steps
from runtime.build import STAGES
from settings.load_config import load_config
from templates import encode_prompt
from tests.common import GOLDEN, ROOT, SHARED, needs_shared, read_jsonl, run_recorded
from tests.rows import (CASE_KEYS, ask, cases_of, ids_and_labels, known, make_config, tokenizer_for,
                        write_dataset)
from text import template_check, token_cache
from text.chat_formats import TEMPLATES
from text.fit_tokenizer import fit_tokenizer
from text.tokenizer import load_tokenizer
from text.written_formats import with_overrides

IGNORE = data.IGNORE
pytestmark = pytest.mark.usefixtures("day_of_recording")


# ---- against the recorded rows -------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("file",
                         ["templates", "formats", "truncation", "settings", "thinking", "tools",
                          "packing", "pretrain", "templates_094"])
def test_recorded_rows(file, tmp_path):
    checked = 0
    for line, rows, lines in cases_of(file):
        if not known(line) or line["predict"] or "error" in line:
            continue
        settings = {"cutoff_len": 2048, "stage": line["stage"], "template": line["template"],
                    **line["settings"]}
        if settings.get("packing") and not settings.get("neat_packing"):
            settings["neat_packing"] = False          # LLaMA-Factory's plain packing
        write_dataset(tmp_path, rows, line["dataset_info"])
        if settings["stage"] == "pt" and settings.get("neat_packing") is False:
            del settings["neat_packing"]
        config = make_config(tmp_path, settings, skip_bad_rows=line["case"] == "broken_rows")
        template = TEMPLATES[line["template"]]
        tokenizer = tokenizer_for(template, SHARED / "tokenizers" / line["tokenizer"])
        examples, _, _ = token_cache.load_examples(
            config, tokenizer, template, STAGES[config.stage].encode, keep_unlearnable=True
        )
        where = f"{file} {[line[key] for key in CASE_KEYS]}"
        output = lines[0].get("output") or lines
        assert len(examples) == len(output), where
        for example, wanted in zip(examples, output):
            check_example(example, wanted, tokenizer, settings, where)
            checked += 1
    assert checked > 10


@needs_shared
@pytest.mark.parametrize("file", ["dpo", "kto"])
def test_recorded_rows_with_two_answers(file, tmp_path):
    """Pairs, and judged answers with their KL rows: ids, labels and tags of every recorded row."""
    names, checked = {"dpo": ("chosen_", "rejected_"), "kto": ("", "kl_")}[file], 0
    for line, rows, lines in cases_of(file):
        write_dataset(tmp_path, rows, line["dataset_info"])
        config = make_config(
            tmp_path, {"stage": line["stage"], "template": line["template"], **line["settings"]}
        )
        template = TEMPLATES[line["template"]]
        tokenizer = tokenizer_for(template, SHARED / "tokenizers" / line["tokenizer"])
        examples, _, _ = token_cache.load_examples(
            config, tokenizer, template, STAGES[config.stage].encode, keep_unlearnable=True
        )
        for example, wanted in zip(examples, lines, strict=True):
            assert example.desired == wanted.get("kto_tags"), line
            for number, name in enumerate(names):
                one = example.sequence(number)
                assert ids_and_labels([one]) == [
                    (wanted[f"{name}input_ids"], wanted[f"{name}labels"])
                ], (line["case"], name)
                checked += 1
    assert checked > 100


@needs_shared
def test_recorded_answers_with_thoughts_tools_and_system_texts(tmp_path):
    """Rows of several turns through LLaMA-Factory in five chat formats, with thinking on, off and
    null: checksums of its results (tests/recorded/answers.json). Thoughts of earlier answers are
    removed there."""
    recorded = json.loads((ROOT / "tests/recorded/answers.json").read_text())
    for run in recorded["runs"]:
        stage, template = run["settings"]["stage"], TEMPLATES[run["template"]]
        write_dataset(tmp_path, recorded[stage], recorded["dataset_info"][stage])
        tokenizer = tokenizer_for(template, SHARED / "tokenizers" / run["tokenizer"])
        config = make_config(tmp_path, run["settings"])
        examples, _, _ = token_cache.load_examples(
            config, tokenizer, template, STAGES[config.stage].encode, keep_unlearnable=True
        )
        found = [[example.sequence(number) for number in (0, 1)] for example in examples]
        found = [[zlib.crc32(one.input_ids.tobytes() + one.labels.tobytes()) for one in both]
                 for both in found]
        assert found == run["crc"], run


def test_rows_with_two_answers_in_every_layout(tmp_path, words):
    """alpaca, sharegpt, openai and files given by their path give the same; a bad row is named or
    counted."""
    question = {"role": "user", "content": "w1"}
    alpaca = {"instruction": "w1", "chosen": "w2 w3", "rejected": "w4"}
    share = {"conversations": [{"from": "human", "value": "w1"}],
             "chosen": {"from": "gpt", "value": "w2 w3"},
             "rejected": {"from": "gpt", "value": "w4"}}
    openai = {"messages": [question], "chosen": {"role": "assistant", "content": "w2 w3"},
              "rejected": {"role": "assistant", "content": "w4"}}
    columns = {"chosen": "chosen", "rejected": "rejected"}
    layouts = [(alpaca, {"ranking": True, "columns": {"prompt": "instruction", **columns}}),
               (share, {
                   "ranking": True, "formatting": "sharegpt",
                   "columns": {"messages": "conversations", **columns},
               }),
               (openai, {
                   "ranking": True, "formatting": "messages",
                   "columns": {"messages": "messages", **columns},
               }),
               (alpaca, None), (openai, None)]
    found = []
    for row, entry in layouts:
        write_dataset(tmp_path, [row], entry or {})
        name = "rows" if entry else str(tmp_path / "rows.json")
        examples, _, _ = loaded(tmp_path, words, stage="dpo", dataset=name)
        found.append([examples[0].sequence(number).input_ids.tolist() for number in (0, 1)])
    assert found[1:] == found[:-1] and found[0][0] != found[0][1]

    bad = [{**alpaca, "rejected": " "}, {**alpaca, "chosen": None}, {**alpaca, "chosen": ["w2"]},
           alpaca]
    write_dataset(tmp_path, bad, layouts[0][1])
    with pytest.raises(
        ValueError,
        match="3 bad rows(.|\n)*row 1: the answer in 'rejected' is empty(.|\n)*row 2: answer 1 is "
              "empty(.|\n)*row 3: 'chosen' must be text",
    ):
        loaded(tmp_path, words, stage="dpo")
    assert len(loaded(tmp_path, words, stage="dpo", skip_bad_rows=True)[0]) == 1
    for broken, why in (({"chosen": "w2"}, "'chosen' must be one turn"),
                        ({"chosen": question}, "'chosen' is by 'user', expected"),
                        ({"messages": openai["messages"] * 2}, "turn 2 is by 'user'"),
                        ({"messages": [question, openai["chosen"]]}, "ends with an answer")):
        write_dataset(tmp_path, [{**openai, **broken}], layouts[2][1])
        with pytest.raises(ValueError, match=why):
            loaded(tmp_path, words, stage="dpo")
    write_dataset(tmp_path, [{"instruction": "w1", "output": "w2", "label": "good"}], {})
    with pytest.raises(ValueError, match="'label' must be true .a good answer. or false"):
        loaded(tmp_path, words, stage="kto", dataset=str(tmp_path / "rows.json"))


def test_kl_rows_pair_an_answer_with_the_next_prompt(tmp_path, words):
    """The first prompt gets the last answer, within preprocessing_batch_size rows; bad rows are
    skipped."""
    rows = [{"instruction": f"w{i}", "output": f"w{10 + i}" if i != 2 else "", "label": i % 2 == 0}
            for i in range(6)]
    write_dataset(tmp_path, rows,
                  {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}})
    examples, _, _ = loaded(tmp_path, words, stage="kto", skip_bad_rows=True,
                            preprocessing_batch_size=3)
    answers = [[one.input_ids[one.labels != IGNORE][0] for one in (e.sequence(0), e.sequence(1))]
               for e in examples]
    own = [answer for answer, _ in answers]
    assert [other for _, other in answers] == [own[1], own[0], own[4], own[2], own[3]]
    assert [example.desired for example in examples] == [True, False, False, True, False]


def test_batches_of_pairs_have_chosen_first(tmp_path):
    """Two micro-batches in one pass: a row's weight is one over the rows of its micro-batch; judged
    answers keep the others apart."""
    def example(*sequences, desired=None):
        ids = np.array(sum(sequences, []), np.int32)
        return data.Example(ids, ids, [len(s) for s in sequences], ids, desired)

    rows = [example([1, 2], [3]), example([4], [5, 6]), example([7, 8, 9], [10])]
    batch = preference.collate_answers([rows[:2], rows[2:]])
    assert batch.input_ids[0].tolist() == [1, 2, 4, 7, 8, 9, 3, 5, 6, 10]
    assert batch.lengths == [2, 1, 3, 1, 2, 1]
    assert batch.row_weights.tolist() == [0.5, 0.5, 1.0]
    assert (batch.num_items, batch.batch_sizes) == (2, (2, 1))
    alike = preference.collate_answers([rows[:2], rows[2:]], alike=True)
    assert alike.row_weights.tolist() == [1.0, 1.0, 1.0] and alike.num_items == 3
    judged = preference.collate_answers(
        [[example([1, 2], [3], desired=True), example([4], [5, 6], desired=False)]]
    )
    assert judged.input_ids[0].tolist() == [1, 2, 4]
    assert judged.kl_batch.input_ids[0].tolist() == [3, 5, 6]
    assert judged.desired.tolist() == [True, False]


def check_example(example, wanted, tokenizer, settings, where):
    """Equal ids, labels, positions and sequence boundaries.

    LLaMA-Factory's padding to cutoff_len is not stored here.
    """
    n = len(example.input_ids)
    padding = len(wanted["input_ids"]) - n
    assert padding == 0 or settings.get("packing") and settings["stage"] == "sft", where
    assert example.input_ids.tolist() + [tokenizer.pad_id] * padding == wanted["input_ids"], where
    if "labels" in wanted:
        assert example.labels.tolist() + [IGNORE] * padding == wanted["labels"], where
    else:
        # stage pt: made by its collator
        assert example.labels.tolist() == wanted["input_ids"], where
    if "position_ids" in wanted:
        assert example.position_ids.tolist() + [0] * padding == wanted["position_ids"], where
        mask = [i for i, length in enumerate(example.lengths, 1) for _ in range(length)]
        fill = 0 if settings.get("neat_packing") else 1
        assert mask + [fill] * padding == wanted["attention_mask"], where


@needs_shared
def test_recorded_prompts(tmp_path):
    """The generation path: prompt and answer, truncated by the same rule."""
    from text.conversations import convert
    from text.data_files import find_sources, open_rows
    checked = 0
    for line, rows, lines in cases_of("predict") + cases_of("templates_094"):
        if not line["predict"] or not known(line):
            continue
        write_dataset(tmp_path, rows, line["dataset_info"])
        config = make_config(tmp_path, {"cutoff_len": 2048, **line["settings"]})
        template = TEMPLATES[line["template"]]
        tokenizer = tokenizer_for(template, SHARED / "tokenizers" / line["tokenizer"])
        sources = find_sources(config.dataset, config, [])
        raw = open_rows(sources, config, np.random.RandomState(0), [])
        for row, wanted in zip(raw, lines, strict=True):
            messages, system, tools, *_ = convert(row)
            rendered_as = with_overrides(template, config.tool_format, config.default_system)
            prompt, answer = encode_prompt(rendered_as, tokenizer, messages, system, tools,
                                           data.settings_of(config))
            answer = answer + [tokenizer.eos_id] * template.efficient_eos
            keep_prompt, keep_answer = data.truncated_lengths(
                len(prompt), len(answer), config.cutoff_len
            )
            assert prompt[:keep_prompt] == wanted["input_ids"], line
            assert answer[:keep_answer] == wanted["labels"], line
            checked += 1
    assert checked > 100


@needs_shared
def test_recorded_batches(tmp_path):
    """A collated batch, padded by this test as LLaMA-Factory's collator does, equals the recorded
    one."""
    checked = 0
    for line in read_jsonl(GOLDEN / "data" / "batches.jsonl"):
        if line["stage"] != "sft" or not known(line):
            continue
        settings = {"cutoff_len": 2048, **line["settings"]}
        if settings.get("packing"):
            settings.setdefault("neat_packing", False)
        write_dataset(tmp_path, line["rows"], line["dataset_info"])
        template = TEMPLATES[line["template"]]
        tokenizer = tokenizer_for(template, SHARED / "tokenizers" / line["tokenizer"])
        config = make_config(tmp_path, settings)
        examples, _, _ = token_cache.load_examples(
            config, tokenizer, template, STAGES[config.stage].encode
        )
        wanted = line["batch"]
        examples = examples[:len(wanted["input_ids"])]
        batch, start = data.collate(examples), 0
        for place, example in enumerate(examples):
            n = len(example.input_ids)
            padding = len(wanted["input_ids"][place]) - n
            padded = batch.input_ids[0, start:start + n].tolist() + [tokenizer.pad_id] * padding
            assert padded == wanted["input_ids"][place]
            assert (batch.targets[start:start + n - 1].tolist() + [IGNORE] * padding
                    == wanted["labels"][place][1:])
            if "may_attend" in wanted:
                sequence = np.repeat(range(len(example.lengths)), example.lengths)
                may = (sequence[:, None] == sequence[None]) & np.tri(n, dtype=bool)
                assert (np.array(wanted["may_attend"][place])[..., :n, :n] == may).all()
            if "position_ids" in wanted:
                assert (batch.position_ids[0, start:start + n].tolist()
                        == wanted["position_ids"][place][:n])
            start += n
        assert batch.num_items == sum(label != IGNORE for row in wanted["labels"] for label in row)
        checked += 1
    assert checked >= 3


@needs_shared
@pytest.mark.parametrize(
    "case", ["sft_llama3", "sft_eval", "sft_packing", "sft_qwen2_loraplus", "sft_shuffled", "pt"]
)
def test_rows_of_recorded_runs(case):
    """The recorded runs: processed rows in their order, and the rows of each micro-batch."""
    folder = GOLDEN / "curves" / case
    extra = ["neat_packing=false"] if case == "sft_packing" else []
    config = load_config([str(folder / "config.yaml"), f"dataset_dir={folder / 'data'}", *extra],
                         "train")
    template = TEMPLATES[config.template]
    tokenizer = tokenizer_for(template, folder / config.model_name_or_path)
    train, evaluation, _ = token_cache.load_examples(
        config, tokenizer, template, STAGES[config.stage].encode
    )
    recorded = read_jsonl(folder / "processed.jsonl")
    assert len(train) + len(evaluation) == len(recorded)
    for example, wanted in zip([*train, *evaluation], recorded):
        settings = {"packing": case == "sft_packing", "stage": config.stage}
        check_example(example, wanted, tokenizer, settings,
                      (case, wanted["split"], wanted["index"]))
    order = []
    for epoch in range(int(config.num_train_epochs)):
        order += runtime_steps.micro_batches(runtime_steps.epoch_order(
                                                 len(train), config.seed, epoch,
                                                 not config.disable_shuffling,
                                             ),
                                             config.per_device_train_batch_size)
    steps = read_jsonl(folder / "micro_steps.rank0.jsonl")
    batches = [[index for split, index in step["rows"]] for step in steps
               if step["event"] == "batch" and step["rows"][0][0] == "train"]
    assert order == batches[:len(order)] and len(batches) >= len(order) - 1
    items = [step["num_items_in_batch"] for step in steps if step["event"] == "micro_step"]
    group = config.gradient_accumulation_steps
    assert (sum(data.collate([train[i] for i in batch]).num_items for batch in order[:group])
            == items[0])


@needs_shared
def test_published_example(tmp_path):
    """The first example of the published runs, and their number of examples (alpaca_en_demo had one
    row more then)."""
    published = json.loads(
        (GOLDEN / "published" / "llama_factory_logs.json").read_text(encoding="utf-8")
    )
    template = TEMPLATES["llama3"]
    tokenizer = tokenizer_for(template, SHARED / "tokenizers" / "llama3")
    config = make_config(tmp_path, dataset="identity,alpaca_en_demo", max_samples=500,
                         dataset_dir=str(SHARED / "data"))
    train, _, _ = token_cache.load_examples(config, tokenizer, template,
                                            STAGES[config.stage].encode)
    first = published["training_example"]
    assert train[0].input_ids.tolist() == first["input_ids"]
    assert (train[0].labels.tolist()
            == [IGNORE] * first["masked_prefix"] + first["input_ids"][first["masked_prefix"]:])
    assert len(train) == published["runs"][2]["num_examples"]


@needs_shared
def test_recorded_errors(tmp_path):
    """What LLaMA-Factory refuses is refused here too, by the config, the template or the data."""
    checked = 0
    for line in read_jsonl(GOLDEN / "data" / "errors.jsonl"):
        write_dataset(tmp_path, line["rows"], line["dataset_info"])
        with pytest.raises(ValueError):
            config = make_config(
                tmp_path, {"stage": line["stage"], "template": line["template"], **line["settings"]}
            )
            tokenizer = load_tokenizer(SHARED / "tokenizers" / line["tokenizer"])
            template, _ = template_check.choose_template(
                config.template, tokenizer, None, force=True
            )
            fit_tokenizer(template, tokenizer)
            token_cache.load_examples(config, tokenizer, template, STAGES[config.stage].encode)
            pytest.fail(f"not refused: {line['case']}")
        checked += 1
    assert checked > 5


# ---- rows that need the user's attention ---------------------------------------------------------


def load(tmp_path, words, rows, entry=None, **settings):
    write_dataset(tmp_path, rows, entry or {})
    return loaded(tmp_path, words, **settings)


def loaded(tmp_path, words, **settings):
    config = make_config(tmp_path, settings)
    return token_cache.load_examples(config, *words, STAGES[config.stage].encode)


def test_bad_rows_are_errors_or_left_out(tmp_path, words):
    rows = [ask("w1", "w2"), ask("w3", " "), ask("w4", "w5")]
    with pytest.raises(
        ValueError,
        match=r"(?s)1 bad row\n.*dataset 'rows'.*rows.json row 2: answer 1 is empty.*w3.*"
              "skip_bad_rows: true",
    ):
        load(tmp_path, words, rows)
    train, _, report = load(tmp_path, words, rows, skip_bad_rows=True)
    assert len(train) == 2 and report.datasets["train", "rows"].bad == 1
    assert len(report.bad_rows) == 1 and "row 2: answer 1 is empty" in report.bad_rows[0]


def test_unreadable_tool_call_is_a_bad_row(tmp_path, words):
    turns = [{"from": "human", "value": "w1"}, {"from": "function_call", "value": "call w2"}]
    with pytest.raises(ValueError, match=r"(?s)rows.json row 1: function call: not JSON"):
        load(tmp_path, words, [{"conversations": turns}], {"formatting": "sharegpt"})


def test_placeholders_warn_or_are_filled(tmp_path, words):
    rows = [ask("w9", "w1 {{ name }} w2"), ask("w9", "w3")]
    train, _, report = load(tmp_path, words, rows)
    assert len(train) == 2
    assert any("{{name}}" in note and "row 1" in note and "placeholders: {name: …}" in note
               for note in report.notes)
    train, _, report = load(tmp_path, words, rows, placeholders={"name": "w7"})
    assert train[0].input_ids.tolist() == words[0].encode("w9 w1 w7 w2 </s>") and not report.notes


def test_rows_without_a_label_are_counted_shown_and_skipped(tmp_path, words, capsys):
    """With cutoff 2 the second row keeps two tokens of its prompt and int(2 * 2 / 7) = 0 of its
    answer."""
    rows = [ask("w1", "w2"), ask("w1 w2 w3 w4 w5", "w6")]
    train, _, report = load(tmp_path, words, rows, cutoff_len=2)
    assert ids_and_labels(train) == [([3, 4], [IGNORE, 4])]
    show_data.print_counts(report)
    printed = capsys.readouterr().out
    assert "nothing left to train on within cutoff_len: 1, first" in printed
    assert "row 2 (7 tokens)" in printed
    with pytest.raises(ValueError, match="no token carries loss"):
        load(tmp_path, words, rows[1:], cutoff_len=2)


def test_counts_of_rows_and_tokens(tmp_path, words, capsys):
    train, evaluation, report = load(tmp_path, words, [ask("w1", "w2 w3")] * 8, val_size=0.25)
    assert (len(train), len(evaluation)) == (6, 2)
    counts = report.datasets["train", "rows"]
    assert (counts.rows, counts.lengths.tolist(), counts.supervised, counts.truncated) == (
        6, [4] * 6, 18, 0
    )
    show_data.print_counts(report)
    assert "75.0%" in capsys.readouterr().out
    with pytest.raises(ValueError, match="val_size: 0.99 takes 8 of 8 rows"):
        load(tmp_path, words, [ask("w1", "w2 w3")] * 8, val_size=0.99)


def test_eval_dataset(tmp_path, words):
    (tmp_path / "held_out.jsonl").write_text(json.dumps(ask("w5", "w6")), encoding="utf-8")
    train, evaluation, _ = load(tmp_path, words, [ask("w1", "w2")],
                                eval_dataset=str(tmp_path / "held_out.jsonl"))
    assert (len(train), len(evaluation)) == (1, 1)
    assert evaluation[0].input_ids.tolist() == words[0].encode("w5 w6 </s>")


# ---- pieces by hand and by slow twins ------------------------------------------------------------


def test_truncated_lengths_fill_the_cutoff_exactly():
    for source in range(0, 30):
        for target in range(1, 30):
            for room in range(1, 40):
                kept_source, kept_target = data.truncated_lengths(source, target, room)
                assert 0 <= kept_source <= source and 0 <= kept_target <= target
                assert kept_source + kept_target <= room
                if source + target < room:
                    assert (kept_source, kept_target) == (source, target)


def test_label_turns_by_hand():
    turns = [([1, 2], [3]), ([4], [5, 6])]
    assert data.label_turns(turns, 100) == ([1, 2, 3, 4, 5, 6], [-100, -100, 3, -100, 5, 6])
    assert data.label_turns(turns, 100, train_on_prompt=True) == (
        [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]
    )
    assert data.label_turns(turns, 100, mask_history=True) == (
        [1, 2, 3, 4, 5, 6], [-100] * 4 + [5, 6]
    )
    assert data.label_turns(turns, 100, closing_eos=9) == (
        [1, 2, 3, 4, 5, 6, 9], [-100, -100, 3, 9, 5, 6, 9]
    )
    # no tokens are left for the second turn
    assert data.label_turns(turns, 3) == ([1, 2, 3], [-100, -100, 3])
    # the last turn has priority
    assert data.label_turns(turns, 3, mask_history=True)[0] == [4, 5, 6]


def slow_pack(lengths, capacity):
    """The same greedy rule in its simplest form: lists of row numbers."""
    left, packs = list(range(len(lengths))), []
    while left:
        free, pack = capacity, []
        while True:
            fitting = [row for row in left if lengths[row] <= free]
            if not fitting:
                break
            row = max(fitting, key=lambda row: (lengths[row], row))
            left.remove(row)
            pack.append(row)
            free -= lengths[row]
        packs.append(pack)
    return packs


@pytest.mark.parametrize("seed", range(5))
def test_pack_equals_its_slow_twin(seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 20, size=60).tolist()
    assert data.pack(lengths, 32) == slow_pack(lengths, 32)


def test_packing_separates_sequences_unless_neat_packing_is_off(tmp_path, words):
    rows = [ask("w1 w2", "w3"), ask("w4", "w5")]
    for settings, lengths in (({"packing": True}, [4, 3]), ({"neat_packing": True}, [4, 3]),
                              ({"packing": True, "neat_packing": False}, [7])):
        train, _, _ = load(tmp_path, words, rows, cutoff_len=20, **settings)
        assert [example.lengths for example in train] == [lengths]
        assert [example.position_ids.tolist() for example in train] == [[0, 1, 2, 3, 0, 1, 2]]


def test_collate_shifts_within_each_sequence():
    first = data.Example(np.int32([1, 2, 3]), np.int32([-100, 2, 3]), [3])
    second = data.Example(np.int32([4, 5, 6, 7]), np.int32([4, 5, 6, 7]), [2, 2],
                          np.int32([0, 1, 0, 1]))
    batch = data.collate([first, second])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch.targets.tolist() == [2, 3, -100, 5, -100, 7, -100]
    assert batch.lengths == [3, 2, 2] and batch.num_items == 6


def test_order_and_micro_batches():
    order = runtime_steps.epoch_order(10, seed=3, epoch=1, shuffle=True)
    assert sorted(order) == list(range(10))
    assert order != runtime_steps.epoch_order(10, seed=3, epoch=2, shuffle=True)
    # only seed + epoch matters
    assert order == runtime_steps.epoch_order(10, seed=4, epoch=0, shuffle=True)
    assert runtime_steps.epoch_order(3, 0, 5, shuffle=False) == [0, 1, 2]
    assert runtime_steps.micro_batches(order, 4) == [order[:4], order[4:8], order[8:]]
    assert runtime_steps.micro_batches(order, 4, drop_last=True) == [order[:4], order[4:8]]
    assert runtime_steps.micro_batches(order, 5, drop_last=True) == [order[:5], order[5:]]


def test_documents_of_stage_pt(tmp_path, words):
    """One stream in blocks, or one document a row; all tokens are labels, the last partial block is
    dropped."""
    entry = {"file_name": "rows.txt", "columns": {"prompt": "text"}}
    rows = [{"text": "w1 w2 w3"}, {"text": ""}, {"text": "w4"}]
    end = words[0].eos_id
    template = templates.Template(user=("{{content}}",),
                                  assistant=("{{content}}", " ", templates.EOS))
    tokenizer = words[0]
    tokenizer.encode_batch = lambda texts: [tokenizer.encode(text.replace("</s>", " </s>"))
                                            for text in texts]
    train, _, report = load(tmp_path, (tokenizer, template), rows, entry, stage="pt", cutoff_len=3)
    stream = [*tokenizer.encode("w1 w2 w3"), end, end, *tokenizer.encode("w4"), end]
    assert ids_and_labels(train) == [(stream[:3], stream[:3]), (stream[3:6], stream[3:6])]
    assert report.dropped_tail == 1
    train, _, _ = load(tmp_path, (tokenizer, template), rows, entry, stage="pt", cutoff_len=3,
                       packing=False)
    assert [ids for ids, _ in ids_and_labels(train)] == [stream[:3], [end], stream[5:]]
    with pytest.raises(ValueError, match="7 tokens do not fill one block"):
        load(tmp_path, (tokenizer, template), rows, entry, stage="pt", cutoff_len=30)


@needs_shared
def test_an_unknown_tool_format_is_an_error_of_the_config():
    folder = GOLDEN / "curves" / "sft_llama3"
    with pytest.raises(ValueError, match="^unknown tool_format 'foo'"):
        preview.main([str(folder / "config.yaml"), f"dataset_dir={folder / 'data'}",
                      "tool_format=foo", "skip_bad_rows=true",
                      f"model_name_or_path={GOLDEN / 'curves' / 'tiny_llama3'}"])


@needs_shared
def test_documents_of_one_token_have_no_loss(tmp_path):
    """A first token has a label, and nothing that predicts it."""
    (tmp_path / "d.txt").write_text("hello there\n")
    with pytest.raises(ValueError, match="nothing to learn .* cutoff_len: 1"):
        preview.main([f"dataset={tmp_path / 'd.txt'}", "stage=pt", "cutoff_len=1",
                      "template=llama3", f"model_name_or_path={GOLDEN / 'curves' / 'tiny_llama3'}"])


@needs_shared
def test_the_preview_command_writes_every_row(tmp_path, capsys):
    """python -m runtime.preview config.yaml --jsonl FILE: the rows of LLaMA-Factory, with its
    padding of packed rows."""
    folder, out = GOLDEN / "curves" / "sft_packing", tmp_path / "rows.jsonl"
    preview.main([str(folder / "config.yaml"), f"dataset_dir={folder / 'data'}",
                  "neat_packing=false", f"model_name_or_path={GOLDEN / 'curves' / 'tiny_llama3'}",
                  "--jsonl", str(out)])
    wanted = [{key: row[key] for key in ("input_ids", "labels")}
              for row in read_jsonl(folder / "processed.jsonl")]
    assert read_jsonl(out) == wanted
    printed = capsys.readouterr().out
    assert "example 1" in printed and "train train" in printed
    with pytest.raises(ValueError, match="nothing to learn"):  # written as well, for inspection
        preview.main([str(folder / "config.yaml"), f"dataset_dir={folder / 'data'}",
                      "packing=false", "cutoff_len=1",
                      f"model_name_or_path={GOLDEN / 'curves' / 'tiny_llama3'}", "--jsonl",
                      str(out)])
    assert all(row["labels"] == [IGNORE] for row in read_jsonl(out)) and len(read_jsonl(out)) == 27


@needs_shared
def test_streaming_trains_on_the_rows_of_a_run_without_it(tmp_path, monkeypatch, capsys):
    plain = run_recorded("sft_llama3", tmp_path / "a", monkeypatch, "max_steps=3")
    streamed = run_recorded("sft_llama3", tmp_path / "b", monkeypatch, "max_steps=3",
                            "streaming=true", "buffer_size=4", "max_samples=1000")
    assert "streaming: rows are tokenized to disk before the first step" in capsys.readouterr().out
    losses = [[row["loss"] for row in state["log_history"] if "loss" in row]
              for state in (plain, streamed)]
    assert losses[0] == losses[1]
