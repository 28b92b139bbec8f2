"""Merge adapters into their base model, W + scale * B A, and write an ordinary checkpoint.

    python merge.py --config configs/tiny_merge.yaml
    python merge.py my_training.yaml export_dir=models/mine             the adapter in output_dir
    python merge.py my_training.yaml export_dir=models/mine merge_base=original
    python merge.py model_name_or_path=models/mine export_dir=models/mine-4bit \
        export_quantization_bit=4 export_quantization_dataset=texts.jsonl       by GPTQ, no adapter

To merge, no model is built. Tensors are streamed from the base's files into new ones in blocks of
rows, so a 70B checkpoint takes no more memory than a small one. The sum is formed in float32 and
rounded once, to the base's dtype. While one block is written, threads read, sum and round the next
ones (checkpoint/run_ahead.py), so that a merge takes about as long as copying the files.

An adapter that was trained on a base in 4 or 8 bits is merged into that base, dequantized: this is
the model that was trained. Such an adapter has learned to compensate for the rounding, so the sum
with the original weights (merge_base: original) is a different model. If the yaml names a dataset,
the losses of base, base with adapter, and merged model on some of its rows are printed.

Requires: lora.py (merged_weight), exporting/merge_plan.py, checkpoint/files.py (streaming),
exporting/gptq_export.py (export_quantization_bit).
Next: eval.py.

LoRA arXiv:2106.09685, section 4.1; QLoRA arXiv:2305.14314.
"""
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from errors import run_script
from settings.config import Config
from settings.load_config import ignored_keys, load_config

if __name__ == "__main__":
    run_script(lambda argv: load_config(argv, "merge"))  # --help and mistakes do not wait for torch

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")      # pages of 2 MiB would add to the peak
import runtime.device  # noqa: F401                     # before torch: see guard_amdsmi there
import torch
from tqdm import tqdm

from checkpoint.adapters import folded_under, warn_of_folded
from checkpoint.files import DTYPES, find_checkpoint, new_folder, open_tensors
from checkpoint.load import formats_in_words, packed_weights, stays_quantized
from checkpoint.read_config import read_config_json
from checkpoint.run_ahead import run_ahead
from evals.compare import compare_losses
from exporting.check_adapter import check_adapter
from exporting.export import Export, check_stored
from exporting.export_formats import open_export
from exporting.merge_plan import Change, Planned, plan_tensors
from lora import expert_matrices, merged_weight
from runtime.adapter_export import export_adapter
from runtime.export_card import finish_folder
from runtime.finished import as_trained, scale_rope_as_trained
from runtime.merge_folder import check_target, copy_files, fit_text_files
from runtime.named_folders import named_folder, named_folders
from runtime.resize_vocab import resized_beside, trained_on
from text.data_files import find_sources
from text.vocabularies import find_vocabulary
from text.written_formats import name_of, stored_template

BLOCK = 2**20                   # numbers summed at once: 4 MB in float32


def main(argv):
    config = load_config(argv, "merge")
    if ignored := ignored_keys(config) + idle_gptq_keys(config):
        print(f"accepted, no effect here: {', '.join(ignored)}")
    device = pick_merge_device(config.export_device)

    # ---- base and adapters
    base = named_folder(config, "model_name_or_path")
    if config.check_adapter:
        folder = named_folder(config, "check_adapter")
        return check_adapter(config, resized_beside([folder]) or base, folder)
    adapters = adapter_folders(config)
    base = resized_beside(adapters) or base
    print_sources(config, base, adapters)
    for note in scale_rope_as_trained(config, base, adapters):
        print(f"note      {note}")
    if config.check:
        return check_folder(config, base, adapters, device)
    if config.export_format == "peft":
        export_adapter(config, base, adapters)
        return finish_folder(config, base, adapters, {})
    check_target(Path(config.export_dir), [base, *adapters], config.overwrite)
    export = open_export(config, base, adapters, device)
    quant_format, description = format_to_merge(config, base, adapters)
    rounded = bool(description and adapters) or type(export) is not Export
    compares = rounded and bool(config.dataset or config.eval_dataset)
    if compares and not config.tokenized_path:      # a misspelled name ends here, not hours later
        find_sources([*(config.dataset or ()), *(config.eval_dataset or ())], config, notes=[])

    # ---- merge, then compare losses
    merge_checkpoint(
        base, adapters, config.export_dir,
        dtype=DTYPES.get(config.infer_dtype),
        shard_bytes=int(config.export_size * 1e9),
        overwrite=config.overwrite,
        template=config.template,
        force_template=config.force_template,
        device=device,
        quant_format=quant_format,
        export=export)
    losses = {}
    if compares:
        losses = compare_losses(config, base, adapters, device, config.export_dir)
    finish_folder(config, base, adapters, losses)


def check_folder(config: Config, base: Path, adapters: list[Path], device: str):
    """--check DIR: the losses of an exported folder beside those of its base and adapters."""
    if not (config.dataset or config.eval_dataset):
        raise ValueError("check: no rows to compare on; name some as eval_dataset or dataset")
    folder = named_folder(config, "check")
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise ValueError(f"check: {folder} holds neither config.json nor a .gguf file; name a "
                         "folder that merge.py has written")
    compare_losses(config, base, adapters, device, str(folder))


def merge_checkpoint(base, adapters, export_dir, dtype: torch.dtype | None = None,
                     shard_bytes: int = 5 * 10**9, overwrite: bool = False, template=None,
                     force_template: bool = False, device="cpu", quant_format=None,
                     export: Export | None = None):
    """Write base + adapters as a checkpoint into export_dir, which appears complete or not at all.

    base, adapters: folders; adapters are added in order. dtype: of all weights; None keeps each
    tensor's. shard_bytes: largest weight file. template: as in the config, a name or a mapping;
    None: the one stored with the adapters. device: where sums are formed. quant_format: the
    QuantFormat that training quantized the base to on load. export: writes another format.

    Raises ValueError or FileNotFoundError for an adapter that does not fit, damaged files, an
    export_dir that is in use; OSError when the disk is too small.
    """
    start_time = time.monotonic()
    base = Path(base)
    adapters = [Path(adapter) for adapter in adapters]
    target = check_target(Path(export_dir), [base, *adapters], overwrite)
    fields = read_config_json(base)
    export = export or Export()
    dtype = dtype or export.default_dtype
    export.set_plan(*plan_tensors(base, adapters, dtype, quant_format), dtype)

    template, force_template = stored_template(adapters or [base], template, force_template)
    text_source = base
    for adapter in adapters:
        if (adapter / "tokenizer.json").is_file():
            text_source = adapter                       # of the last adapter that has a tokenizer
    name = name_of(template) if template else "none set or stored: the tokenizer's files are kept"
    print(f"template  {name}")

    earlier = {item.name for item in target.iterdir()} if target.is_dir() else set()
    with new_folder(target, replaceable=earlier) as work:
        check_target(target, [base, *adapters], overwrite)      # another merge has ended since?
        copy_files(base, text_source, work)
        has_tokenizer = (text_source / "tokenizer.json").is_file() or find_vocabulary(text_source)
        if template and has_tokenizer:
            fit_text_files(text_source, work, template, force_template, fields)
        total = export.nbytes()
        with tqdm(total=total, unit="B", unit_scale=True, desc=export.verb, disable=None) as bar:
            write_export(work, export, device, shard_bytes, bar.update)
        export.finish(work, fields)
        if report := export.report():
            print(report)

    files = len(list(target.iterdir()))
    seconds = time.monotonic() - start_time
    print(f"{export_dir}: {files} files, {total / 1e9:.3g} GB of weights, {seconds:.1f} s; "
          f"{len(export.tensors)} tensors read back with the planned names, shapes and dtypes")


# ---- sources and target -----------------------------------------------------------------------


def idle_gptq_keys(config: Config) -> list[str]:
    """Keys of the calibration that were set without export_quantization_bit."""
    if config.export_quantization_bit:
        return []
    return [name for name in config.given if name.startswith("export_quantization_")]


def pick_merge_device(export_device: str) -> str:
    """"cuda" or "cpu". Raises ValueError for cuda without a GPU."""
    if export_device != "cpu" and torch.cuda.is_available():
        return "cuda"
    if export_device == "cuda":
        raise ValueError(f"export_device: cuda, but torch {torch.__version__} sees no GPU; set "
                         "export_device: cpu")
    return "cpu"


def adapter_folders(config: Config) -> list[Path]:
    """adapter_name_or_path, else the adapter in output_dir after those merged before it, or []."""
    if config.adapter_name_or_path or not config.output_dir:
        return named_folders(config, "adapter_name_or_path")
    if not (Path(config.output_dir) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"output_dir {config.output_dir} holds no adapter (adapter_config.json); train first, "
            "or name the adapter's folder as adapter_name_or_path")
    return [find_checkpoint(name, cache_dir=config.cache_dir)
            for name in (*folded_under(config.output_dir), config.output_dir)]


def print_sources(config: Config, base: Path, adapters: list[Path]):
    """Print the folders of base and adapters, with warnings."""
    print(f"base      {base}")
    for adapter in adapters:
        print(f"adapter   {adapter}")
        if other := other_base(adapter, base, config.model_name_or_path):
            print(f"          warning: it says it was trained on {other}; it is merged "
                  "anyway if its shapes fit")
    if warning := warn_of_folded(adapters):
        print(f"warning   {warning}")
    if not adapters:
        done = "quantized" if config.export_quantization_bit else "copied"
        if config.check:
            done = "compared"
        elif config.export_format:
            done = f"written as {config.export_format}"
        print(f"adapter   none (adapter_name_or_path is not set): the weights are {done}")


def other_base(adapter: Path, base: Path, name: str) -> str | None:
    """The base an adapter names, if it is another one. No error: a model may have several names."""
    original = trained_on(adapter)
    if not original or original in (name, str(base)):
        return None
    candidates = (Path(original).resolve(), (adapter / original).resolve())
    return None if base.resolve() in candidates else original


# ---- the work ---------------------------------------------------------------------------------


def write_export(folder: Path, export: Export, device, shard_bytes: int,
                 progress: Callable[[int], object]):
    """Write the weight files of an export, from the merged rows of its sources."""
    tensors = ((name, export.plan[name]) for name in export.sources())
    makers = block_makers(tensors, device, export.encode)
    blocks = (make() for make in makers) if export.computes else run_ahead(makers)

    def read(name):
        return islice(blocks, len(list(row_blocks(export.plan[name].shape))))

    export.write(folder, read, shard_bytes, progress)


def block_makers(tensors: Iterable[tuple[str, Planned]], device,
                 encode: Callable) -> Iterator[Callable]:
    """A function for each block of rows of each tensor, in order: encode(name, merged rows)."""
    for name, tensor in tensors:
        # A, or OFT's rotation, is needed by all rows of a matrix, B by all rows of a stack; else B
        # is read by rows
        lora_A = []
        lora_B = []
        for change in tensor.changes:
            A = B = None
            if change.kind == "oft":
                A = rotation_of(change, device)
            elif change.kind == "lora":
                A = change.read("lora_A", device)
                if len(tensor.shape) == 3:
                    B = change.read("lora_B", device)
            lora_A.append(A)
            lora_B.append(B)
        matrix = dequantized_base(tensor, device)
        for rows in row_blocks(tensor.shape):
            merged = partial(merged_rows, name, tensor, rows, lora_A, lora_B, matrix, device)
            yield lambda name=name, merged=merged: encode(name, merged())


def rotation_of(change: Change, device) -> torch.Tensor:
    """The rotation R (blocks, size, size) of an OFT adapter's layer."""
    numbers = read_tensor(change.file, change.key + ".oft_R.weight", device)
    return change.rotation.matrices_from(numbers)


def dequantized_base(tensor: Planned, device) -> torch.Tensor | None:
    """The matrix of a weight in 4 or 8 bits, as in training; None for others, read by rows."""
    part = tensor.packed
    if part and stays_quantized(part):
        weight = part.read(device)
    elif part and not tensor.quant_format:
        return part.read(device, torch.float32)
    elif tensor.quant_format:
        original = part.read(device) if part else read_tensor(tensor.file, tensor.key, device)
        dtype = tensor.quant_format.dtype or original.dtype
        weight = tensor.quant_format.quantize(original.to(dtype))
    else:
        return None
    return weight.dequantize(torch.float32 if weight.quant_format.kind == "int8" else None)


def read_tensor(file: Path, key: str, device, rows=...) -> torch.Tensor:
    """A tensor of a file, or some of its rows.

    The file is opened each time: pages of a mapped file count as memory as long as it is open.
    """
    with open_tensors(file) as tensors:
        return tensors.get_slice(key)[rows].to(device)


def merged_rows(name: str, tensor: Planned, rows, lora_A: list, lora_B: list,
                matrix: torch.Tensor | None, device) -> torch.Tensor:
    """Rows of one tensor of the new checkpoint.

    lora_A: (r, in), or OFT's rotation, for each change. lora_B: for each change of a stack of
    matrices. matrix: the base's, if it is not stored by rows. Raises ValueError for sums that are
    not finite.
    """
    if matrix is None:
        block = read_tensor(tensor.file, tensor.key, device, rows)
    else:
        block = matrix[rows]
    for change, A, B in zip(tensor.changes, lora_A, lora_B):
        if change.kind == "new":
            block = read_tensor(change.file, change.key, device, rows)
            continue
        if change.has_copy:
            copy = read_tensor(change.file, change.key + ".base_layer.weight", device, rows)
            check_copy(block, copy, name, change.file)
        if B is not None:
            block = merge_expert(block, change, A, B, tensor.shape[0], rows)
        elif change.kind == "oft":
            from methods.oft import rotated_weight              # only where it is asked for

            block = rotated_weight(block.float(), A)
        else:
            block = merge_matrix(block, change, A, rows, device)

    if tensor.changes and not block.sum(dtype=torch.float32).isfinite():
        raise ValueError(f"{name}: the sum is not finite: the base or {tensor.changes[-1].file} "
                         "holds NaN or infinity")
    rounded = block.to(tensor.dtype)
    if tensor.dtype == torch.float16 and block.dtype != torch.float16:
        check_stored(name, block, rounded, "set infer_dtype: bfloat16")
    return rounded


def merge_matrix(block: torch.Tensor, change: Change, A: torch.Tensor, rows,
                 device) -> torch.Tensor:
    """Rows of W + scale * B A, (rows, in) float32, with DoRA's magnitudes if there are any."""
    B = change.read("lora_B", device, rows)                                     # (rows, r)
    if not change.has_magnitude:
        return merged_weight(block.float(), A, B, change.scale)
    from methods.lora_variants import merged_dora_weight       # only where it is asked for

    key = change.key + ".lora_magnitude_vector"
    magnitude = read_tensor(change.file, key, device, rows)                             # (rows,)
    return merged_dora_weight(block.float(), A, B, change.scale, magnitude)


def merge_expert(block: torch.Tensor, change: Change, A: torch.Tensor, B: torch.Tensor,
                 experts: int, rows: tuple[slice, slice]) -> torch.Tensor:
    """merge_matrix for rows of one expert's matrix, in the order of its stack: (1, rows, …)."""
    expert, part = rows
    low, high = expert_matrices(A, B, experts, expert.start)
    if change.swapped == change.out_first:
        low, high = high.T, low.T                                               # (r, out), (in, r)
    return merged_weight(block[0].float(), low, high[part], change.scale)[None]


def row_blocks(shape: tuple) -> Iterator:
    """Indices that split a tensor into blocks of rows of about BLOCK numbers.

    For a stack of matrices: (slice of one expert, slice of its rows).
    """
    if not shape:
        yield ...
        return
    if len(shape) == 3:
        for expert in range(shape[0]):
            for rows in row_blocks(shape[1:]):
                yield slice(expert, expert + 1), rows
        return
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def check_copy(block: torch.Tensor, copy: torch.Tensor, name: str, file: Path):
    """Raise ValueError unless an adapter's copy of a base tensor equals it, up to rounding."""
    if (block.float() - copy.float()).abs().max() > 0.01 * block.abs().max():
        raise ValueError(f"{file}: it was trained on a model whose {name} has other values than "
                         "that of this base")


# ---- adapters that were trained on a base in 4 or 8 bits --------------------------------------


def format_to_merge(config: Config, base: Path, adapters: list[Path]) -> tuple:
    """(QuantFormat to apply to a 16-bit base before merging, description of the base or "").

    Raises ValueError if merge_base is original and the base is stored quantized.
    """
    original = config.merge_base == "original"
    packed = packed_weights(base)
    words = formats_in_words(part.quant_format for part in packed.values())
    if any(map(stays_quantized, packed.values())):
        if original:
            raise ValueError(
                f"merge_base: original: {base} itself is stored quantized ({words}); name the "
                "16-bit checkpoint that it was made from as model_name_or_path, or leave "
                "merge_base out")
        print(f"base      {words}: dequantized, the weights that were trained with")
        return None, words

    if packed:
        print(f"base      {words}: dequantized, as in training")
    quant_format, _, _ = as_trained(config, adapters)
    if not quant_format:
        return None, words
    if original:
        print(f"base      unquantized, although the adapter was trained with {quant_format.kind}: "
              "another model than was trained")
        return None, quant_format.kind
    print(f"base      rounded to {quant_format.kind} and dequantized, as in training (merge_base: "
          "original skips this)")
    return quant_format, quant_format.kind


if __name__ == "__main__":
    run_script(main)
