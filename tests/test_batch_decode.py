"""fast/batch_decode.py: batched answers equal single ones, token for token, in every family."""
import random

import pytest
import torch

from attention import Filled, attend
from fast.batch_decode import (Row, RowCache, RunningBatch, answer_all, answer_each, decode_rows,
                               one_at_a_time, start_sampling)
from generate import Sampling, generate_uncached
from tests.common import some
from tests.test_families import CASES, load, made  # noqa: F401  a fixture
from tests.tiny_models import tiny_qwen2

WAYS = [Sampling(), Sampling(repetition_penalty=1.3), Sampling(do_sample=True, top_k=20),
        Sampling(do_sample=True, top_p=0.8, temperature=1.5, repetition_penalty=1.2)]


def random_prompts(count, vocabulary=50, longest=20, seed=1):
    draw = random.Random(seed)
    return [(number, [draw.randrange(3, vocabulary) for _ in range(draw.randint(1, longest))])
            for number in range(count)]


def twenty(length):
    return 20


@pytest.mark.parametrize("kernel, sampling", [
    ("plain", WAYS[0]), ("sdpa-flash", WAYS[1]),
    ("plain", WAYS[2]), ("sdpa-flash", WAYS[3]), ("sdpa-math", WAYS[3]),
], ids=str)
def test_batched_answers_equal_single_ones(kernel, sampling):
    """13 prompts of 1 to 20 tokens; some answers end early, so that rows join and leave."""
    model, prompts = tiny_qwen2(), random_prompts(13)
    model.kernel = kernel
    want = dict(answer_each(model, prompts, {7, 9}, sampling, limit=twenty, seed=3))
    if sampling.do_sample:
        assert len({len(tokens) for tokens in want.values()}) > 3
    for rows in (1, 3, 8, 20):
        assert (dict(answer_all(model, prompts, rows, {7, 9}, sampling, limit=twenty, seed=3))
                == want), rows


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_those_of_a_forward_pass(temperature):
    """At the temperature, and before top-k and top-p take tokens away."""
    model, prompts = tiny_qwen2(), random_prompts(7)
    sampling = Sampling(do_sample=True, temperature=temperature, top_p=0.9, top_k=30)
    for row in decode_rows(model, prompts, 3, {7, 9}, sampling, limit=twenty, with_logps=True):
        ids = torch.tensor([row.prompt + row.answer])
        with torch.no_grad():
            scores = model.logits(model(ids)[0]).float() / temperature
        logps = scores.log_softmax(-1)[len(row.prompt) - 1:-1]
        want = logps.gather(1, torch.tensor(row.answer)[:, None])[:, 0]
        assert (torch.tensor(row.logps) - want).abs().max() < 1e-5


def test_batched_answers_equal_uncached_ones():
    model, prompts = tiny_qwen2(), random_prompts(5)
    for number, tokens in answer_all(model, prompts, 3, limit=twenty):
        assert tokens == list(generate_uncached(model, prompts[number][1], max_new_tokens=20))


@pytest.mark.parametrize("name", some(CASES))
def test_every_family(made, name):  # noqa: F811
    """Windows, chunks, ALiBi, softcaps, experts and all kinds of positions."""
    model, ids, _ = load(made, name)
    model.eval().requires_grad_(False)
    tokens = ids[0].tolist()
    prompts = [(0, tokens), (1, tokens[:3]), (2, tokens[5:]), (3, tokens[1:9])]
    if one_at_a_time(model):
        pytest.skip("one at a time")
    model.kernel = "plain"
    want = dict(answer_each(model, prompts, limit=lambda n: 12))
    assert dict(answer_all(model, prompts, 3, limit=lambda n: 12)) == want


@pytest.mark.parametrize("how",
                         [{}, {"window": 3}, {"chunk": 4}, {"softcap": 2.0}, {"slopes": True},
                          {"window": 5, "softcap": 1.0, "slopes": True}], ids=str)
@pytest.mark.parametrize("kernel", ["plain", "sdpa-flash"])
def test_attention_of_each_row(kernel, how):
    """A row of a batch attends to the same keys as alone."""
    draw, lengths = torch.Generator().manual_seed(0), [1, 4, 9, 12]
    q, k, v = (torch.randn(4, heads, length, 8, generator=draw)
               for heads, length in ((4, 1), (2, 12), (2, 12)))
    how = {**how, **({"slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])} if "slopes" in how else {})}
    if kernel != "plain" and "softcap" in how:
        pytest.skip("the picker takes another kernel there")
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    got = attend(q, k, v, kernel=kernel, filled=Filled(mask[:, None, None]), **how)
    for row, n in enumerate(lengths):
        want = attend(q[row:row + 1], k[row:row + 1, :, :n], v[row:row + 1, :, :n], kernel="plain",
                      **how)
        assert (got[row] - want[0]).abs().max() < 1e-6, n


def test_the_last_row_takes_the_slot_of_one_that_leaves():
    model = tiny_qwen2()
    cache = RowCache(2, 3, "cpu")
    with torch.no_grad():
        cache.read_prompts(model, [[3, 4, 5], [6, 7], [8, 9, 10, 11]])
        cache.drop(0)
        assert cache.lengths == [4, 2]
        scores = cache.read_tokens(model, [12, 13])
        fresh = RowCache(2, 3, "cpu")
        fresh.read_prompts(model, [[8, 9, 10, 11], [6, 7]])
        # the error of threaded matmuls; another row's scores would be off by about 1
        torch.testing.assert_close(scores, fresh.read_tokens(model, [12, 13]), rtol=0, atol=1e-5)


def test_the_cache_grows(monkeypatch):
    monkeypatch.setattr("fast.batch_decode.GROWTH", 4)
    model, prompts = tiny_qwen2(), random_prompts(6)
    assert dict(answer_all(model, prompts, 3, limit=twenty)) == dict(
        answer_each(model, prompts, limit=twenty)
    )


def test_long_prompts_are_split(monkeypatch):
    monkeypatch.setattr("fast.batch_decode.AT_ONCE", 10)
    model, prompts = tiny_qwen2(), random_prompts(9)
    assert dict(answer_all(model, prompts, 8, limit=twenty)) == dict(
        answer_each(model, prompts, limit=twenty)
    )


def test_maximum_lengths_and_stop_tokens():
    model = tiny_qwen2()
    for rows in (1, 4):
        found = dict(answer_all(model, [(0, [3] * 60), (1, [3, 4])], rows,
                                limit=lambda n: 100 if n > 2 else 5))
        assert [len(found[0]), len(found[1])] == [4, 5]                 # the context has 64 tokens
    stop = found[1][2]
    assert (dict(answer_all(model, [(1, [3, 4])], 2, {stop}, limit=twenty))[1]
            == found[1][:found[1].index(stop) + 1])
    assert list(answer_all(model, [], 4, limit=twenty)) == []


def test_a_prompt_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=r"row 2: the prompt has 64 tokens"):
        list(answer_all(tiny_qwen2(), [(0, [3]), (1, [3] * 64)], 4, limit=twenty))


def test_rope_that_depends_on_the_length_is_found():
    assert not one_at_a_time(tiny_qwen2())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in one_at_a_time(tiny_qwen2(rope_scaling=rope))


# ---- rows that join and leave while others run ---------------------------------------------------


def request(model, number, prompt, room=15, top=0):
    """A row with sampling of its own, which depends on its number."""
    sampling = [Sampling(), Sampling(do_sample=True, temperature=1.4, min_p=0.02),
                Sampling(frequency_penalty=0.7), Sampling(do_sample=True, top_k=9, top_p=0.8,
                                                          presence_penalty=0.5)][number % 4]
    row = Row(number=number, prompt=prompt, room=room, stop_ids={7, 9}, sampling=sampling, top=top)
    start_sampling(row, model, seed=number)
    return row


def alone(model, number, prompt):
    """The row of a batch of one; its answer is compared with generate's elsewhere."""
    batch = RunningBatch(model, 1)
    new = [request(model, number, prompt)]
    while not (ended := batch.step(new)):
        new = []
    return ended[0].answer


def test_rows_with_sampling_of_their_own_join_and_leave_at_any_step():
    """Requests that come at random, some of which are given up, answer as each does alone."""
    model, prompts, draw = tiny_qwen2(), random_prompts(24), random.Random(4)
    batch, waiting, answers, dropped = RunningBatch(model, 6), list(prompts), {}, set()
    while waiting or batch.rows:
        count = draw.randint(0, batch.free)
        new = [request(model, *waiting.pop(0)) for _ in range(min(count, len(waiting)))]
        answers |= {row.number: row.answer for row in batch.step(new)} if new or batch.rows else {}
        if len(batch.rows) > 3 and draw.random() < 0.1:
            dropped.add(batch.rows[1].number)
            batch.drop(1)
    assert len(dropped) > 1 and dropped | set(answers) == set(range(24))
    for number, tokens in answers.items():
        assert tokens == alone(model, *prompts[number]), number


def test_a_sampled_row_alone_is_generate():
    """The twin at the root, with the same generator."""
    model, (_, prompt) = tiny_qwen2(), random_prompts(1)[0]
    row = request(model, 3, prompt)
    want = list(generate_uncached(model, prompt, {7, 9}, row.sampling, max_new_tokens=15,
                                  generator=torch.Generator().manual_seed(3)))
    assert alone(model, 3, prompt) == want


def test_a_row_without_finite_scores_ends_alone():
    model, prompts = tiny_qwen2(), random_prompts(3)
    model.model.embed_tokens.weight.data[49] = float("nan")
    prompts = [(number, [token for token in prompt if token != 49] or [3])
               for number, prompt in prompts]
    batch = RunningBatch(model, 4)
    rows = [request(model, *pair) for pair in [*prompts, (3, [5, 49, 6])]]
    ended = batch.step(rows)
    assert [row.number for row in ended if row.error] == [3] and not rows[3].answer
    assert "not finite" in str(rows[3].error)
    while batch.rows:
        batch.step([])
    for number, prompt in prompts:
        assert rows[number].answer == alone(model, number, prompt)


def test_a_prompt_that_the_device_cannot_hold_ends_alone(monkeypatch):
    model, prompts = tiny_qwen2(), random_prompts(2)
    batch = RunningBatch(model, 4)
    first = request(model, *prompts[0])
    batch.step([first])
    honest = batch.cache.read_prompts
    monkeypatch.setattr(batch.cache, "read_prompts",
                        lambda *args: (honest(*args), 1 / torch.empty(0).view(1))[0])
    second = request(model, *prompts[1])
    assert second in batch.step([second]) and isinstance(second.error, RuntimeError)
    monkeypatch.undo()
    third = request(model, *prompts[1])
    batch.step([third])
    while batch.rows:
        batch.step([])
    assert first.answer == alone(model, *prompts[0])
    assert third.answer == alone(model, *prompts[1])


def test_log_probabilities_of_the_likeliest_tokens():
    """Of the model itself, whatever the sampling; the chosen token comes first."""
    model, (_, prompt) = tiny_qwen2(), random_prompts(1)[0]
    batch, row = RunningBatch(model, 1), request(model, 3, prompt, room=6, top=4)
    new = [row]
    while not batch.step(new):
        new = []
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([row.prompt + row.answer]))[0]).float()
    logps = logits.log_softmax(-1)[len(prompt) - 1:-1]
    for place, ((chosen, logp), *best) in enumerate(row.top_logps):
        assert chosen == row.answer[place]
        assert abs(logp - float(logps[place, chosen])) < 1e-5
        assert [token for token, _ in best] == logps[place].topk(4).indices.tolist()
