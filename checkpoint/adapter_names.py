"""Names of an adapter's tensors: the module names of transformers, as PEFT and servers expect.

The decoder of a model that reads images has other names in transformers 5 than in the checkpoint's
files. All other code here uses the names of the files:

    language_model.model.layers.0.self_attn.q_proj          Gemma 3, Mistral Small 3: in the files
    model.language_model.layers.0.self_attn.q_proj          in transformers, and so in adapters

families.py has the prefixes that change. Adapters with the files' names, which earlier releases
wrote, are read too.

Requires: families.py.
Next: checkpoint/adapters.py.
Tested with peft 0.21.2 and transformers 5.24. Sources: the code of vLLM 0.33 and SGLang 0.5.23.
"""
from collections.abc import Iterable

from families import ModelConfig

PREFIX = "base_model.model."        # PEFT's, in front of every name
LISTS = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save")
PATTERNS = ("rank_pattern", "alpha_pattern")


def module_name(name: str, config: ModelConfig) -> str:
    """The name in transformers of a module or tensor that is `name` in the files."""
    return with_other_prefix(name, config.in_transformers)


def name_in_files(name: str, config: ModelConfig) -> str:
    """The name in the files of an adapter's module or tensor; names of the files stay unchanged."""
    return with_other_prefix(name, {new: old for old, new in config.in_transformers.items()})


def with_other_prefix(name: str, prefixes: dict[str, str]) -> str:
    """The name with its prefix replaced by {old: new}; PEFT's prefix stays in front."""
    rest = name.removeprefix(PREFIX)
    front = PREFIX if rest != name else ""
    for old, new in prefixes.items():
        if rest.startswith(old):
            return front + new + rest.removeprefix(old)
    return name


def fields_with_names(fields: dict, rename) -> dict:
    """The fields of adapter_config.json with rename applied to layer names.

    Regular expressions stay as they are.
    """
    changed = dict(fields)
    for key in LISTS:
        if isinstance(fields.get(key), list):
            changed[key] = [rename(name) for name in fields[key]]
    for key in PATTERNS:
        if fields.get(key):
            changed[key] = {rename(name): value for name, value in fields[key].items()}
    return changed


class AdapterTensors:
    """An open adapter file that is read by the names of the checkpoint's files."""

    def __init__(self, tensors, config: ModelConfig):
        self.tensors = tensors
        self.places = {name_in_files(key, config): key for key in tensors.keys()}

    def keys(self) -> Iterable[str]:
        return self.places.keys()

    def layer_in_file(self, layer: str) -> str:
        """The file's own name of an adapted layer."""
        for part in (".lora_A.weight", ".oft_R.weight"):
            if layer + part in self.places:
                return self.places[layer + part].removesuffix(part)
        return layer

    def get_tensor(self, name: str):
        return self.tensors.get_tensor(self.places[name])

    def get_slice(self, name: str):
        return self.tensors.get_slice(self.places[name])
