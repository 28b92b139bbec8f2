"""`ask`: the same questions before the first step and after the last, side by side.

    before = answers_to(model, config, text, precision)
    print_before_after(config.ask, before, after)

Requires: generate.py, templates.py.
Next: runtime/run.py.
"""
from data import settings_of
from errors import printable
from generate import generate
from model import KVCache
from templates import encode_prompt

LONGEST = 64                # tokens of an answer


def answers_to(model, config, text, precision) -> list[str]:
    """The model's likeliest answers to config.ask. text: of text/load_text.py."""
    was_training = model.training
    model.eval()
    answers = []
    for question in config.ask:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        prompt, _ = encode_prompt(text.template, text.tokenizer, turns,
                                  settings=settings_of(config))
        cache = KVCache(model.config.num_hidden_layers)
        with precision.autocast():
            ids = list(generate(model, prompt, cache, text.stop_ids, max_new_tokens=LONGEST))
        answers.append(text.tokenizer.decode(ids, skip_special_tokens=True).strip())
    model.train(was_training)
    return answers


def print_before_after(questions: list[str], before: list[str], after: list[str]):
    """Print each question with both answers, on one line each."""
    for question, old, new in zip(questions, before, after):
        print(f"\n{printable(question)}")
        for name, answer in (("before", old), ("after", new)):
            print(f"  {name:8}{printable(' '.join(answer.split()))}")
