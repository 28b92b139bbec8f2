"""fast/many_adapters.py: rows of several adapters in one batch answer as each adapter alone."""
import copy

import pytest
import torch

from fast.batch_decode import Row, RunningBatch, answer_each
from fast.many_adapters import RowAdapters, put_beside, why_not_beside
from lora import LoRAConfig, attach_lora, lora_layers
from tests.test_batch_decode import random_prompts
from tests.tiny_models import tiny, tiny_qwen2


def with_adapter(seed, targets, r):
    """The model with an adapter of random numbers, alone."""
    model = tiny_qwen2()
    config = LoRAConfig(r=r, lora_alpha=12, target_modules=targets)
    attach_lora(model, config, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.3, generator=draw)
    return model.requires_grad_(False).eval()


ALONE = {
    None: tiny_qwen2,
    "all.v1": lambda: with_adapter(1, "all", 4),
    "attention": lambda: with_adapter(2, ["q_proj", "v_proj"], 2),
    "mlp": lambda: with_adapter(3, ["down_proj"], 8),
}


def answers_together(prompts, alone: dict, shared, device="cpu") -> dict[int, list[int]]:
    """{number: tokens}; prompt i asks the model i % 4, of which `alone` has the adapters."""
    adapters = RowAdapters(torch.device(device))
    layers = {name: lora_layers(model) for name, model in alone.items() if name}
    put_beside(shared, layers, adapters)
    batch, names = RunningBatch(shared, 5, adapters=adapters), [*alone]
    waiting = [Row(number=number, prompt=prompt, room=12, adapter=names[number % 4])
               for number, prompt in prompts]
    rows = []
    while waiting or batch.rows:
        new = [waiting.pop(0) for _ in range(min(batch.free, len(waiting), 2))]
        rows += batch.step(new)
    return {row.number: row.answer for row in rows}


def test_rows_of_three_adapters_and_the_base_share_every_pass():
    alone = {name: make() for name, make in ALONE.items()}
    prompts = random_prompts(13)
    answers = answers_together(prompts, alone, tiny_qwen2())
    for index, name in enumerate(alone):
        mine = prompts[index::4]
        want = dict(answer_each(alone[name], mine, limit=lambda length: 12))
        assert {number: answers[number] for number, _ in mine} == want, name
    texts = {tuple(map(tuple, (answers[n] for n in range(i, 13, 4)))) for i in range(4)}
    assert len(texts) == 4                      # they do not answer alike


def test_the_base_is_the_base_bit_for_bit():
    base, shared = tiny_qwen2(), tiny_qwen2()
    adapters = RowAdapters(torch.device("cpu"))
    put_beside(shared, {"all.v1": lora_layers(ALONE["all.v1"]())}, adapters)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    adapters.assign(["all.v1", None], [3, 3])
    want, found = base(ids), shared(ids)
    assert torch.equal(found[1], want[1]) and not torch.equal(found[0], want[0])


@pytest.mark.parametrize("change, reason", [
    (dict(target_modules=["lm_head"]), "lm_head"),
    (dict(target_modules=["q_proj"], use_dora=True), "DoRALinear"),
])
def test_adapters_that_cannot_share_a_pass_say_why(change, reason):
    from checkpoint.adapters import variant_of
    model = tiny(tie_word_embeddings=False)
    config = LoRAConfig(**change)
    attach_lora(model, config, seed=0, **variant_of(config))
    assert reason in why_not_beside(lora_layers(model), [])


def test_weights_trained_whole_cannot_share_a_pass():
    layers = lora_layers(copy.deepcopy(ALONE["mlp"]()))
    assert why_not_beside(layers, []) == ""
    assert "embed_tokens.weight whole" in why_not_beside(layers, ["model.embed_tokens.weight"])
