"""The folder of an exported model: what may be replaced in it, and the files beside the weights.

Requires: checkpoint/files.py, text/load_text.py.
Next: exporting/export.py, merge.py.
"""
import shutil
from fnmatch import fnmatch
from pathlib import Path

from checkpoint.files import open_tensors, write_json
from checkpoint.read_config import model_config
from checkpoint.value_head import VALUE_HEAD
from checkpoint.write_gguf import is_ours
from runtime.resize_vocab import MARK
from text.load_text import fit_text
from text.tokenizer import load_tokenizer, read_json

# Files that define how text is read and rendered. Training settles them together, so all of them
# come from one folder.
TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "train_config.json")
# In the header of weight files: overwrite: true replaces only such.
EXPORT_MARK = {"written_by": "merge.py of Pocket Factory"}
# Other files to copy from the base's folder, unless they match SKIPPED.
COPIED = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*",
    "USE_POLICY*")
SKIPPED = (
    "config.json", "*.index.json", "adapter_*", "trainer_state.json", "*_results.json", MARK,
    *TEXT_FILES)


def check_target(path: Path, sources: list[Path], overwrite: bool) -> Path:
    """Absolute path to write to. Raises ValueError if that could destroy files of the user."""
    target = path.resolve()
    for source in sources:
        if target in (source.resolve(), *source.resolve().parents):
            relation = "is" if target == source.resolve() else "holds"
            raise ValueError(f"export_dir: {path} {relation} {source}, which is read here and "
                             "stays unchanged. Name another folder")
    for place in (target, *target.parents):
        if place.exists() and not place.is_dir():       # a file, a device, a pipe
            raise ValueError(f"export_dir: {place} is a file. Name a folder")

    items = sorted(target.iterdir()) if target.is_dir() else []
    if items and not overwrite:
        raise ValueError(f"export_dir: {path} is not empty (it holds {items[0].name}). Name "
                         "another folder, or set overwrite: true")
    others = [item.name for item in items if not is_of_export(item, sources[0])]
    if others:
        raise ValueError(
            f"export_dir: {path} holds {others[0]}, which no earlier export of this base has "
            "written, and overwrite: true removes nothing else. Name another folder, or remove "
            "it yourself")
    return target


def is_of_export(path: Path, base: Path) -> bool:
    """Whether merge.py has written this file: weights by their mark, other files by their names.

    Exports of earlier releases have no mark.
    """
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return is_ours(path)
    if path.suffix == ".safetensors" and path.name != VALUE_HEAD:
        with open_tensors(path) as tensors:
            return (tensors.metadata() or {}).items() >= EXPORT_MARK.items()
    if path.name == "README.md":
        return "Made with Pocket Factory." in path.read_text(encoding="utf-8", errors="replace")
    names = {"config.json", "generation_config.json", "model.safetensors.index.json", VALUE_HEAD,
             *TEXT_FILES, *(file.name for file in copied_files(base))}
    return path.name in names


def copied_files(base: Path) -> list[Path]:
    """The files of the base that its merged model gets unchanged."""
    found = []
    for file in base.iterdir():
        copied = any(fnmatch(file.name, pattern) for pattern in COPIED)
        skipped = any(fnmatch(file.name, pattern) for pattern in SKIPPED)
        if file.is_file() and copied and not skipped:
            found.append(file)
    return found


def copy_files(base: Path, text_source: Path, work: Path):
    """Copy license, generation settings etc. of the base, and the text files of text_source.

    The value head of a reward model comes from text_source, too.
    """
    for file in copied_files(base):
        shutil.copyfile(file, work / file.name)
    for name in (*TEXT_FILES, VALUE_HEAD):
        if (text_source / name).is_file():
            shutil.copyfile(text_source / name, work / name)


def fit_text_files(text_source: Path, work: Path, template, force: bool, fields: dict):
    """Make the tokenizer and generation_config.json end replies as the chat template does.

    Without that, generate() of transformers continues after the reply if the base used another end.
    """
    base_config = model_config(fields)
    tokenizer = load_tokenizer(text_source)
    text = fit_text(tokenizer, template, force, base_config.model_type, base_config.vocab_size)
    text.tokenizer.save(work)
    (work / "special_tokens_map.json").unlink(missing_ok=True)  # older format, might contradict

    generation = read_json(work / "generation_config.json")
    ends = generation.get("eos_token_id", fields.get("eos_token_id"))
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    stops = sorted(stop for stop in text.stop_ids if stop < base_config.vocab_size)
    new = [stop for stop in stops if stop not in ends]
    if new:
        write_json(work / "generation_config.json", {**generation, "eos_token_id": ends + new})
