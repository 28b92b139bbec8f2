"""New tokens: a checkpoint with more rows in its embedding and head, written once into output_dir.

    add_tokens: <step>,<answer>         # words of the vocabulary like others
    add_special_tokens: <call>          # special ones, left out of what is shown
    new_special_tokens_config: x.yaml   # special ones as `token: what it means`
    resize_vocab: true                  # more rows for what the tokenizer has already

output_dir/resized_base is a checkpoint like any other: the weights of the base by links, the two
larger tables in a file of their own, and the tokenizer with the new tokens. Training starts from
it, and chat.py, eval.py and merge.py find it beside the adapter; a further stage copies it.

Requires: text/chat_formats.py, checkpoint/files.py, checkpoint/names.py.
Next: runtime/setup.py.
"""
import atexit
import os
import shutil
import tempfile
from pathlib import Path

import torch
import yaml

from checkpoint.adapter_config import read_adapter_config
from checkpoint.files import new_folder, open_tensors, save_tensors, tensor_files, write_json
from checkpoint.load import check_plain
from checkpoint.names import find_tensors
from checkpoint.read_config import read_config_json, read_model_config
from checkpoint.value_head import VALUE_HEAD
from errors import first_line
from families import ModelConfig
from parallel import Ranks
from settings.config import resizes_vocab
from text.plain_text import excerpt
from text.tokenizer import Tokenizer, load_tokenizer, read_json
from text.written_formats import find_template, stored_template

RESIZED_BASE = "resized_base"           # in output_dir
MARK = "resized_base.json"              # says of what and how it was made
TABLES = "resized.safetensors"          # sorts after model*: other programs keep the last of a name
MULTIPLE = 64                           # rows, as LLaMA-Factory pads them
INDEX = "model.safetensors.index.json"
NOT_COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja", "train_config.json", MARK)
# keys of a training, of which one is set where it started from a resized base
STARTED_FROM = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config",
                "adapter_name_or_path")
VOCAB_SIZE = ("vocab_size", "padded_vocab_size")


# ---- the tokens ---------------------------------------------------------------------------------


def read_descriptions(config) -> dict[str, str]:
    """{special token: what it means} of new_special_tokens_config; {} without the key."""
    if not config.new_special_tokens_config:
        return {}
    where = f"new_special_tokens_config: {config.new_special_tokens_config}"
    try:
        text = Path(config.new_special_tokens_config).read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except OSError as error:
        raise FileNotFoundError(f"{where} cannot be read ({first_line(error)})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{where} is no yaml ({first_line(error)})") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{where} must hold lines as `<token>: what it means`")
    for token, meaning in found.items():
        if not isinstance(token, str) or not isinstance(meaning, str):
            raise ValueError(f"{where}: {excerpt(token)}: {excerpt(meaning)} is not a token and a "
                             "text that says what it means; put quotes around both")
    return found


def new_tokens(config, descriptions: dict) -> dict[str, bool]:
    """{new token: whether it is special}, in the order of their ids."""
    found = dict.fromkeys(config.add_tokens or [], False)
    found |= dict.fromkeys(descriptions or config.add_special_tokens or [], True)
    for token in found:
        if not token.strip():
            raise ValueError(f"{config.source}: add_tokens, add_special_tokens: an empty token "
                             "stands for no text; take it out")
    return found


def add_new_tokens(tokenizer: Tokenizer, tokens: dict[str, bool]):
    """Add tokens as new_tokens returns them."""
    for token, special in tokens.items():
        tokenizer.add_tokens([token], special)


def table_names(sizes: ModelConfig) -> list[str]:
    """The weights of embedding and head, as the checkpoint calls them."""
    return [sizes.stored_name(f"{module}.weight") for module in ("model.embed_tokens", "lm_head")]


def tables_trained_in_full(config, sizes: ModelConfig) -> list[str]:
    """additional_target or, where the vocabulary is resized, the embedding and the head.

    sizes: of the base. Names are those of the checkpoint.
    """
    if config.additional_target is not None or not resizes_vocab(config):
        return config.additional_target or []
    return [name.split(".")[-2] for name in table_names(sizes)]


# ---- the checkpoint -----------------------------------------------------------------------------


def resized_base(config, folder: Path, adapters: list[Path], ranks: Ranks) -> Path:
    """The base to train: `folder`, or what was made of it, in output_dir.

    Raises ValueError if the run that is resumed has resized its vocabulary otherwise.
    """
    folder = resized_beside(adapters) or folder
    if not resizes_vocab(config) and not (folder / MARK).is_file():
        return folder
    target = Path(config.output_dir, RESIZED_BASE)
    if config.dry_run:                      # writes nothing into output_dir
        scratch = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        target = Path(scratch, RESIZED_BASE)
    ranks.from_main(lambda: write_resized(config, folder, adapters, target))
    with ranks.one_per_host_first():        # other hosts may have an output_dir of their own
        write_resized(config, folder, adapters, target)
    return target


def write_resized(config, folder: Path, adapters: list[Path], target: Path):
    """Write the checkpoint `target`, unless it is there already."""
    descriptions = read_descriptions(config)
    tokenizer = load_tokenizer(folder)
    tokens = new_tokens(config, descriptions) | missing_stop_words(config, adapters, tokenizer)
    about = {
        "model_name_or_path": config.model_name_or_path,
        "tokens": tokens,
        "descriptions": descriptions,
        "init_special_tokens": config.init_special_tokens,
        "seed": config.seed,
        "base": str(folder.resolve()),
    }
    written = read_json(target / MARK)
    if folder.resolve() == target.resolve() or written == about:
        return
    if written | {"base": about["base"]} != about and written and config.resume_from_checkpoint:
        raise ValueError(f"{target} was made for another vocabulary than this config asks for "
                         f"({MARK} in it says for which): set the keys as they were, or start "
                         "anew in another output_dir")

    before = tokenizer.vocab_size
    add_new_tokens(tokenizer, tokens)
    fields = read_config_json(folder)
    sizes = read_model_config(folder)
    rows = rows_needed(tokenizer, sizes.vocab_size)
    check_tables_of(adapters, sizes, rows)
    with new_folder(target) as work:
        link_files(folder, work)
        tokenizer.save(work)
        write_json(work / "config.json", with_rows(fields, rows))
        known = [token for token in tokens if tokenizer.id_of(token) < before]
        described = {}
        if config.init_special_tokens != "noise_init":
            described = {token: text for token, text in descriptions.items() if token not in known}
        if (rows > sizes.vocab_size or described) and not config.train_from_scratch:
            write_tables(folder, work, config, sizes, rows, tokenizer, described)
        write_json(work / MARK, about)
    print(f"vocabulary: {before:,} -> {tokenizer.vocab_size:,} tokens, {sizes.vocab_size:,} -> "
          f"{rows:,} rows in embedding and head: {target}")
    if known:
        print(f"  note: in the vocabulary already: {', '.join(map(repr, known))}")


def missing_stop_words(config, adapters: list[Path], tokenizer: Tokenizer) -> dict[str, bool]:
    """The stop words of the config's chat template that the vocabulary lacks, as new tokens."""
    template, _ = stored_template(adapters, config.template, config.force_template)
    if template is None or not resizes_vocab(config):
        return {}
    return {stop: True for stop in find_template(template).stop if tokenizer.id_of(stop) is None}


def rows_needed(tokenizer: Tokenizer, rows: int) -> int:
    """Rows for all ids of the tokenizer; `rows`, those of the model, where they are enough."""
    needed = 1 + max(tokenizer.core.get_vocab(with_added_tokens=True).values())
    return rows if needed <= rows else -(-needed // MULTIPLE) * MULTIPLE


def check_tables_of(adapters: list[Path], sizes: ModelConfig, rows: int):
    """Raises ValueError for an adapter that holds an embedding or head with fewer rows.

    sizes: of the base, before new tokens. rows: after them.
    """
    if rows == sizes.vocab_size:
        return
    tables = tuple(table_names(sizes))
    for adapter in adapters:
        file = adapter / "adapter_model.safetensors"
        if not file.is_file():                          # an error elsewhere
            continue
        with open_tensors(file) as tensors:
            held = [name for name in tensors.keys() if name.endswith(tables)]
        if held:
            raise ValueError(
                f"{adapter} holds an embedding or head of its own, for {sizes.vocab_size:,} rows, "
                f"and the new tokens need {rows:,}. Merge it into its base first (python merge.py, "
                "with export_dir), and set model_name_or_path to the merged model")


def notes_on_rows(config, adapter: Path | None) -> list[str]:
    """A note if the adapter that is trained further leaves the rows of new tokens as they start."""
    if adapter is None or not resizes_vocab(config) or read_adapter_config(adapter)[1].get(
            "modules_to_save"):
        return []
    return [f"new tokens: {adapter} trains neither embedding nor head, so that their rows stay as "
            "they start; create_new_adapter: true merges it and trains both"]


def link_files(folder: Path, work: Path):
    """Link the weights of a checkpoint and copy its small files; a weight file gets no index."""
    for path in sorted(folder.iterdir()):
        known = path.name in NOT_COPIED or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in (".json", ".jinja", "") and not known:
            shutil.copyfile(path, work / path.name)
    if (folder / VALUE_HEAD).is_file():
        shutil.copyfile(folder / VALUE_HEAD, work / VALUE_HEAD)
    try:
        files = tensor_files(folder)
    except FileNotFoundError:                           # train_from_scratch needs none
        return
    weight_map = {}
    for tensor, file in files.items():
        name = linked_name(file, folder)
        weight_map[tensor] = name
        if not (work / name).exists():
            link_file(file, work / name)
    write_json(work / INDEX, {"metadata": {}, "weight_map": weight_map})


def linked_name(file: Path, folder: Path) -> str:
    """The name of a weight file's link; a single file must not come before the index."""
    name = "_".join(file.relative_to(folder).parts)
    if name in ("model.safetensors", "pytorch_model.bin"):
        return f"model-base{file.suffix}"
    return name


def link_file(file: Path, link: Path):
    """A link to where the file really is; a copy where the system has none, and of our tables."""
    if file.name == TABLES and not file.is_symlink():
        shutil.copyfile(file, link)                     # of an earlier stage, which may be deleted
        return
    try:
        os.symlink(file.resolve(), link)
    except OSError:
        print(f"  note: this system makes no links: {file.name} is copied")
        shutil.copyfile(file, link)


def with_rows(fields: dict, rows: int) -> dict:
    """The fields of config.json with another size of the vocabulary."""
    changed = {key: rows if key in VOCAB_SIZE else value for key, value in fields.items()}
    if isinstance(fields.get("text_config"), dict):
        changed["text_config"] = with_rows(fields["text_config"], rows)
    return changed


# ---- the new rows -------------------------------------------------------------------------------


@torch.no_grad()
def write_tables(folder: Path, work: Path, config, sizes: ModelConfig, rows: int,
                 tokenizer: Tokenizer, descriptions: dict[str, str]):
    """Write the larger embedding and head, and name their file in the index.

    sizes: of the checkpoint in `folder`. tokenizer: with the new tokens. descriptions: of new
    tokens whose rows start from them; {}: all new rows start with noise.
    """
    places = find_tensors(folder, sizes)
    generator = torch.Generator().manual_seed(config.seed)
    described = described_rows(descriptions, tokenizer, sizes.vocab_size)
    tables = {}
    embedding = None
    for name in table_names(sizes):
        if name not in places:                          # a tied head
            continue
        file, stored = places[name]
        if tables and sizes.tie_word_embeddings:        # stored twice
            tables[stored] = next(iter(tables.values())).clone()
            continue
        with open_tensors(file) as tensors:
            table = tensors.get_tensor(stored)
        check_plain(table.dtype, file, stored)
        embedding = table if embedding is None else embedding
        noise = config.init_special_tokens != "desc_init"
        tables[stored] = grow_table(table, rows, embedding, described, noise, generator)
    save_tensors(work / TABLES, tables)
    index = read_json(work / INDEX)
    index["weight_map"] |= dict.fromkeys(tables, TABLES)
    write_json(work / INDEX, index)


def described_rows(descriptions: dict, tokenizer: Tokenizer, old: int) -> dict[int, list[int]]:
    """{id of a new token: ids of its description that the model knows}."""
    new = {tokenizer.id_of(token) for token in descriptions}
    return {tokenizer.id_of(token): [i for i in tokenizer.encode(text) if i < old and i not in new]
            for token, text in descriptions.items()}


def grow_table(table: torch.Tensor, rows: int, embedding: torch.Tensor,
               described: dict[int, list[int]], noise: bool, generator) -> torch.Tensor:
    """A table (old, hidden) with more rows, as LLaMA-Factory 0.9.5 makes them.

    Without descriptions a new row is the mean of all old ones and noise of standard deviation
    1 / sqrt(hidden). With them it is the mean of the description's rows in the embedding, of the
    head's rows, too; rows that only fill up are the mean of the old ones.
    """
    old, hidden = table.shape
    mean = table.mean(dim=0, dtype=torch.float32)
    grown = torch.cat([table, mean.to(table.dtype).expand(rows - old, hidden)])
    starts = {row: embedding[ids].mean(dim=0, dtype=torch.float32) if ids else mean
              for row, ids in described.items()}
    if not described:
        starts = dict.fromkeys(range(old, rows), mean)
    for row, start in starts.items():
        drawn = torch.randn(hidden, generator=generator) / hidden**0.5 if noise else 0
        grown[row] = (start + drawn).to(table.dtype)
    return grown


# ---- found again --------------------------------------------------------------------------------


def resized_beside(adapters: list[Path]) -> Path | None:
    """The resized base that one of these adapters was trained on; None if there is none.

    Raises FileNotFoundError if it is not where the adapter's file says, nor beside the adapter.
    """
    for adapter in reversed(adapters):
        named = Path(read_adapter_config(adapter)[1].get("base_model_name_or_path") or "")
        if named.name != RESIZED_BASE:
            continue
        candidates = (adapter / RESIZED_BASE, adapter.parent / RESIZED_BASE, named)
        found = [folder for folder in candidates if (folder / MARK).is_file()]
        if not found:
            raise FileNotFoundError(
                f"{adapter} was trained on {named}, a base with new tokens, which is not there. It "
                f"was written by that training: copy it to {adapter / RESIZED_BASE}")
        return found[0]
    return None


def resized_in(output_dir: str) -> Path | None:
    """The resized base of the full model in output_dir, if any.

    A run without new tokens may have overwritten one that had them: train_config.json tells.
    """
    folder = Path(output_dir, RESIZED_BASE)
    stored = read_json(Path(output_dir, "train_config.json"))
    began_with_more = any(stored.get(key) for key in STARTED_FROM) or not stored
    return folder if began_with_more and (folder / MARK).is_file() else None


def trained_on(adapter: Path) -> str | None:
    """The model that an adapter was trained on, as its training called it."""
    named = read_adapter_config(adapter)[1].get("base_model_name_or_path")
    if named and Path(named).name == RESIZED_BASE:
        return read_json(resized_beside([adapter]) / MARK).get("model_name_or_path")
    return named
