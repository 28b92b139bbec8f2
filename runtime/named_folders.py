"""The checkpoints that keys of the config name: folders, or repositories of the hub.

    named_folder(config, "model_name_or_path")          # downloaded if need be
    named_folders(config, "adapter_name_or_path")       # [] where the key is not set

Requires: checkpoint/files.py.
Next: runtime/finished.py, runtime/setup.py.
"""
from pathlib import Path

from checkpoint.files import find_checkpoint
from settings.config import Config


def named_folder(config: Config, key: str) -> Path:
    """The folder that a key names. Raises FileNotFoundError or ValueError that begins with it."""
    return found(config, key, getattr(config, key))


def named_folders(config: Config, key: str) -> list[Path]:
    """The folders that a key with a list names. Raises as named_folder does."""
    return [found(config, key, name) for name in getattr(config, key) or []]


def found(config: Config, key: str, name: str) -> Path:
    revision = config.model_revision if key == "model_name_or_path" else None
    try:
        return find_checkpoint(name, revision, config.cache_dir)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from None
