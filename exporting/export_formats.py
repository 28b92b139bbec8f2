"""The export of the settings: export_quantization_bit, export_format, and the format of the base.

Requires: exporting/export.py.
Next: exporting/gguf_export.py, exporting/gptq_export.py, merge.py.
"""
from pathlib import Path

from checkpoint.load import packed_weights, stays_quantized
from exporting.export import Export
from settings.config import Config


def open_export(config: Config, base: Path, adapters: list[Path], device: str) -> Export:
    """The export of the settings. Raises ValueError for a model that the format cannot hold."""
    if config.export_quantization_bit:
        from exporting.gptq_export import open_gptq           # only what is asked for

        return open_gptq(config, base, adapters, device)
    if config.export_format == "gguf":
        from exporting.gguf_export import GGUFExport

        return GGUFExport(config, base)
    if config.export_format == "gguf-lora":
        from exporting.gguf_lora import GGUFLoRAExport

        return GGUFLoRAExport(config, base, adapters)
    if config.export_format == "base":
        from exporting.base_format_export import open_base_format

        return open_base_format(base)
    if config.export_format:
        from exporting.packed_export import PackedExport

        return PackedExport(config.export_format, base)
    kinds = {part.quant_format.kind for part in packed_weights(base).values()
             if not stays_quantized(part)}
    if kinds and config.infer_dtype == "auto":
        from exporting.block_export import BlockExport

        return BlockExport(kinds.pop(), base)
    return Export()
