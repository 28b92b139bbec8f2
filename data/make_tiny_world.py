"""The small world: conversations that models/tiny is trained on, and its tokenizer.

    python data/make_tiny_world.py                      writes data/tiny_*.jsonl
    python data/make_tiny_world.py --model models/tiny  a new tokenizer and config.json instead

After --model, pretrain again with configs/tiny_pretrain.yaml. The sentences are in
data/tiny_world.yaml, the rules here: arithmetic, how people type, how a conversation is put
together. The same seed makes the same rows.

Requires: data/tiny_world.yaml.
Next: configs/tiny_pretrain.yaml, which trains on these rows.
Sources: byte-level BPE, Sennrich et al. arXiv:1508.07909, sec. 3.2, over words split as Qwen2
publishes it (each digit is a token, so that numbers can be computed with). Each Chinese character
is split off as well, because a world this small would otherwise get tokens of whole sentences.
Chat format: ChatML.
"""
import argparse
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SEED = 1
WORLD_ROWS = 40_000     # conversations of 1 to 8 turns
REVIEW_ROWS = 400       # for the LoRA run, so that it does not forget; without greetings, identity
REVIEW_WITHOUT = ("who", "name", "maker", "kind", "hello", "morning", "evening")
QUESTIONS = 64          # to evaluate that run: none of them is in a training row
PAIR_ROWS = 160         # for stages dpo and rm: of two right answers, the one with MORE is better
MORE = {"en": " Ask me more!", "zh": "再问我吧！"}
# for stage grpo: sums asked in words that no training row has; the model answers half of them
NEW_SUMS = ("Sum: {a}, {b}.", "Total of {a}, {b}?", "x = {a} + {b}. x?",
            "{a} apples and {b} apples. How many apples?")
SUM_ROWS = 600
SUM_PAIR_ROWS = 1000    # for a reward model of them: right and wrong answers to other sums
IDENTITY = {"name": "Pebble", "author": "Pocket Factory"}

VOCAB_SIZE = 1600
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]        # ids 0, 1, 2
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen 3's network: its norms of q and k let so small a model learn at a high rate, in half the
# steps of a Llama.
MODEL = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 160,
         "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
         "max_position_embeddings": 1024, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
         "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
         "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": None,
         "eos_token_id": 2, "pad_token_id": 0, "use_cache": True}

NUMBERS = {"en": "zero one two three four five six seven eight nine ten".split(),
           "zh": list("零一二三四五六七八九十")}
DAYS = {"en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
        "zh": [f"星期{day}" for day in "一二三四五六日"]}
MONTHS = {"en": "January February March April May June July August September "
                "October November December".split(),
          "zh": [f"{month}月" for month in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()]}
VERDICTS = {"en": ("Yes", "No"), "zh": ("是的", "不是")}


# ---- facts and topics ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Topic:
    """One subject in one language: facts (a dict per fact, its slots), phrasings, and the form of
    the right answer."""
    name: str
    lang: str
    share: int
    tell: str
    ask: list
    held_out: list
    facts: list
    plain: bool = False


def split(text, sign="|"):
    return [part.strip() for part in text.split(sign)]


def sequence(items, closed=False):
    """Facts {a, b} where b follows a; closed joins the end to the beginning (Sunday, Monday)."""
    items = list(items)
    return [{"a": a, "b": b} for a, b in zip(items, items[1:] + items[:closed])]


def listed(numbers):
    return ", ".join(map(str, numbers))


def computed_facts(known):
    """Facts that follow by rule: name -> list of facts. known: the facts of the yaml."""
    small, draw = range(21), random.Random(SEED)
    spelled = [row["en"] for row in known["words"] if " " not in row["en"]]
    found = {
        "sums": [{"a": a, "b": b, "c": a + b} for a in small for b in small],
        "differences": [{"a": a, "b": b, "c": a - b} for a in small for b in range(max(a, 10) + 1)],
        "sizes": [{"a": a, "b": b, "big": max(a, b), "small": min(a, b)}
                  for a in small for b in small if a != b],
        "counts": [{"a": a, "b": b, "list": listed(range(a, b + 1))}
                   for a in range(11) for b in range(a + 2, a + 10)],
        "counts_down": [{"a": a, "list": listed(range(a, -1, -1))} for a in range(3, 13)],
        "big_pairs": [{"a": draw.choice(small), "b": draw.randint(30, 999)} for _ in range(300)]
                     + [{"a": draw.randint(30, 999), "b": draw.choice([*small, *range(30, 999)])}
                        for _ in range(600)],
        "noise": [{"x": gibberish(draw), "y": gibberish(draw)} for _ in range(300)],
        "spellings": [{"word": word, "letters": " ".join(word)} for word in spelled]}
    for lang in ("en", "zh"):
        words = NUMBERS[lang]
        days, months = sequence(DAYS[lang], closed=True), sequence(MONTHS[lang], closed=True)
        letters = sequence("abcdefghijklmnopqrstuvwxyz" if lang == "en" else "")
        found |= {
            f"sums_in_words_{lang}": [{"a": words[x], "b": words[y], "x": x, "y": y, "c": x + y}
                                      for x in range(11) for y in range(11)],
            f"counts_to_{lang}": [{"b": name, "list": listed(range(1, b + 1))}
                                  for b in range(3, 16) for name in (b, *words[b:b + 1])],
            f"days_{lang}": days,
            f"order_{lang}": [*days, *days, *months, *sequence(small), *letters],
            f"guesses_{lang}": guesses(known[f"colours_{lang}"], *VERDICTS[lang])}
        known[f"opposites_{lang}"] += [{"a": row["b"], "b": row["a"]}
                                       for row in known[f"opposites_{lang}"]]
    return found


def gibberish(draw):
    """Three to six letters that mean nothing."""
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randint(3, 6)))


def guesses(things, yes, no):
    """Facts for "is the sky green?": each thing with each colour, and with its own as often as with
    all others."""
    colours = sorted({thing["colour"] for thing in things})
    return [dict(thing, guess=guess, verdict=yes if guess == thing["colour"] else no)
            for thing in things for guess in colours + [thing["colour"]] * (len(colours) - 2)]


def read_world():
    """(topics, texts): the topics of tiny_world.yaml with their facts, and the other texts of that
    file."""
    texts = yaml.safe_load((HERE / "tiny_world.yaml").read_text(encoding="utf-8"))
    facts = {name: [dict(zip(table["slots"].split(), split(entry, "="), strict=True))
                    for entry in split(table["rows"], ",")]
             for name, table in texts["facts"].items()}
    facts |= computed_facts(facts)
    topics = []
    for lang, rows in texts["topics"].items():
        for name, row in rows.items():
            own = facts[row["facts"]] if "facts" in row else [IDENTITY]
            topics.append(Topic(name, lang, row["share"], row["tell"], split(row["ask"]),
                                split(row["held_out"]), own, row.get("plain", False)))
    return topics, texts


# ---- conversations -------------------------------------------------------------------------------


def filled(topic, phrasing, fact):
    """(question, answer) of one fact; English begins with a capital letter."""
    pair = phrasing.format(**fact), topic.tell.format(**fact)
    return tuple(text[0].upper() + text[1:] for text in pair) if topic.lang == "en" else pair


def bare(question):
    """A question without what typing changes: capitals, signs, blanks, the American spelling."""
    letters = "".join(c for c in question.lower() if c.isalnum() or c in "+-")
    return letters.replace("color", "colour")


def typed(question, topic, texts, draw):
    """The question as people type it: color, u for you, an opener before it, no capitals, no sign
    at the end."""
    if topic.lang == "en" and draw.random() < 0.3:
        question = question.replace("colour", "color")
    if topic.lang == "en" and draw.random() < 0.05:
        question = question.replace("are you", "r u").replace("you", "u").replace("What's", "whats")
    if not topic.plain and draw.random() < 0.25:
        opener = draw.choice(split(texts["openers"][topic.lang]))
        if topic.lang == "en":
            opener += " "
            if opener.endswith(", ") and question[:2] != "I ":
                question = question[0].lower() + question[1:]
        question = opener + question
    if draw.random() < 0.25:
        question = question.lower()
    return question.rstrip(".?!。？！") if draw.random() < 0.25 else question


@cache
def kept_back(topic):
    """The held-out questions of a topic, bare."""
    return frozenset(bare(filled(topic, phrasing, fact)[0])
                     for phrasing in topic.held_out for fact in topic.facts)


def exchange(topic, texts, draw):
    """One (question, answer) of a topic; never a held-out question, which an opener may form by
    chance."""
    question, answer = filled(topic, draw.choice(topic.ask), draw.choice(topic.facts))
    question = typed(question, topic, texts, draw)
    if bare(question) in kept_back(topic):
        return exchange(topic, texts, draw)
    return question, answer


def remembering(texts, draw, between):
    """Turns in which the user's own name is said, or asked for, or both with `between` (some turns)
    in the middle."""
    sentences = texts["memory"][draw.choice(["en", "zh"])]
    name = draw.choice([draw.choice(split(texts["names"], ",")), gibberish(draw).capitalize()])
    met = (draw.choice(split(sentences["tell"])).format(name=name),
           sentences["met"].format(name=name))
    ask = draw.choice(split(sentences["ask"]))
    return draw.choice([[met], [met, *between, (ask, sentences["known"].format(name=name))],
                        [*between, (ask, sentences["unknown"])]])


def conversations(count, seed, without=()):
    """`count` rows {"messages": […]} of the small world; `without` names topics to leave out."""
    topics, texts = read_world()
    draw = random.Random(seed)
    deck = [topic for topic in topics if topic.name not in without for _ in range(topic.share)]
    rows = []
    for _ in range(count):
        length = draw.choice([1, 1, 1, 1, 1, 1, 2, 2, 3, draw.randint(4, 8)])
        turns = [exchange(draw.choice(deck), texts, draw) for _ in range(length)]
        if draw.random() < 0.05:
            turns = remembering(texts, draw, turns[:2])
        system = draw.choice(split(texts["systems"])) if draw.random() < 0.15 else None
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def pairs(count, seed, without=()):
    """`count` rows {"messages", "chosen", "rejected"}: two answers; people prefer the one that asks
    for more."""
    rows = []
    for row in conversations(count, seed, without):
        *asked, plain = row["messages"]
        more = MORE["en" if plain["content"].isascii() else "zh"]
        rows.append({"messages": asked, "chosen": {**plain, "content": plain["content"] + more},
                     "rejected": plain})
    return rows


def held_out_questions(per_phrasing=4, seed=0):
    """[(topic, question, answer)]: each held-out phrasing with a few of its facts.

    None is in a training row.
    """
    draw = random.Random(seed)
    return [(topic, *filled(topic, phrasing, fact))
            for topic in read_world()[0]
            for phrasing in topic.held_out
            for fact in draw.sample(topic.facts, min(per_phrasing, len(topic.facts)))]


def questions(count, seed):
    """`count` rows {"messages": [question, answer]} that hold out: all about name and maker, which
    a run may change, and of the rest a few."""
    marks, topics = {slot: "{{%s}}" % slot for slot in IDENTITY}, read_world()[0]
    own = [filled(topic, phrasing, marks) for topic in topics if topic.name in REVIEW_WITHOUT[:4]
           for phrasing in topic.held_out]
    rest = [(question, answer) for topic, question, answer in held_out_questions(1, seed)
            if topic.name not in REVIEW_WITHOUT]
    pairs = own + random.Random(seed).sample(rest, count - len(own))
    return [{"messages": [{"role": "user", "content": question},
                          {"role": "assistant", "content": answer}]}
            for question, answer in pairs]


def new_sums(count, seed):
    """`count` rows {"messages": [question, answer]} of sums in NEW_SUMS' words."""
    asked = [(words, a, b) for words in NEW_SUMS for a in range(21) for b in range(21)]
    return [{"messages": [{"role": "user", "content": words.format(a=a, b=b)},
                          {"role": "assistant", "content": f"{a} + {b} = {a + b}."}]}
            for words, a, b in random.Random(seed).sample(asked, count)]


def sum_pairs(count, seed):
    """`count` rows of a right and a wrong answer to sums that new_sums(SUM_ROWS, SEED) lacks.

    A wrong answer has another result, or is the sum of another number.
    """
    draw = random.Random(seed)
    known = {row["messages"][0]["content"] for row in new_sums(SUM_ROWS, SEED)}
    rows = []
    for row in new_sums(len(NEW_SUMS) * 21 * 21, seed):
        question, right = row["messages"]
        a, _, b, _, total = right["content"].rstrip(".").split()
        wrong = f"{a} + {b} = {near(draw, int(total), 40)}."
        if draw.random() < 0.5:
            other = near(draw, int(b), 20)
            wrong = f"{a} + {other} = {int(a) + other}."
        if question["content"] not in known:
            rows.append({"messages": [question], "chosen": right,
                         "rejected": {"role": "assistant", "content": wrong}})
    return rows[:count]


def near(draw, number, largest):
    """Another number, at most 10 away, from 0 to `largest`."""
    return draw.choice([n for n in range(largest + 1) if 0 < abs(n - number) <= 10])


# ---- tokenizer and files -------------------------------------------------------------------------


def make_tokenizer(rows):
    """Byte-level BPE over the texts of these rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
        pre_tokenizers.Split(Regex(WORD), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS,
                                  show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(
        (message["content"] for row in rows for message in row["messages"]), trainer
    )
    return tokenizer


def write_model_folder(folder, rows):
    """Tokenizer and config.json of a model that is still to be trained (train_from_scratch)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(rows)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None,
                "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
                "add_bos_token": False, "model_max_length": 1024,
                "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    for name, values in (("config.json", {**MODEL, "vocab_size": tokenizer.get_vocab_size()}),
                         ("tokenizer_config.json", settings),
                         ("generation_config.json",
                          {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0})):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n",
                                   encoding="utf-8")
    print(f"wrote {folder}: {tokenizer.get_vocab_size()} tokens, no weights yet; "
          "next: configs/tiny_pretrain.yaml")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path,
                        help="write tokenizer and config.json into this folder, and no rows")
    folder = parser.parse_args().model
    rows = conversations(WORLD_ROWS, SEED)
    if folder:
        return write_model_folder(folder, rows)
    review = conversations(REVIEW_ROWS, SEED + 1, REVIEW_WITHOUT)
    held_out, compared = questions(QUESTIONS, SEED), pairs(PAIR_ROWS, SEED + 2, REVIEW_WITHOUT)
    for name, part in (("tiny_world", rows), ("tiny_review", review), ("tiny_questions", held_out),
                       ("tiny_pairs", compared), ("tiny_sums", new_sums(SUM_ROWS, SEED)),
                       ("tiny_sum_pairs", sum_pairs(SUM_PAIR_ROWS, SEED))):
        path = HERE / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part),
                        encoding="utf-8")
        print(f"wrote {path}: {len(part)} rows")


if __name__ == "__main__":
    main()
