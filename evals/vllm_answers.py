"""infer_backend: vllm. The answers of eval.py by vLLM, where it is installed.

    check_vllm(config)                          one sentence where it cannot be
    generate_rows = answers_of_vllm(side)       for evals/predictions.predict

Prompts are the ids of our own templates, stop ids and sampling our own too, so the rows are those
of the program's own answers; the weights are read by vLLM from the same folders.

Requires: evals/predictions.py.
Next: eval.py.
Source: vLLM's LLM, SamplingParams and LoRARequest, as LLaMA-Factory's script vllm_infer uses them.
"""
import importlib.util
from collections.abc import Callable, Iterator

from checkpoint.adapter_config import read_adapter_config
from settings.config import Config


def check_vllm(config: Config):
    """Raise ValueError where vLLM cannot answer with this config."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"{config.source}: infer_backend: vllm: the package vllm is not installed "
                         "(pip install vllm, on a machine with its GPU). Without the key the "
                         "program answers by itself, with the same files as result")
    if config.quantization_bit:
        raise ValueError(f"{config.source}: infer_backend: vllm reads the base as it is stored; "
                         "leave quantization_bit out")


def answers_of_vllm(side) -> Callable:
    """A function with the arguments and the result of evals.predictions.generate_answers.

    side: the model that answers. Raises ValueError for several adapters upon each other.
    """
    if len(side.adapters) > 1:
        raise ValueError(f"infer_backend: vllm takes one adapter, and {side.name} has "
                         f"{len(side.adapters)}; merge all but the last (python merge.py)")

    def generate_rows(config, model, waiting, stop_ids, sampling) -> Iterator:
        if not waiting:
            return
        from vllm import LLM                        # an optional package

        limits = [config.max_new_tokens or max(1, config.max_length - len(ids))
                  for _, ids in waiting]
        longest = max(len(ids) + limit for (_, ids), limit in zip(waiting, limits))
        options = {"model": str(side.base), "max_model_len": longest, "seed": config.seed,
                   "dtype": config.infer_dtype, "enable_lora": bool(side.adapters),
                   "skip_tokenizer_init": True}
        if side.adapters:
            options["max_lora_rank"] = rank_for_vllm(side.adapters[0])
        engine = LLM(**options)
        print("  answers   by vLLM")
        found = engine.generate(
            [{"prompt_token_ids": ids} for _, ids in waiting],
            [params_of(config, sampling, stop_ids, number, limit)
             for (number, _), limit in zip(waiting, limits)],
            lora_request=request_of(side))
        for (number, _), result in zip(waiting, found):
            yield number, list(result.outputs[0].token_ids)

    return generate_rows


def params_of(config: Config, sampling, stop_ids: set[int], number: int, limit: int):
    """vLLM's SamplingParams of one row."""
    from vllm import SamplingParams                 # an optional package

    return SamplingParams(
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_p=sampling.top_p or 1e-6, top_k=sampling.top_k or -1,
        repetition_penalty=sampling.repetition_penalty, max_tokens=limit,
        stop_token_ids=sorted(stop_ids), seed=2**20 * config.seed + number, detokenize=False)


def request_of(side):
    """vLLM's LoRARequest of the side's adapter, or None."""
    if not side.adapters:
        return None
    from vllm.lora.request import LoRARequest       # an optional package

    return LoRARequest("adapter", 1, str(side.adapters[0]))


def rank_for_vllm(folder) -> int:
    """The lowest rank that vLLM knows and the adapter fits into."""
    config, _ = read_adapter_config(folder)
    r = max([config.r, *config.rank_pattern.values()])
    return next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512, r) if rank >= r)
