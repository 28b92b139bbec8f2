"""A model in few bits by GPTQ: merge.py with export_quantization_bit.

The blocks are quantized in their order. The rows of calibration pass a block up to the layers that
are next (queries, keys and values; the output of attention; gate and up; down), whose inputs give
their H; these layers are quantized by methods/gptq.py; and so on with the quantized ones in place.
Then the rows pass the whole block, and what comes out is the next block's input. So each layer is
fitted to the inputs that it will really have.

In memory are one block in float32, its H matrices, and the rows' states at one depth. On a CPU the
other weights stay in their files; and what is quantized is written before the next block is read.

Requires: methods/gptq.py, checkpoint/write_gptq.py, text/calibration.py.
Next: merge.py.
Paper: GPTQ arXiv:2210.17323.
"""
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

import torch
from torch import nn
from tqdm import tqdm

from checkpoint.load import load_model, packed_weights
from checkpoint.write_gptq import gptq_parts, pack_gptq, quantization_fields
from exporting.export import Export, check_stored
from generate import context_length
from model import CausalLM, attention_needs
from settings.config import Config
from text.calibration import calibration_rows
from text.tokenizer import load_tokenizer

GROUP_SIZE = 128
MULTIPLE = 32           # inputs and outputs of a layer, for the words of the file and for kernels
ROWS_COUNTED = 256      # of a matrix, for the errors: their products took half of the time
# layers that are quantized at once, since they do not depend on each other
STAGES_OF_BLOCK = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_z"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)


class InputReached(Exception):
    """Ends a forward pass whose only purpose was the inputs of a layer."""


class GPTQExport(Export):
    """Quantizes a model block by block, in the order in which the file is written.

    layers: {name in the files: (block, name in the block)} of the matrices that are quantized.
    """

    verb = "quantizing"
    computes = True
    default_dtype = torch.float16

    def __init__(self, base: Path, rows: torch.Tensor, bits: int, device: str,
                 desc_act: bool = False):
        self.model = load_model(base)
        self.rows = rows
        self.bits = bits
        self.desc_act = desc_act        # whether columns with large inputs are quantized first
        self.device = torch.device(device)
        self.layers, self.skipped = quantized_layers(self.model)
        check_layers(base, self.model, self.layers)
        self.hidden = None              # the rows at the next block, (rows, T, D) float32
        self.next_block = 0
        self.ready = {}                 # {name in the new files: tensor} that is not written yet
        self.checksums = {}             # {name of a weight: of the values that it was rounded to}
        self.errors = []                # of each layer: [GPTQ's, to the nearest], of its outputs
        self.unseen = 0                 # layers, of experts, that no token has reached

    # ---- what is written

    def tensors_of(self, shapes: dict) -> dict:
        """{name: (shape, dtype)} of the quantized checkpoint, block by block, of the plain one."""
        order = {self.model.config.stored_name(name): number
                 for number, (name, _) in enumerate(self.model.named_parameters())}
        names = sorted(shapes, key=lambda name: order.get(name, len(order)))
        found = {}
        for name in names:
            if name not in self.layers:
                found[name] = shapes[name]
                continue
            for part, info in gptq_parts(shapes[name][0], self.bits, GROUP_SIZE).items():
                found[f"{name.removesuffix('weight')}{part}"] = info
        return found

    def rows_of(self, name: str, read: Callable) -> Iterable[torch.Tensor]:
        """A tensor of the quantized checkpoint; they are asked for in the order of tensors_of."""
        if name in self.plan:
            return read(name)
        while name not in self.ready:
            self.quantize_next()
        return [self.ready.pop(name)]

    def settings(self) -> dict:
        """quantization_config of config.json."""
        from methods.gptq import DAMPING

        return quantization_fields(
            bits=self.bits, group_size=GROUP_SIZE, damping=DAMPING, desc_act=self.desc_act,
            layers=sorted({name_in_block(name) for name in self.layers}),
            skipped=sorted({name_in_block(name) for name in self.skipped}))

    def finish(self, folder: Path, fields: dict):
        """Also read the matrices of the written files and compare them. Raises OSError."""
        super().finish(folder, fields)
        found = packed_weights(folder)
        for name, checksum in self.checksums.items():
            written = found[name].read("cpu").dequantize(torch.float16) if name in found else None
            if written is None or checksum_of(written) != checksum:
                raise OSError(f"{folder}: {name} is not read as it was quantized. Is the disk "
                              "damaged?")

    def report(self) -> str:
        """What was done."""
        text = (f"gptq      {len(self.checksums)} matrices in {self.bits} bits, groups of "
                f"{GROUP_SIZE}")
        if self.errors:                         # else the outputs of all were 0
            ours, nearest = (sum(column) / len(self.errors) for column in zip(*self.errors))
            text += (f"; error of their outputs {ours:.3%}, {nearest:.3%} if rounded to the "
                     "nearest")
        if self.unseen:
            text += (f"; {self.unseen} matrices of experts that no calibration token has reached "
                     "are rounded to the nearest (export_quantization_nsamples draws more)")
        return text

    # ---- one block

    @torch.no_grad()
    def quantize_next(self):
        """Quantize the next block; its tensors are then ready."""
        if self.hidden is None:
            self.hidden = self.embed_rows()
        number = self.next_block
        block = self.model.model.layers[number].to(self.device, torch.float32)
        names = {name_in: name for name, (block_number, name_in) in self.layers.items()
                 if block_number == number}
        for stage in STAGES_OF_BLOCK:
            self.quantize_stage(block, stage, names, f"block {number + 1} of {self.num_blocks}")
        if number + 1 < self.num_blocks:
            for i, out in self.passes(block, f"block {number + 1}: pass on"):
                self.hidden[i] = out[0]
        else:
            self.hidden = None
        self.model.model.layers[number].to("meta")
        self.next_block += 1

    @property
    def num_blocks(self) -> int:
        return len(self.model.model.layers)

    def quantize_stage(self, block: nn.Module, stage: tuple[str, ...], names: dict, words: str):
        """Quantize the layers of a block with these last names, and set what they were rounded to.

        names: {name in the block: name in the files}.
        """
        from methods.gptq import act_order, gptq, inverse_factor

        parents = {}                                # layers of one module have the same input
        for name_in, name in names.items():
            parent, _, leaf = name_in.rpartition(".")
            if leaf in stage:
                parents.setdefault(parent, {})[name] = block.get_submodule(name_in)
        if not parents:
            return
        first = {parent: next(iter(layers.values())) for parent, layers in parents.items()}
        hessians = self.input_hessians(block, first, f"{words}: {stage[0]}")
        for parent, layers in parents.items():
            hessian = hessians.pop(parent)
            order = act_order(hessian) if self.desc_act else None
            ordered = hessian if order is None else hessian[order][:, order]
            try:
                factor = inverse_factor(ordered)
            except ValueError as error:
                raise ValueError(f"{next(iter(layers))}: {error}") from None
            for name, layer in layers.items():
                rounded = gptq(layer.weight, factor, self.bits, GROUP_SIZE, order)
                values = rounded.dequantize()
                check_stored(name, layer.weight, values, "export_format: bnb-nf4 writes them")
                self.note_errors(layer.weight, values, hessian)
                self.keep(name, rounded, values)
                layer.weight.data = values

    def note_errors(self, weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor):
        """Count a layer's errors as shares of its outputs; ROWS_COUNTED rows stand for all."""
        from methods.gptq import output_error, round_to_nearest

        if not hessian.diagonal().any():
            self.unseen += 1
            return
        some = slice(None, None, max(1, len(weight) // ROWS_COUNTED))
        weight = weight[some]
        nearest = round_to_nearest(weight, self.bits, GROUP_SIZE).dequantize()
        whole = output_error(weight, hessian)
        if whole > 0:
            self.errors.append([output_error(weight - rounded, hessian) / whole
                                for rounded in (values[some], nearest)])

    def keep(self, name: str, rounded, values: torch.Tensor):
        """Make the tensors of a quantized matrix, which stands for these values, ready to write."""
        self.checksums[name] = checksum_of(values.half())
        zeros = torch.full(rounded.scales.shape, rounded.zero, dtype=torch.uint8,
                           device=rounded.codes.device)
        parts = pack_gptq(rounded.codes, zeros, rounded.scales, self.bits, rounded.columns)
        for part, tensor in parts.items():
            self.ready[f"{name.removesuffix('weight')}{part}"] = tensor.cpu()

    # ---- forward passes

    def embed_rows(self) -> torch.Tensor:
        """The rows of calibration at the first block, (rows, T, D) float32; picks the kernel."""
        from fast.attention_picker import pick_kernel       # only where it is asked for

        choice = pick_kernel("auto", device=self.device, dtype=torch.float32, training=False,
                             **attention_needs(self.model.config))
        self.model.kernel = choice.kernel
        hidden = torch.stack([self.model.embed(row[None])[0].float() for row in self.rows])
        for module in (self.model.model.embed_tokens, self.model.lm_head):
            module.to("meta")                               # a tied head is the same matrix
        return hidden.to(self.device)

    def passes(self, block: nn.Module, words: str) -> Iterator[tuple]:
        """(number, output (1, T, D)) of each row; None where the pass was ended before."""
        positions = torch.arange(self.rows.shape[1], device=self.device)[None]
        ctx = self.model.context(positions, self.hidden[:1], None, None, None)
        for i in tqdm(range(len(self.hidden)), desc=words, unit="row", leave=False, disable=None):
            try:
                yield i, block(self.hidden[i:i + 1], ctx)
            except InputReached:
                yield i, None

    def input_hessians(self, block: nn.Module, layers: dict[str, nn.Module],
                       words: str) -> dict[str, torch.Tensor]:
        """{key: the sum of x xᵀ over the inputs of that layer}, (in, in) float32.

        A pass ends at the layer if it is the only one; of experts, each sees its own tokens.
        """
        sums = {}
        handles = []
        for key, layer in layers.items():
            size_in = layer.in_features
            sums[key] = torch.zeros(size_in, size_in, device=self.device)
            hook = sum_inputs(sums[key], ends=len(layers) == 1)
            handles.append(layer.register_forward_pre_hook(hook))
        try:
            for _ in self.passes(block, words):
                pass
        finally:
            for handle in handles:
                handle.remove()
        return sums


def sum_inputs(total: torch.Tensor, ends: bool) -> Callable:
    """A hook that adds x xᵀ of a layer's inputs to total, and may end the pass."""
    def hook(module, args):
        x = args[0].flatten(0, -2)                      # (tokens, in)
        total.addmm_(x.T, x)
        if ends:
            raise InputReached
    return hook


def checksum_of(matrix: torch.Tensor) -> int:
    """Of the bytes of a matrix."""
    return zlib.crc32(matrix.cpu().contiguous().view(torch.uint8).numpy())


# ---- which layers, and what is refused ----------------------------------------------------------


def quantized_layers(model: CausalLM) -> tuple[dict, list[str]]:
    """({name in the files: (block, name in it)} of what is quantized, other linear layers' names).

    Routers and gates of experts stay as they are, and layers whose sizes the format cannot hold.
    """
    wanted = {leaf for stage in STAGES_OF_BLOCK for leaf in stage}
    layers = {}
    skipped = []
    for number, block in enumerate(model.model.layers):
        for name, module in block.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            stored = model.config.stored_name(f"model.layers.{number}.{name}.weight")
            fits = not module.in_features % MULTIPLE and not module.out_features % MULTIPLE
            if name.rpartition(".")[2] in wanted and fits:
                layers[stored] = number, name
            else:
                skipped.append(stored)
    return layers, skipped


def check_layers(base: Path, model: CausalLM, layers: dict):
    """Raises ValueError for a model of which little would be quantized."""
    if model.config.stacked_experts:
        raise ValueError(
            f"export_quantization_bit: {base} stores its experts as stacks of matrices, which a "
            "GPTQ file cannot hold; export it without export_quantization_bit")
    if not layers:
        raise ValueError(
            f"export_quantization_bit: no linear layer of {base} has sizes that are multiples of "
            f"{MULTIPLE}, as a GPTQ file needs; export it without export_quantization_bit")


def name_in_block(name: str) -> str:
    """self_attn.q_proj of model.layers.3.self_attn.q_proj.weight."""
    return re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")


def open_gptq(config: Config, base: Path, adapters: list[Path], device: str) -> GPTQExport:
    """The quantizer that the settings ask for.

    Raises ValueError for adapters, and for a base that is quantized already.
    """
    bits = config.export_quantization_bit
    if adapters:
        raise ValueError(
            f"export_quantization_bit: {bits} quantizes a whole model, and {adapters[-1]} is an "
            "adapter: merge it first (this yaml without export_quantization_bit), then quantize "
            "the merged folder as model_name_or_path, without adapter_name_or_path and output_dir")
    if packed_weights(base):
        raise ValueError(
            f"export_quantization_bit: {bits}, but {base} is quantized already; name the 16-bit "
            "checkpoint that it was made from")
    tokenizer = load_tokenizer(base)
    rows = calibration_rows(config, tokenizer)
    export = GPTQExport(base, rows, bits, device, config.export_quantization_desc_act)
    largest = int(rows.max())
    if largest >= export.model.config.vocab_size:
        raise ValueError(f"export_quantization_dataset: token {largest} of {base}'s tokenizer is "
                         f"beyond vocab_size: {export.model.config.vocab_size} of its config.json")
    print(f"gptq      {len(export.layers)} matrices in {bits} bits, groups of {GROUP_SIZE}, "
          f"calibrated on {len(rows)} rows of {rows.shape[1]} tokens of "
          f"{config.export_quantization_dataset} (seed {config.seed})")
    context = context_length(export.model.config)
    if rows.shape[1] > context:
        print(f"          note: the model was made for {context:,} tokens "
              "(max_position_embeddings); set export_quantization_maxlen to no more")
    if export.skipped:
        print(f"          {len(export.skipped)} linear layers stay as they are, such as "
              f"{export.skipped[0]}")
    return export
