"""Find the reward model of stages ppo and grpo: an adapter, a second model, or a server.

    judge = build_reward_model(config, base, setup, tokenizer)
    scores, problem = judge.scores(model, [[1, 15, 27], [1, 15, 99]])   # a number for each text

Texts are a prompt and its answer, as they were sampled: the score is the value head's at the last
token, usually the one that ends a turn.

Requires: methods/reward_model.py, checkpoint/value_head.py, checkpoint/adapters.py.
Next: methods/rollouts.py.
Source: the server's messages are those of LLaMA-Factory 0.9.5 (train/ppo, get_rewards_from_server).
"""
import json
import math
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.adapter_config import read_adapter_config
from checkpoint.adapters import layers_of_adapter, load_with_adapters
from checkpoint.load import load_model, quantized_weights
from checkpoint.read_config import read_model_config
from checkpoint.value_head import VALUE_HEAD, read_value_head
from runtime.kernels import use_kernels
from runtime.named_folders import named_folder, named_folders
from runtime.precision import half_dtype, requested_format
from runtime.resize_vocab import trained_on
from text.tokenizer import read_json


def build_reward_model(config, base, setup, tokenizer):
    """An object with scores(model, sequences) -> (numbers, what went wrong), or None.

    Raises ValueError or FileNotFoundError for a folder that holds no reward model of this base.
    """
    from methods.reward_model import SecondRewardModel     # only where it is asked for

    if not config.reward_model:
        return None
    if config.reward_model_type == "api":
        return RewardServer(config.reward_model, config.reward_timeout, tokenizer)
    folder = named_folder(config, "reward_model")
    if config.reward_model_type == "lora":
        return reward_adapter(config, base, setup, folder)
    adapters = named_folders(config, "reward_model_adapters")
    if (folder / "adapter_config.json").is_file():
        its_base = trained_on(folder) or "(its base)"
        raise ValueError(f"reward_model: {folder} is an adapter, and reward_model_type: full names "
                         "a whole model. Set reward_model_type: lora if it was trained on this "
                         f"run's base; else reward_model: {its_base} and reward_model_adapters: "
                         f"{folder}")
    head = stored_head((adapters or [folder])[-1], read_model_config(folder))
    check_vocabulary(folder, base)
    model = load_with_adapters(folder, adapters, half_dtype(config), setup.device,
                               quant_format=reward_format(config))
    use_kernels(model, setup.kernels)
    return SecondRewardModel(model, head.to(setup.device))


def reward_adapter(config, base, setup, folder: Path):
    """reward_model_type: lora. An adapter beside the base of this run."""
    from methods.reward_model import RewardAdapter      # only where it is asked for

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"reward_model: {folder} holds no adapter (adapter_config.json); "
                         "reward_model_type: full is for a whole model")
    known, _ = read_adapter_config(folder)
    if known.pissa:
        raise ValueError(f"reward_model: {folder} was trained with pissa_init, which changed its "
                         "base; train it with pissa_convert: true and name the pissa_converted "
                         "folder, or merge it and set reward_model_type: full")
    trained_beside = trained_on(folder)
    if trained_beside and Path(trained_beside).name != Path(base.name).name:
        print(f"note: the adapter of reward_model was trained on {trained_beside}, and this run "
              f"starts from {base.name}. If these are other weights, its scores mean nothing: "
              "merge it (python merge.py) and set reward_model_type: full")
    head = stored_head(folder, base.model_config)
    layers, in_full = layers_of_adapter(base.folder, folder, setup.device,
                                        requested_format(config))
    if in_full:
        raise ValueError(f"reward_model: {folder} trained {in_full[0]} in full, and this run has "
                         "its own; merge it (python merge.py) and set reward_model_type: full")
    for layer in layers.values():
        layer.requires_grad_(False)
    return RewardAdapter(layers, head.to(setup.device))


def stored_head(folder: Path, model_config):
    """The value head of a folder that stage rm has written.

    Raises FileNotFoundError if it has none, ValueError for the head of stage ppo.
    """
    from methods.reward_model import ValueHead          # only where it is asked for

    head = ValueHead(model_config.hidden_size, dropout=0.0, seed=0,
                     logit_scale=model_config.logit_scale).requires_grad_(False)
    if not read_value_head(folder, head.weights()):
        raise FileNotFoundError(f"reward_model: {folder} has no {VALUE_HEAD}: it is no reward "
                                "model. stage: rm trains one")
    if read_json(folder / "train_config.json").get("stage") == "ppo":
        raise ValueError(f"reward_model: {folder} was written by stage: ppo, whose value head says "
                         "what to expect and scores no answer. Name what stage: rm has trained")
    return head


def check_vocabulary(folder: Path, base):
    """Raises ValueError for a reward model that cannot read the ids of this run."""
    rows = read_model_config(folder).vocab_size
    if rows < base.model_config.vocab_size:
        raise ValueError(
            f"reward_model: {folder} knows {rows:,} token ids and the trained model "
            f"{base.model_config.vocab_size:,}: it has another tokenizer. It must be trained on "
            "the same one (or be asked through a server: reward_model_type: api)")


def reward_format(config):
    """The QuantFormat that reward_model_quantization_bit asks for, or None."""
    return requested_format(replace(config,
                                    quantization_bit=config.reward_model_quantization_bit))


def reward_model_bytes(config, dtype: torch.dtype) -> int:
    """Memory of a second reward model, or of the adapter of one."""
    if not config.reward_model or config.reward_model_type == "api":
        return 0
    folder = named_folder(config, "reward_model")
    adapters = named_folders(config, "reward_model_adapters")
    if config.reward_model_type == "lora":
        adapters = [folder]
    size = sum(path.stat().st_size for adapter in adapters
               for path in adapter.glob("adapter_model.safetensors"))
    if config.reward_model_type == "full":
        model = load_model(folder, skip_weights=True, quant_format=reward_format(config))
        size += sum(p.numel() * dtype.itemsize for p in model.parameters())
        size += sum(weight.nbytes for weight in quantized_weights(model).values())
    return size


class RewardServer:
    """A reward model behind an address: POST {"model", "messages": [texts]} -> {"scores"}."""

    def __init__(self, url: str, timeout: float, tokenizer):
        self.url = url
        self.timeout = timeout
        self.tokenizer = tokenizer

    def scores(self, model, sequences: list[list[int]]) -> tuple[list[float], str]:
        """(the score of each text, NaN where there is none; what went wrong, or "")."""
        texts = [self.tokenizer.decode(ids) for ids in sequences]
        try:
            found = self.ask(texts)
        except (OSError, ValueError) as error:
            return [math.nan] * len(texts), f"{self.url}: {error}"
        bad = sum(map(math.isnan, found))
        problem = f"{self.url}: {bad} of {len(found)} scores are no finite numbers" if bad else ""
        return found, problem

    def ask(self, texts: list[str]) -> list[float]:
        """Raises OSError or ValueError for a server without a usable reply."""
        body = json.dumps({"model": "model", "messages": texts}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                text = reply.read().decode()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise ValueError(f"status {error.code}: {said:.200}") from None
        try:
            scores = json.loads(text)["scores"]
            assert len(scores) == len(texts)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(f"the reply is not {{\"scores\": [{len(texts)} numbers]}} but "
                             f"{text:.200}") from None
        return [as_score(score) for score in scores]


def as_score(value) -> float:
    """A finite number, else NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan
