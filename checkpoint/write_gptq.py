"""Write matrices as GPTQ checkpoints hold them; checkpoint/grouped_files.py reads them.

    qweight (in * bits / 32, out) int32     codes, down the columns, the first in the lowest bits
    qzeros  (groups, out * bits / 32) int32     the code of 0, minus one: checkpoint_format gptq
    scales  (groups, out) float16
    g_idx   (in,) int32                         the group of each column

Requires: methods/grouped.py.
Next: checkpoint/grouped_files.py.
Layout: AutoGPTQ 0.8, GPTQModel 7; the settings in config.json are read by transformers, too.
"""
import re

import torch
import torch.nn.functional as F

WORD_BITS = 32


def gptq_parts(shape: tuple, bits: int, group_size: int) -> dict[str, tuple[tuple, torch.dtype]]:
    """{part: (shape, dtype)} of the tensors that hold a matrix (out, in)."""
    size_out, size_in = shape
    groups = -(-size_in // group_size)
    return {
        "qweight": ((-(-size_in * bits // WORD_BITS), size_out), torch.int32),
        "qzeros": ((groups, -(-size_out * bits // WORD_BITS)), torch.int32),
        "scales": ((groups, size_out), torch.float16),
        "g_idx": ((size_in,), torch.int32),
    }


def pack_gptq(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int,
              columns: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a file. codes (out, in), zeros (out, groups) from 1 on, both uint8.

    columns (in,): the group of each column.
    """
    return {
        "qweight": pack_words(codes, bits).T.contiguous(),
        "qzeros": pack_words((zeros - 1).T, bits),
        "scales": scales.T.contiguous(),
        "g_idx": columns.int(),
    }


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes (n, m) uint8 as 32-bit words, the first code in the lowest bits of a row."""
    words = -(-codes.shape[1] * bits // WORD_BITS)
    padded = F.pad(codes, (0, -codes.shape[1] % WORD_BITS))     # 32 codes fill `bits` words
    if bits == 3:
        eights = padded.view(len(codes), -1, 8).int()           # in 3 bytes
        together = eights[..., 0]
        for i in range(1, 8):
            together = together | eights[..., i] << 3 * i
        octets = torch.stack([together >> shift & 255 for shift in (0, 8, 16)], -1)
        octets = octets.to(torch.uint8)
    else:
        count = 8 // bits                                       # codes in a byte
        in_byte = padded.view(len(codes), -1, count)
        octets = in_byte[..., 0]
        for i in range(1, count):
            octets = octets | in_byte[..., i] << bits * i
    packed = octets.reshape(len(codes), -1).contiguous().view(torch.int32)
    return packed[:, :words].contiguous()


def quantization_fields(bits: int, group_size: int, damping: float, layers: list[str],
                        skipped: list[str], desc_act: bool = False) -> dict:
    """quantization_config of config.json.

    layers: names within a block that are quantized. skipped: names of linear layers in blocks that
    are not; without such, readers quantize all linear layers of the blocks. desc_act: whether the
    columns of a group stand apart (act-order).
    """
    fields = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "damp_percent": damping,
        "desc_act": desc_act,
        "sym": True,
        "true_sequential": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
    }
    if skipped:
        fields["modules_in_block_to_quantize"] = [layers]
        fields["dynamic"] = {rf"-:.*\.{re.escape(name)}$": {} for name in skipped}
    return fields
