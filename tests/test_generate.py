"""generate.py against transformers' generate and logits processors, with and without cache."""
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint.load import load_model
from checkpoint.read_config import model_config
from families import FAMILIES
from generate import (
    Sampling,
    TokenCounts,
    common_prefix,
    context_length,
    generate,
    generate_uncached,
    sample,
    shape_logits,
)
from model import CausalLM, KVCache, init_weights
from tests.common import GOLDEN, needs_shared

OURS = [
    path.parent.name
    for path in sorted((GOLDEN / "models").glob("*/config.json"))
    if json.loads(path.read_text())["model_type"]
    in FAMILIES.keys() - {"chatglm", "baichuan", "xverse", "llama4"}
]
TINY = dict(
    model_type="qwen3",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=50,
    max_position_embeddings=64,
    initializer_range=0.2,
)
PROMPT = [3, 14, 15, 9, 26, 5]
MIXED = dict(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3)
WARPERS = [
    dict(temperature=0.7),
    dict(top_k=7),
    dict(top_p=0.6),
    dict(top_p=0.0),
    dict(top_k=9, top_p=0.8),
    dict(top_k=500, top_p=0.999),
    dict(repetition_penalty=1.7),
    dict(repetition_penalty=0.6, top_k=1),
    dict(min_p=0.1),
    dict(temperature=1.5, top_k=30, top_p=0.95, min_p=0.05),
    MIXED,
]


@pytest.fixture
def tiny():
    model = CausalLM(model_config(TINY))
    init_weights(model, torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def cached(model, ids, *args, **kwargs):
    return list(generate(model, ids, KVCache(model.config.num_hidden_layers), *args, **kwargs))


# ---- transformers as the judge -------------------------------------------------------------------


def reference(name):
    """A recorded checkpoint as a transformers model in float32, without its generation settings."""
    transformers = pytest.importorskip("transformers")
    folder = GOLDEN / "models" / name
    if transformers.__version__ < "5" and "rope_parameters" in json.loads(
        (folder / "config.json").read_text()
    ):
        pytest.skip("transformers before 5 passes over rope_parameters, and gets other logits")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    )
    model.generation_config = transformers.GenerationConfig()
    return model


def transformers_tokens(model, ids, stop_ids, count, **settings):
    """The new tokens of transformers' generate."""
    wanted = type(model.generation_config)(
        eos_token_id=stop_ids or None,
        pad_token_id=0,
        max_new_tokens=count,
        **{"do_sample": False, "top_k": 0, **settings},
    )
    ids = torch.tensor([ids])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)[
        0, ids.shape[1] :
    ].tolist()


@needs_shared
@pytest.mark.parametrize("name", OURS)
def test_greedy_equals_transformers(name):
    judge, model = reference(name), load_model(GOLDEN / "models" / name, torch.float32)
    ids = torch.randint(3, model.config.vocab_size, (12,), generator=seeded(1)).tolist()
    for settings in ({}, {"repetition_penalty": 1.4}):
        want = transformers_tokens(judge, ids, [], 24, **settings)
        assert cached(model, ids, (), Sampling(**settings), max_new_tokens=24) == want
        assert (
            list(generate_uncached(model, ids, (), Sampling(**settings), max_new_tokens=24)) == want
        )
    stop = want[7]  # an answer that ends at a stop id, which is yielded too
    want = transformers_tokens(judge, ids, [stop], 24, repetition_penalty=1.4)
    assert want[-1] == stop and len(want) <= 8
    assert cached(model, ids, {stop}, Sampling(repetition_penalty=1.4), max_new_tokens=24) == want


@needs_shared
@pytest.mark.parametrize(
    "settings",
    [dict(temperature=1.0), MIXED, dict(temperature=1.6, top_p=0.95)],
    ids=["plain", "mixed", "hot"],
)
def test_draws_equal_transformers(settings):
    """The same seed draws the same tokens: the same probabilities, and multinomial's own noise."""
    judge, model = reference("llama3"), load_model(GOLDEN / "models" / "llama3", torch.float32)
    settings = {**settings, "do_sample": True}
    ours = cached(model, PROMPT, (), Sampling(**settings), max_new_tokens=30, generator=seeded(7))
    torch.manual_seed(7)
    assert ours == transformers_tokens(judge, PROMPT, [], 30, **settings)
    slow = generate_uncached(
        model, PROMPT, (), Sampling(**settings), max_new_tokens=30, generator=seeded(7)
    )
    assert ours == list(slow)


@pytest.mark.parametrize("settings", WARPERS, ids=str)
def test_probabilities_equal_transformers(settings):
    transformers = pytest.importorskip("transformers")
    logits = 3 * torch.randn(20, 300, generator=seeded(2))
    ids = torch.randint(0, 300, (20, 40), generator=seeded(3))
    chain = transformers.LogitsProcessorList()
    if "repetition_penalty" in settings:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "temperature" in settings:
        chain.append(transformers.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        chain.append(transformers.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        chain.append(transformers.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        chain.append(transformers.MinPLogitsWarper(settings["min_p"]))
    want = chain(ids, logits.clone()).softmax(-1)
    sampling = Sampling(**{**settings, "do_sample": True})
    for row, row_ids, probabilities in zip(logits, ids, want):
        seen = torch.zeros(300, dtype=torch.bool).index_fill_(0, row_ids, True)
        counts = TokenCounts(seen, torch.zeros(300)) if sampling.penalizes else None
        ours = shape_logits(row, sampling, counts).softmax(-1)
        assert torch.equal(ours > 0, probabilities > 0)
        assert torch.allclose(ours, probabilities, atol=1e-6)


def test_penalties_of_openai():
    """logits - count * frequency_penalty - (count > 0) * presence_penalty, of the answer alone."""
    counts = TokenCounts(torch.ones(4, dtype=torch.bool), torch.tensor([0.0, 1.0, 3.0, 0.0]))
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=2.0)
    found = shape_logits(torch.zeros(4), sampling, counts)
    assert found.tolist() == [0, -2.5, -3.5, 0]


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(repetition_penalty=1.5), Sampling(**MIXED),
     Sampling(frequency_penalty=0.3, presence_penalty=-0.2),
     Sampling(**MIXED, min_p=0.02, frequency_penalty=0.5)],
    ids=["greedy", "penalty", "mixed", "of the answer", "all"],
)
@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_uncached(sampling, window):
    fields = {**TINY, "model_type": "mistral", "sliding_window": window}
    model = CausalLM(model_config(fields)).requires_grad_(False).eval()
    init_weights(model, seeded(4))
    fast = cached(model, PROMPT, (), sampling, max_new_tokens=40, generator=seeded(5))
    slow = list(
        generate_uncached(model, PROMPT, (), sampling, max_new_tokens=40, generator=seeded(5))
    )
    assert fast == slow and len(fast) == 40


def test_a_kept_prefix_changes_nothing(tiny):
    """Turns on one cache equal turns on fresh caches; also the same prompt twice."""
    cache, held = KVCache(2), []
    for prompt in (PROMPT, PROMPT + [1, 2, 3], PROMPT[:4] + [8, 8], PROMPT[:4] + [8, 8], [7]):
        cache.crop(common_prefix(held, prompt))
        ours = list(generate(tiny, prompt, cache, max_new_tokens=12))
        held = prompt + ours
        assert ours == cached(tiny, prompt, max_new_tokens=12)
    lengths = []
    tiny.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    cache.crop(0)
    # the last token is not in the cache yet
    first = list(generate(tiny, PROMPT, cache, max_new_tokens=3))
    list(generate(tiny, PROMPT + first + [8, 8], cache, max_new_tokens=2))
    assert lengths == [6, 1, 1, 3, 1]  # each pass read only what was new


def test_common_prefix():
    assert (
        common_prefix([1, 2, 3], [1, 2, 4]) == 2 == common_prefix([1, 2], [1, 2])
        and common_prefix([], [1]) == 0
    )


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws over ten tokens: with 9 degrees of freedom below 27.9 in 999 of
    1000 runs."""
    p = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.04, 0.03, 0.02, 0.01])
    generator, counts = seeded(6), torch.zeros(10)
    for _ in range(20_000):
        counts[sample(p.log(), Sampling(do_sample=True), None, generator)] += 1
    expected = 20_000 * p
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_ties_at_a_threshold_are_kept_together():
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert (shape_logits(logits, Sampling(do_sample=True, top_k=2)) > -torch.inf).tolist() == [
        True
    ] * 4 + [False]


def test_a_step_waits_for_the_device_once(tiny):
    """On a GPU every number that Python reads is a wait.

    A token costs one, and the prompt one more: is it finite?
    """

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            blocking = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
            self.count += func.name().removeprefix("aten::").split(".")[0] in blocking
            return func(*args, **(kwargs or {}))

    with Waits() as waits:
        tokens = cached(
            tiny, PROMPT, {49}, Sampling(**MIXED), max_new_tokens=10, generator=seeded(8)
        )
    assert waits.count == len(tokens) + 1


# ---- ends and limits -----------------------------------------------------------------------------


def test_ends_of_an_answer(tiny):
    free = cached(tiny, PROMPT)
    assert len(PROMPT) + len(free) == 64  # no limit: until the context is full
    assert cached(tiny, PROMPT, max_new_tokens=1000) == free
    assert (
        cached(tiny, PROMPT, max_new_tokens=5) == free[:5]
        and cached(tiny, PROMPT, max_new_tokens=0) == []
    )
    assert cached(tiny, PROMPT, [free[4]]) == free[: free.index(free[4]) + 1]


@pytest.mark.parametrize(
    "scaling, length",
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32}, 96),
    ],
)
def test_context_length_follows_the_rope_scaling(scaling, length):
    assert context_length(model_config({**TINY, "rope_scaling": scaling})) == length


@pytest.mark.parametrize(
    "ids, words",
    [
        ([], "holds no token"),
        ([1] * 64, "64 tokens, and the model reads at most 64"),
        ([1, 50], "token id 50, and the model knows ids 0 to 49"),
    ],
)
def test_prompts_that_are_refused(tiny, ids, words):
    for loop in (lambda: cached(tiny, ids), lambda: list(generate_uncached(tiny, ids))):
        with pytest.raises(ValueError, match=words):
            loop()


def test_overflow_has_a_clear_message(tiny):
    tiny.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite in float32.*infer_dtype"):
        cached(tiny, PROMPT, max_new_tokens=2)


@pytest.mark.parametrize(
    "wrong", [dict(temperature=-1), dict(top_p=1.5), dict(top_k=-2), dict(repetition_penalty=0),
              dict(min_p=2), dict(frequency_penalty=3), dict(presence_penalty=-2.5)]
)
def test_sampling_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) + ".*must be"):
        Sampling(**wrong)


def test_temperature_zero_is_greedy(tiny):
    assert cached(tiny, PROMPT, (), Sampling(do_sample=True, temperature=0)) == cached(tiny, PROMPT)
