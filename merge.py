"""Fold adapters into their base model, W + scale * B A, and write an ordinary checkpoint that needs no adapter.

    python merge.py --config configs/tiny_merge.yaml
    python merge.py --config my_training.yaml export_dir=models/mine        the adapter in its output_dir is taken
    python merge.py my_training.yaml export_dir=models/mine merge_base=original

No model is built. Every tensor passes from the base's files into new ones a block of rows at a time, so a 70B
checkpoint takes no more memory than a small one. The sum is formed in float32 and rounded once, to the base's dtype.
An adapter that was trained on a base in 4 or 8 bits is folded into that base, made dense: what was trained. It has
learnt to make up for the rounding, so the sum with the original weights (merge_base: original) is another model. Where
the yaml names rows, the losses of base, base with adapter, and merged model on some of them are shown then.

Writing takes longest: while one block is written, threads read and sum the next ones, so that a merge takes about as
long as copying the files.

Read before: lora.py (merged_weight), quant.py, checkpoint.py (how adapters are checked and files are streamed).
Papers: LoRA arXiv:2106.09685, section 4.1; QLoRA arXiv:2305.14314.
"""
import math
import os
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path

from config import ignored_keys, load_config, run

if __name__ == "__main__":
    run(lambda argv: load_config(argv, "merge"))                # --help and mistakes do not wait for torch

from attention import Layout, pick_kernel               # before torch: see guard_amdsmi there
import torch
from tqdm import tqdm

from checkpoint import (DTYPES, OF_ADAPTERS, PREFIX, Packed, adapter_tensors, copies_of_base, find_checkpoint,
                        folded_under, load_adapter, load_model, load_with_adapters, new_folder, open_tensors,
                        packed_weights, peft_names, pissa_start, read_adapter_config, read_packed, stored_as,
                        swapped_stacks, tensor_files, warn_of_folded, write_json, write_tensors)
from data import collate, kept_in, load_examples
from families import model_config, read_config_json
from lora import expert_matrices, lora_layers, merged_weight
from losses import cross_entropy_sum
from model import attention_needs
from preference import VALUE_HEAD
from quant import Form, form_asked, in_words, quantise, quantised_weights
from room import available_bytes
from templates import choose_template, fit_tokenizer, name_of, stored_template
from tokenizer import load_tokenizer, read_json
from vocabularies import find_vocabulary

BLOCK = 2**20                   # numbers summed at once: 4 MB in float32
ROWS = 32                       # whose losses are compared, at most
MAX_THREADS = 4                 # more find nothing to do: one writes while the others sum
# how text is read and rendered; training settles all of it, so it comes from one folder, never from two
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja", "chat_template.json", "train_config.json")
# what else the base's folder passes on, unless it matches the second line too
CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
LEFT_BEHIND = ("config.json", "*.index.json", "adapter_*", "trainer_state.json", "*_results.json", *TEXT_FILES)


@dataclass
class Change:
    """What one adapter does to one tensor: adds scale * B A, or, where scale is None, puts its own in the place."""
    file: Path
    key: str                    # the tensor's name in the file; for B and A without .lora_A.weight, .lora_B.weight
    scale: float | None
    has_copy: bool = False      # the file holds the base's tensor too, as peft does it for an adapted head
    has_lengths: bool = False   # and lora_magnitude_vector, what DoRA makes the rows' lengths
    swapped: bool = False       # A and B of a stack have each other's place in the file


@dataclass
class Planned:
    """One tensor of the new checkpoint: which tensor of the base it is made from, by what changes, and its dtype."""
    file: Path
    key: str
    shape: tuple
    dtype: torch.dtype
    changes: list[Change] = field(default_factory=list)
    packed: Packed | None = None        # it is stored in 4 or 8 bits
    form: Form | None = None            # training has quantised it so when it was read


def main(argv):
    config = load_config(argv, "merge")
    if ignored := ignored_keys(config):
        print(f"accepted, no effect here: {', '.join(ignored)}")
    device = "cuda" if config.export_device != "cpu" and torch.cuda.is_available() else "cpu"
    if config.export_device == "cuda" and device == "cpu":
        raise ValueError(f"export_device: cuda, but torch {torch.__version__} sees no GPU; set export_device: cpu")
    base = find_checkpoint(config.model_name_or_path, config.model_revision, config.cache_dir)
    adapters = [find_checkpoint(name, cache_dir=config.cache_dir) for name in adapter_names(config)]
    print(f"base      {base}")
    for adapter in adapters:
        print(f"adapter   {adapter}{other_base(adapter, base, config.model_name_or_path)}")
    if warning := warn_of_folded(adapters):
        print(f"warning   {warning}")
    if not adapters:
        print("adapter   none (adapter_name_or_path is not set): the weights are written as they are")
    form, trained = form_to_merge(config, base, adapters)
    merge_checkpoint(base, adapters, config.export_dir, DTYPES.get(config.infer_dtype), int(config.export_size * 1e9),
                     config.overwrite, config.template, config.force_template, device, form)
    if trained and adapters and (config.dataset or config.eval_dataset):
        compare_losses(config, base, adapters, device)


def merge_checkpoint(base, adapters, export_dir, dtype=None, shard_bytes=5 * 10**9, overwrite=False, template=None,
                     force_template=False, device="cpu", form: Form | None = None):
    """Write base + adapters as a checkpoint of its own into export_dir, which appears complete or not at all.

    base, adapters: folders; adapters are added in their order. dtype: of all weights; None keeps each tensor's.
    shard_bytes: largest weight file. template: the config's, a name or a mapping; None: the one stored with the
    adapters.
    device: where sums are formed. form: what the base is rounded to first, as training on a quantised base has done it.
    Raises ValueError or FileNotFoundError for an adapter that does not fit, damaged
    files, an export_dir that is in use; OSError when the disk is too small.
    """
    base, adapters, began = Path(base), [Path(adapter) for adapter in adapters], time.monotonic()
    target = check_target(Path(export_dir), [base, *adapters], overwrite)
    fields = read_config_json(base)
    plan, untied = plan_tensors(base, adapters, dtype, form)
    total = sum(math.prod(t.shape) * t.dtype.itemsize for t in plan.values())

    template, force_template = stored_template(adapters or [base], template, force_template)
    text_source = next((adapter for adapter in reversed(adapters) if (adapter / "tokenizer.json").is_file()), base)
    print("template  " + (name_of(template) if template else
                          "none is stored or set: the files of the tokenizer stay as they are"))

    with new_folder(target) as work:
        copy_files(base, text_source, work)
        if template and ((text_source / "tokenizer.json").is_file() or find_vocabulary(text_source)):
            fit_text_files(text_source, work, template, force_template, fields)
        with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None) as bar:
            ready = ahead(work_on(plan, device))
            write_tensors(work, {name: (t.shape, t.dtype) for name, t in plan.items()},
                          lambda name: islice(ready, len(list(row_blocks(plan[name].shape)))), shard_bytes, bar.update)
        fields.pop("quantization_config", None)
        if untied:
            fields["tie_word_embeddings"] = False
        if dtype:
            fields |= {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in fields}
        write_json(work / "config.json", fields)
        read_back(work, plan)

    print(f"{export_dir}: {len(list(target.iterdir()))} files, {total / 1e9:.3g} GB of weights, "
          f"{time.monotonic() - began:.1f} s; {len(plan)} tensors read back with the planned names, shapes and dtypes")


# ---- what is merged, and where to -------------------------------------------------------------------------------


def adapter_names(config) -> list[str]:
    """adapter_name_or_path; without it, what training left in output_dir, after those it stands on; or none."""
    if config.adapter_name_or_path or not config.output_dir:
        return config.adapter_name_or_path or []
    if not (Path(config.output_dir) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"output_dir {config.output_dir} holds no adapter (adapter_config.json); train first, "
                                "or name the adapter's folder as adapter_name_or_path")
    return [*folded_under(config.output_dir), config.output_dir]


def other_base(adapter, base, name) -> str:
    """A remark when the adapter names another base. Only that: the same model has many names."""
    trained_on = read_adapter_config(adapter)[1].get("base_model_name_or_path")
    if not trained_on or trained_on in (name, str(base)) or base.resolve() in (
            Path(trained_on).resolve(), (adapter / trained_on).resolve()):
        return ""
    return f"\n          warning: it says it was trained on {trained_on}; it is added all the same if its shapes fit"


def check_target(path, sources, overwrite) -> Path:
    """The absolute path to write to. Raises ValueError when that could cost the user anything."""
    target = path.resolve()
    for source in sources:
        if target in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"export_dir: {path} {'is' if target == source.resolve() else 'holds'} {source}, which is "
                             "read here and stays as it is. Name another folder")
    if target.is_file():
        raise ValueError(f"export_dir: {path} is a file. Name a folder")
    there = sorted(target.iterdir()) if target.is_dir() else []
    if there and not overwrite:
        raise ValueError(f"export_dir: {path} is not empty (it holds {there[0].name}). Name another folder, or set "
                         "overwrite: true")
    if there and (target / "config.json" not in there or any(item.is_dir() for item in there)):
        raise ValueError(f"export_dir: {path} holds other things than a checkpoint, and overwrite: true would remove "
                         "them. Name another folder")
    return target


# ---- the plan, made from names and shapes alone -----------------------------------------------------------------


def plan_tensors(base, adapters, dtype, form: Form | None = None) -> tuple[dict[str, Planned], bool]:
    """{name: Planned} in the base's order, and whether head and embedding, one matrix in the base, become two.

    All names are the files' own. A dtype other than None is for weights; what else the files hold (buffers of older
    tools, the part of a model that reads images) is carried as it is.
    """
    skeleton = load_model(base, skip_weights=True, form=form)   # on the meta device: shapes without numbers
    called, packed = skeleton.config.stored_name, packed_weights(base)
    rounded = quantised_weights(skeleton)
    weights = {called(name): tuple(p.shape) for name, p in (*skeleton.named_parameters(remove_duplicate=False),
                                                            *rounded.items())}
    beside = {key for weight in packed.values() for part, (_, key) in weight.parts.items() if part != "codes"}
    head, embedding = called("lm_head.weight"), called("model.embed_tokens.weight")
    tied, untied, plan, files = skeleton.config.tie_word_embeddings, False, {}, tensor_files(base)
    for name, file in files.items():
        if name in beside:
            continue
        shape, stored = stored_as(file, name)
        if name in packed:
            shape, stored = packed[name].shape, packed[name].form.dtype
        if weights.get(name, shape) != shape:
            raise ValueError(f"{file}: {name} has shape {list(shape)}, config.json makes it {list(weights[name])}")
        plan[name] = Planned(file, name, shape, dtype if dtype and name in weights else stored, packed=packed.get(name))
    for name in () if packed else rounded:
        plan[called(name)].form = form
    if missing := [name for name in weights if name not in plan and not (tied and name == head)]:
        raise ValueError(f"{base}: {len(missing)} tensors that config.json describes are not in the files, such as "
                         f"{', '.join(missing[:4])}. Is the download complete?")
    for adapter in adapters:
        for name, change in [*taken_out(adapter, base), *changes_of(adapter, base).items()]:
            if tied and name in (head, embedding):
                untied = True
                plan.setdefault(head, replace(plan[embedding], changes=[]))
            plan[name].changes.append(change)
    return plan, untied


def taken_out(adapter, base) -> list[tuple[str, Change]]:
    """(tensor name, Change) of what PiSSA took out of the base before the adapter learnt beside it."""
    config = read_adapter_config(adapter)[0]
    if not config.pissa:
        return []
    if not (start := pissa_start(adapter, config)):
        raise ValueError(f"{adapter} is a PiSSA adapter without its folder pissa_init, which merging reads: take that "
                         "in pissa_converted (pissa_convert: true writes it), or merge it with peft")
    return [(name, replace(change, scale=-change.scale, has_lengths=False))
            for name, change in changes_of(start, base).items() if change.scale is not None]


def changes_of(adapter, base) -> dict[str, Change]:
    """{tensor name: Change} of an adapter; attaching it to an empty model finds all that does not fit, by name."""
    skeleton = load_model(base, skip_weights=True)
    load_adapter(skeleton, adapter)
    file, called = adapter / "adapter_model.safetensors", skeleton.config.stored_name
    with open_tensors(file) as tensors:
        copies = copies_of_base(skeleton, tensors)
        swapped = swapped_stacks(skeleton, tensors, read_adapter_config(adapter)[1])
    changes, names = {}, peft_names(skeleton)
    for name, layer in lora_layers(skeleton).items():
        key = names[name]
        changes[called(f"{name}.weight")] = Change(file, key, layer.scale, f"{key}.base_layer.weight" in copies,
                                                   getattr(layer, "lora_magnitude_vector", None) is not None,
                                                   f"{key}.lora_A.weight" in swapped)
    for key in adapter_tensors(skeleton):
        if not key.endswith(OF_ADAPTERS):
            changes[key.removeprefix(PREFIX)] = Change(file, key, None)
    return changes


# ---- the work ---------------------------------------------------------------------------------------------------


def ahead(makers):
    """What the functions of an iterator return, in their order; threads call them a few places before their turn.

    One thread a core, each with one core to itself: torch's own threads would wait for each other and for the writing.
    """
    cores, before, waiting = os.cpu_count() or 1, torch.get_num_threads(), deque()
    try:
        with ThreadPoolExecutor(min(cores, MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for make in makers:
                waiting.append(pool.submit(make))
                if len(waiting) > min(cores, MAX_THREADS):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(before)


def work_on(plan, device):
    """A function for each block of rows of each tensor, in order; called, it returns the finished rows."""
    for name, tensor in plan.items():
        # A is needed by all rows of a matrix, B by those of a stack; else B is read with the rows
        lows = [None if c.scale is None else read(c.file, c.key + ".lora_A.weight", device) for c in tensor.changes]
        highs = [read(c.file, c.key + ".lora_B.weight", device) if len(tensor.shape) == 3 and A is not None else None
                 for c, A in zip(tensor.changes, lows)]
        matrix = dense(tensor, device)
        for rows in row_blocks(tensor.shape):
            yield partial(finished, name, tensor, rows, lows, highs, matrix, device)


def dense(tensor: Planned, device):
    """What training saw in the place of a matrix in 4 or 8 bits; None for other tensors, which are read by rows."""
    if tensor.packed:
        weight = read_packed(tensor.packed, device)
    elif tensor.form:
        original = read(tensor.file, tensor.key, device)
        weight = quantise(original.to(tensor.form.dtype or original.dtype), tensor.form)
    else:
        return None
    return weight.dense(torch.float32 if weight.form.kind == "int8" else None)


def read(file, key, device, rows=...):
    """A tensor in a file, or some of its rows. The file is opened anew: what was read of a mapped file counts as memory
    for as long as it is open."""
    with open_tensors(file) as tensors:
        return tensors.get_slice(key)[rows].to(device)


def finished(name, tensor: Planned, rows, lows, highs, matrix, device):
    """Rows of one tensor of the new checkpoint. lows: of each change A (r, in); highs: for stacks of matrices, B;
    matrix: all of the base's, where it is not in the files."""
    block = read(tensor.file, tensor.key, device, rows) if matrix is None else matrix[rows]
    for change, A, B in zip(tensor.changes, lows, highs):
        if change.scale is None:
            block = read(change.file, change.key, device, rows)
            continue
        if change.has_copy:
            check_copy(block, read(change.file, change.key + ".base_layer.weight", device, rows), name, change.file)
        if B is not None:                                               # rows of one expert: (1, some of in, out)
            expert, part = rows[0].start, rows[1]
            low, high = expert_matrices(A, B, tensor.shape[0], expert)
            A_e, B_e = (low, high) if change.swapped else (high.T, low.T)                       # (r, out), (in, r)
            block = merged_weight(block[0].float(), A_e, B_e[part], change.scale)[None]
        else:
            B = read(change.file, change.key + ".lora_B.weight", device, rows)                  # (rows, r)
            lengths = change.key + ".lora_magnitude_vector"
            lengths = read(change.file, lengths, device, rows) if change.has_lengths else None              # (rows,)
            block = merged_weight(block.float(), A, B, change.scale, lengths)
    if tensor.changes and not block.sum(dtype=torch.float32).isfinite():
        raise ValueError(f"{name}: the sum is not finite: the base or {tensor.changes[-1].file} holds NaN or infinity")
    rounded = block.to(tensor.dtype)
    if tensor.dtype == torch.float16 and block.dtype != torch.float16 and not rounded.isfinite().all():
        raise ValueError(f"{name}: values up to {float(block.abs().max()):.3g} are beyond float16, which ends at "
                         "65,504; set infer_dtype: bfloat16")
    return rounded


def row_blocks(shape):
    """Indices that cut a tensor into blocks of about BLOCK numbers: of rows, in a stack of matrices of one's rows."""
    if len(shape) == 3:
        for expert in range(shape[0]):
            for rows in row_blocks(shape[1:]):
                yield slice(expert, expert + 1), rows
        return
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0] if shape else 1, step):
        yield slice(start, start + step) if shape else ...


def check_copy(block, copy, name, file):
    """Raise unless the copy of the base's tensor in an adapter file is the base's, up to the rounding of 16 bits."""
    if (block.float() - copy.float()).abs().max() > 0.01 * block.abs().max():
        raise ValueError(f"{file}: it was trained on a model whose {name} has other values than this base's")


# ---- adapters that were trained on a base in 4 or 8 bits --------------------------------------------------------


SAID = ("quantization_bit", "quantization_type", "double_quantization", "bf16", "fp16", "stage")


def as_trained(config, adapters) -> tuple[Form | None, torch.dtype | None, str]:
    """(form that quantisation on load gave the base, or None; dtype of the base, None: the file's; stage of training):
    from the config, or from the train_config.json that lies with the last adapter."""
    said = read_json(adapters[-1] / "train_config.json") if adapters else {}
    known = replace(config, **{key: said[key] for key in SAID if key in said and key not in config.given})
    half = torch.bfloat16 if known.bf16 else torch.float16 if known.fp16 else None
    form = form_asked(known)
    return replace(form, dtype=half) if form else None, half, known.stage


def form_to_merge(config, base, adapters) -> tuple[Form | None, str]:
    """(what a 16-bit base is rounded to before the sum, or None; what the base was in training, in words, or "").

    Raises ValueError where the original is wanted and is not there.
    """
    original, packed = config.merge_base == "original", packed_weights(base)
    if packed:
        words = in_words(weight.form for weight in packed.values())
        if original:
            raise ValueError(f"merge_base: original: {base} itself is stored quantised ({words}); name the 16-bit "
                             "checkpoint that it was made from as model_name_or_path, or leave merge_base out")
        print(f"base      {words}: made dense, and so what was trained")
        return None, words
    form = as_trained(config, adapters)[0]
    if form and original:
        print(f"base      as it is, although the adapter learnt beside {form.kind}: another model than was trained")
    elif form:
        print(f"base      rounded to {form.kind} and made dense, as in training (merge_base: original: not)")
    return None if original else form, form.kind if form else ""


def compare_losses(config, base, adapters, device):
    """Print the mean loss a token of base, base with adapters, and merged model on some rows of the yaml."""
    size = sum(file.stat().st_size for file in Path(config.export_dir).glob("*.safetensors"))
    if (free := available_bytes(device)) and size > 0.9 * free:
        return print(f"losses    not compared: the merged model takes more than is free ({device})")
    form, half, stage = as_trained(config, adapters)
    if stage not in ("sft", "pt"):
        return print(f"losses    not compared: that of stage {stage} is none a token")
    tokenizer = load_tokenizer(config.export_dir, config.split_special_tokens)
    shape = model_config(read_config_json(base))
    wanted, force = stored_template(adapters, config.template, config.force_template)
    template, _ = choose_template(wanted, tokenizer, shape.model_type, force)
    fit_tokenizer(template, tokenizer, embedding_rows=shape.vocab_size)
    rows, what = some_rows(replace(config, stage=stage), tokenizer, template)
    models = {"base": lambda: load_model(base, half, device, form=form),
              "with adapter": lambda: load_with_adapters(base, adapters, half, device, form=form),
              "merged": lambda: load_model(config.export_dir, half, device)}
    losses = {name: mean_loss(load(), rows, device) for name, load in models.items()}        # one in memory at a time
    print("losses    " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
          + f" (a token, over {len(rows)} {what})")


def some_rows(config, tokenizer, template):
    """(the first examples held out for evaluation, what they are); without such, training rows."""
    if config.eval_dataset or not config.val_size:          # a split is made of all rows, as in training
        config = replace(config, max_samples=min(config.max_samples or ROWS, ROWS))
    folder = kept_in(config) if config.output_dir or config.tokenized_path else None
    train_set, eval_set, _ = load_examples(config, tokenizer, template, folder=folder, writes=False)
    if eval_set:
        return eval_set[:ROWS], "rows held out"
    return train_set[:ROWS], "training rows; eval_dataset or val_size would hold some out"


@torch.no_grad()
def mean_loss(model, rows, device) -> float:
    """Loss a token that carries one, nats."""
    shape, device = model.config, torch.device(device)
    model.kernel = pick_kernel("auto", device=device, dtype=model.model.embed_tokens.weight.dtype, training=False,
                               **attention_needs(shape)).kernel
    total, tokens = 0.0, 0
    for row in rows:
        batch = collate([row])
        hidden = model(batch.input_ids.to(device), batch.position_ids.to(device), Layout(batch.lengths, device))
        total += float(cross_entropy_sum(hidden[0], model.head_weight(), batch.targets, shape.final_softcap))
        tokens += batch.n_items
    return total / max(tokens, 1)


def copy_files(base, text_source, work):
    """Licence, generation settings and the like from the base's folder; what reads text, and the value head of a reward
    model, from text_source."""
    for file in base.iterdir():
        if (file.is_file() and any(fnmatch(file.name, pattern) for pattern in CARRIED)
                and not any(fnmatch(file.name, pattern) for pattern in LEFT_BEHIND)):
            shutil.copyfile(file, work / file.name)
    for name in (*TEXT_FILES, VALUE_HEAD):
        if (text_source / name).is_file():
            shutil.copyfile(text_source / name, work / name)


def fit_text_files(text_source, work, template, force, fields):
    """Make the tokenizer and generation_config.json end replies as the chat format does.

    Without that, generate() of transformers runs on after the reply of a model whose base knew another end.
    """
    tokenizer = load_tokenizer(text_source)
    shape = model_config(fields)
    chat_format, _ = choose_template(template, tokenizer, shape.model_type, force)
    stops = fit_tokenizer(chat_format, tokenizer, embedding_rows=shape.vocab_size)
    tokenizer.save(work)
    (work / "special_tokens_map.json").unlink(missing_ok=True)      # its older form; the two must not disagree
    generation = read_json(work / "generation_config.json")
    known = generation.get("eos_token_id", fields.get("eos_token_id"))
    known = known if isinstance(known, list) else [] if known is None else [known]
    if new := [stop for stop in stops if stop not in known and stop < shape.vocab_size]:
        write_json(work / "generation_config.json", {**generation, "eos_token_id": known + new})


def read_back(work, plan):
    """Compare names, shapes and dtypes of the written files with the plan, before they get their final name."""
    found = {name: stored_as(file, name) for name, file in tensor_files(work).items()}
    if found != {name: (tensor.shape, tensor.dtype) for name, tensor in plan.items()}:
        raise OSError(f"{work}: what was written does not read back as it was planned. Is the disk in order?")


if __name__ == "__main__":
    run(main)
