"""Train some layers of a model in full, and freeze the rest (finetuning_type: freeze).

Requires: lora.py.
Next: runtime/build.py.
"""
import re
from collections.abc import Callable

from torch import nn

from lora import check_names, own_name


def unfreeze(model: nn.Module, layers: int, modules: list, extra: list,
             stored_name: Callable = own_name) -> nn.Module:
    """Freeze the model but for some of its layers (finetuning_type: freeze). In place.

    layers: how many of the last ones are trained; negative: of the first ones. modules: what is
    trained in them, first name parts within a layer, or all. extra: every other weight whose name
    contains one of these is trained, so that `norm` includes the norms of all layers, as in
    LLaMA-Factory 0.9.5. Raises ValueError for a name that does not exist.
    """
    in_layer = re.compile(r".*?\.(\d+)\.([^.]+)(\..*)?")            # (layer, first part in it)
    names = {name: stored_name(name) for name, _ in model.named_parameters()}
    found = {name: match for name, stored in names.items() if (match := in_layer.fullmatch(stored))}
    outside = {stored.split(".")[-2] for name, stored in names.items() if name not in found}
    check_names("freeze_trainable_modules", set(modules) - {"all"},
                 {match[2] for match in found.values()})
    check_names("freeze_extra_modules", extra, outside)

    count = 1 + max(int(match[1]) for match in found.values())
    chosen = range(max(0, count - layers), count) if layers > 0 else range(min(-layers, count))
    for name, p in model.named_parameters():
        match = found.get(name)
        in_chosen = match is not None and int(match[1]) in chosen
        wanted = in_chosen and ("all" in modules or match[2] in modules)
        p.requires_grad_(wanted or any(part in names[name] for part in extra))
    return model
