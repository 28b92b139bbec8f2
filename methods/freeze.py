"""Train some layers of a model in full, and freeze the rest (finetuning_type: freeze).

Requires: lora.py.
Next: runtime/build.py.
Paper: LLaMA-Pro arXiv:2401.02415.
"""
import re
from collections.abc import Callable

from torch import nn

from lora import check_names, find_targets, same_name


def unfreeze_as_configured(model: nn.Module, config) -> nn.Module:
    """unfreeze with the keys of a config; the names are the checkpoint's."""
    return unfreeze(model, config.freeze_trainable_layers, config.freeze_trainable_modules,
                    config.freeze_extra_modules or [], model.config.stored_name,
                    expanded=config.use_llama_pro)


def unfreeze(model: nn.Module, layers: int, modules: list, extra: list,
             stored_name: Callable = same_name, expanded: bool = False) -> nn.Module:
    """Freeze the model but for some of its layers (finetuning_type: freeze). In place.

    layers: how many of the last ones are trained; negative: of the first ones. expanded: instead
    the layers that LLaMA-Pro has inserted, see expanded_layers. modules: what is trained in them,
    first name parts within a layer, or all. extra: every other weight whose name contains one of
    these is trained, so that `norm` includes the norms of all layers, as in LLaMA-Factory 0.9.5.
    Raises ValueError for a name that does not exist.
    """
    in_layer = re.compile(r".*?\.(\d+)\.([^.]+)(\..*)?")            # (layer, first part in it)
    names = {name: stored_name(name) for name, _ in model.named_parameters()}
    found = {name: match for name, stored in names.items() if (match := in_layer.fullmatch(stored))}
    outside = {stored.split(".")[-2] for name, stored in names.items() if name not in found}
    check_names("freeze_trainable_modules", set(modules) - {"all"},
                 {match[2] for match in found.values()})
    check_names("freeze_extra_modules", extra, outside)

    count = 1 + max(int(match[1]) for match in found.values())
    if expanded:
        chosen = expanded_layers(count, layers)
    elif layers > 0:
        chosen = range(max(0, count - layers), count)
    else:
        chosen = range(min(-layers, count))
    for name, p in model.named_parameters():
        match = found.get(name)
        in_chosen = match is not None and int(match[1]) in chosen
        wanted = in_chosen and ("all" in modules or match[2] in modules)
        p.requires_grad_(wanted or any(part in names[name] for part in extra))
    return model


def expanded_layers(count: int, inserted: int) -> range:
    """Numbers of the `inserted` layers among `count`: the last one of each group of equal size.

    So block expansion places its copies (arXiv:2401.02415, sec. 3.1). Raises ValueError where the
    groups would differ in size.
    """
    if inserted < 1 or count % inserted:
        raise ValueError(f"use_llama_pro: freeze_trainable_layers: {inserted} does not divide the "
                         f"model's {count} layers; set it to the number of inserted blocks")
    stride = count // inserted
    return range(stride - 1, count, stride)


def expanded_targets(model: nn.Module, target_modules, inserted: int) -> list[str]:
    """Names, as stored, of the layers that target_modules selects in the inserted blocks."""
    stored_name = model.config.stored_name
    chosen = expanded_layers(model.config.num_hidden_layers, inserted)
    names = find_targets(model, target_modules, stored_name)
    return [stored_name(name) for name in names
            if (layer := re.match(r"model\.layers\.(\d+)\.", name)) and int(layer[1]) in chosen]
