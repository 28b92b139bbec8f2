"""export_format: peft writes an adapter alone, for PEFT or with adapter_prefix: served for servers.

Requires: checkpoint/adapters.py, checkpoint/served_adapter.py.
Next: exporting/check_adapter.py, merge.py.
"""
import shutil
from pathlib import Path

# first: a missing package ends in a sentence
from errors import print_error  # noqa: F401

from checkpoint.adapter_config import read_adapter_config
from checkpoint.adapters import load_adapter, save_adapter
from checkpoint.files import new_folder
from checkpoint.load import load_model
from checkpoint.served_adapter import save_served
from runtime.merge_folder import TEXT_FILES
from settings.config import Config


def export_adapter(config: Config, base: Path, adapters: list[Path]):
    """Write the adapter into export_dir. Raises ValueError for several adapters, and if export_dir
    is not empty."""
    if len(adapters) != 1:
        raise ValueError(f"export_format: peft writes one adapter, and {len(adapters)} are named: "
                         "name one as adapter_name_or_path")
    target = Path(config.export_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"export_dir: {target} is not empty. Name another folder")
    write_adapter(base, adapters[0], target, config.adapter_prefix)
    readers = "vLLM and SGLang" if config.adapter_prefix == "served" else "PEFT"
    print(f"{target}: the adapter for {base}, named and laid out for {readers}")


def write_adapter(base: Path, adapter: Path, target: Path, prefix: str):
    """Convert an adapter of the base; target appears only when complete. prefix: adapter_prefix."""
    model = load_model(base, skip_weights=True)
    config = load_adapter(model, adapter, device="cpu")
    base_name = read_adapter_config(adapter)[1].get("base_model_name_or_path") or str(base)
    write = save_served if prefix == "served" else save_adapter
    with new_folder(target) as work:
        write(model, work, config, base_name)
        for name in TEXT_FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, work / name)
