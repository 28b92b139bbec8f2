"""Data files of a repository on the hub: which of them hold a subset and a split.

    repository = open_repository("llamafactory/alpaca_en", cache_dir=None)
    names = split_files(repository, subset="", split="train", folder="")

Only names are looked at; `fetch_rows` then downloads file after file until there are rows enough.
What the repository says itself in its README.md (`configs:`) comes first, then names as they are
usual. A loading script is never run: the parquet files that the hub has made with it are taken.

Requires: text/packed_files.py.
Next: text/data_files.py.

Rules: huggingface.co/docs/hub/datasets-manual-configuration and datasets-file-names-and-splits.
"""
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import yaml

from errors import did_you_mean, first_line
from text.packed_files import COMPRESSED, unpacked_suffix

CONVERTED = "refs/convert/parquet"      # the hub's own branch of converted files
LARGEST_CARD = 2**22                    # bytes of a README.md that are read
DATA_TYPES = (".parquet", ".jsonl", ".json", ".csv", ".txt", ".arrow")    # the first wins a tie
NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
SPLIT_WORDS = {     # split -> the words for it in the names of folders and files
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
BETWEEN = "[-._ 0-9]"                   # what stands between words of a name
GLOB_WORDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class Repository(NamedTuple):
    """A repository of data files: `fetch` downloads one of them and returns its path."""
    name: str
    files: list[str]
    fetch: Callable[[str], Path]
    note: str = ""                      # what the user should know about it
    converted: "Callable[[], Repository] | None" = None     # the branch CONVERTED, if there is one


# ---- repositories -----------------------------------------------------------------------------


def open_repository(name: str, cache_dir: str | None) -> Repository:
    """The repository of data sets `name`: a local folder, on the hub, or what is cached of it.

    HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE act as huggingface_hub defines them. Raises
    ValueError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Repository(name, names_in(folder), lambda file: folder / file)
    try:
        repository = open_branch(name, None, cache_dir)
    except (OSError, ValueError, *hub_errors()) as error:
        return cached_repository(name, cache_dir, error)
    return repository._replace(converted=lambda: open_branch(name, CONVERTED, cache_dir))


def open_branch(name: str, revision: str | None, cache_dir: str | None) -> Repository:
    """A branch of a repository on the hub. Raises what huggingface_hub raises."""
    import huggingface_hub

    about = huggingface_hub.HfApi().dataset_info(name, revision=revision)
    files = sorted(file.rfilename for file in about.siblings or [])

    def fetch(file: str) -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(
                name, file, repo_type="dataset", revision=revision, cache_dir=cache_dir))
        except (OSError, ValueError, *hub_errors()) as error:
            raise ValueError(why_not_fetched(f"{name}: {file}", error)) from None

    return Repository(name, files, fetch)


def is_on(variable: str) -> bool:
    """Whether a variable of the environment says yes, by LLaMA-Factory's words."""
    return os.environ.get(variable, "0").lower() in ("true", "y", "1")


def modelscope_repository(name: str, cache_dir: str | None) -> Repository:
    """A repository of ModelScope, fetched with its own package. Raises ValueError."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ModuleNotFoundError:
        raise ValueError(f"'{name}' is on ModelScope, which needs its package: pip install "
                         "modelscope (or download it and give its file_name)") from None
    wanted = [f"*{suffix}{packed}" for suffix in DATA_TYPES for packed in ("", *COMPRESSED)]
    try:
        folder = Path(dataset_snapshot_download(name, cache_dir=cache_dir,
                                                allow_patterns=["README.md", *wanted]))
    except Exception as error:      # its errors have no common class
        raise ValueError(f"'{name}' could not be fetched from ModelScope ({first_line(error)}). "
                         "Is the name right, is there a network?") from None
    return Repository(name, names_in(folder), lambda file: folder / file)


def cached_repository(name: str, cache_dir: str | None, why: Exception) -> Repository:
    """What is in the cache of a repository, where the hub cannot be asked."""
    import huggingface_hub

    try:
        root = Path(huggingface_hub.snapshot_download(
            name, repo_type="dataset", cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError, *hub_errors()):
        raise ValueError(why_not_fetched(name, why)) from None
    files = names_in(root)
    note = (f"the hub could not be asked about '{name}' ({first_line(why)}): the {len(files)} "
            "files in the cache are taken; whether it has more is not known")
    return Repository(name, files, lambda file: root / file, note)


def names_in(folder: Path) -> list[str]:
    """The names of the files in a folder and its folders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.is_file())


def hub_errors() -> tuple:
    """What huggingface_hub raises beside OSError and ValueError.

    Bases of its own error: that of httpx, which a missing network raises, is no OSError.
    """
    from huggingface_hub.utils import HfHubHTTPError

    return HfHubHTTPError.__bases__


def why_not_fetched(name: str, error: Exception) -> str:
    """The message for an error of huggingface_hub."""
    from huggingface_hub.utils import GatedRepoError

    if isinstance(error, GatedRepoError):
        return (f"'{name}' is gated: accept its license at https://huggingface.co/datasets/"
                f"{name.split(':')[0]}, then log in with `hf auth login` (or set HF_TOKEN)")
    return (f"'{name}' could not be fetched ({first_line(error)}). Is the name right, is there a "
            "network? A gated or private dataset needs `hf auth login`")


def fetch_rows(repository: Repository, names: list[str], needed: int | None,
               count_rows: Callable[[Path, int], int]) -> list[Path]:
    """Download files, in order, until they hold `needed` rows (None: all files)."""
    paths = []
    for name in names:
        paths.append(repository.fetch(name))
        if needed and len(paths) < len(names):
            needed -= count_rows(paths[-1], needed)
            if needed <= 0:
                break
    return paths


# ---- which files ------------------------------------------------------------------------------


def hub_files(repository: Repository, entry: dict, notes: list[str]) -> tuple[Repository, list]:
    """(the repository or its converted branch, the names of the files of an entry's split).

    entry: of dataset_info.json. Adds to `notes` what the user should know. Raises ValueError.
    """
    subset = entry.get("subset") or ""
    split = entry.get("split", "train")
    folder = entry.get("folder") or ""
    if "[" in split or "+" in split:
        raise ValueError(f"split '{split}' must be the name of one split; max_samples takes the "
                         "first rows")
    configs = read_configs(repository)
    script = f"{PurePosixPath(repository.name).name}.py"
    if script in repository.files and not configs:
        repository = converted_branch(repository, script)
        notes.append(f"'{repository.name}' has a script, {script}, which is not run: the parquet "
                     f"files that the hub has made with it ({CONVERTED}) are read")
        splits = converted_splits(repository, subset, notes)
    else:
        splits = split_files(repository, configs, subset, folder)
    if split not in splits:
        found = f"the splits {', '.join(splits)}" if splits else "no data files"
        raise ValueError(f"'{repository.name}' has {found} and none called '{split}'"
                         f"{did_you_mean(split, splits)}{in_words(subset, folder)}")
    if repository.note:
        notes.append(repository.note)
    return repository, of_one_type(repository, splits[split], notes)


def in_words(subset: str, folder: str) -> str:
    """Where a split was looked for, for a message."""
    places = [f"{key} '{value}'" for key, value in (("subset", subset), ("folder", folder))
              if value]
    return f" (in {' and '.join(places)})" if places else ""


def split_files(repository: Repository, configs: dict, subset: str,
                folder: str) -> dict[str, list[str]]:
    """The data files of each split, of a subset, in a folder."""
    chosen = {} if folder and not subset else chosen_config(repository, configs, subset)
    base = folder or chosen.get("data_dir") or ""
    prefix = f"{base.strip('/')}/" if base.strip("/.") else ""
    names = [name.removeprefix(prefix) for name in repository.files if name.startswith(prefix)]
    if subset and not configs:
        names = of_subset(repository, names, subset)
    if chosen.get("data_files") and not folder:
        splits = declared_splits(chosen["data_files"], names, repository.name)
    else:
        splits = usual_splits([name for name in names if is_data(name) and is_shown(name, "**")])
    return {split: [prefix + name for name in found] for split, found in splits.items() if found}


def is_data(name: str) -> bool:
    """Whether a file may hold rows, by its name."""
    path = PurePosixPath(name)
    return path.name not in NO_DATA and unpacked_suffix(Path(name)) in DATA_TYPES


def is_shown(name: str, pattern: str) -> bool:
    """Whether a pattern may mean a file: .hidden and __special__ names only if it says so."""
    def special(path: str) -> int:
        *folders, file = path.split("/")
        hidden = sum(part.startswith(".") for part in (*folders, file))
        return hidden + sum(part.startswith("__") for part in folders)

    return special(name) == special(pattern)


def of_subset(repository: Repository, names: list[str], subset: str) -> list[str]:
    """The files of a subset that no `configs:` describe: its name is a folder's or a word."""
    if subset == "default":
        return names
    found = []
    for name in names:
        *folders, file = name.split("/")
        if subset in folders or subset in re.split(r"[-._ ]", file):
            found.append(name)
    if not found:
        folders = {name.split("/")[0] for name in names if "/" in name}
        raise ValueError(f"'{repository.name}' has no subset '{subset}'"
                         f"{did_you_mean(subset, folders)}: its README.md describes none, and no "
                         "folder or file is called so")
    return found


def of_one_type(repository: Repository, names: list[str], notes: list[str]) -> list[str]:
    """The files of the type that most of them have; others are named in a note."""
    counts = Counter(data_type(name) for name in names)
    best = max(counts, key=lambda suffix: (counts[suffix], -DATA_TYPES.index(suffix)))
    kept = (".json", ".jsonl") if best in (".json", ".jsonl") else (best,)
    left_out = [name for name in names if data_type(name) not in kept]
    if left_out:
        notes.append(f"'{repository.name}': {len(left_out)} files of other types than {best} are "
                     f"not read: {', '.join(left_out[:3])}")
    return [name for name in names if data_type(name) in kept]


def data_type(name: str) -> str:
    """The type of a data file, .gz and .zst left out."""
    path = Path(name)
    suffix = path.suffix.lower()
    return suffix if suffix in DATA_TYPES else unpacked_suffix(path)


# ---- names as they are usual ------------------------------------------------------------------


def usual_splits(names: list[str]) -> dict[str, list[str]]:
    """The files of each split: numbered shards, else folders, else files are named after it."""
    splits = {}
    for name in names:
        if match := SHARD.fullmatch(name):
            splits.setdefault(match[1], []).append(name)
    if splits:
        return splits

    for find in (folder_has_word, file_has_word):
        splits = {split: [name for name in names if find(name, words)]
                  for split, words in SPLIT_WORDS.items()}
        if any(splits.values()):
            return splits
    return {"train": names}


def folder_has_word(name: str, words: str) -> bool:
    """Whether one of the folders of a file is named after a split."""
    word = re.compile(f"(?:.*{BETWEEN})?(?:{words})(?:{BETWEEN}.*)?")
    return any(word.fullmatch(folder) for folder in name.split("/")[:-1])


def file_has_word(name: str, words: str) -> bool:
    """Whether a file is named after a split."""
    word = re.compile(f"(?:.*{BETWEEN})?(?:{words}){BETWEEN}.*")
    return bool(word.fullmatch(name.split("/")[-1]))


# ---- configs: of README.md --------------------------------------------------------------------


def read_configs(repository: Repository) -> dict[str, dict]:
    """config name -> {data_files, data_dir, …}, as the repository's README.md describes them."""
    if "README.md" not in repository.files:
        return {}
    with open(repository.fetch("README.md"), encoding="utf-8-sig", errors="replace") as file:
        text = file.read(LARGEST_CARD)
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if not match:
        return {}
    try:
        card = yaml.load(match[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"'{repository.name}': the head of its README.md is not valid YAML "
                         f"({first_line(error)})") from None
    configs = card.get("configs") if isinstance(card, dict) else None
    return checked_configs(configs or [], repository.name)


def checked_configs(configs, repository: str) -> dict[str, dict]:
    """`configs:` by name. Raises ValueError for values of other types than they should have."""
    found = {}
    good = isinstance(configs, list)
    for config in configs if good else []:
        if not (isinstance(config, dict) and isinstance(config.get("config_name"), str)
                and isinstance(config.get("data_dir") or "", str)):
            good = False
            break
        found[config["config_name"]] = config
    if not good:
        raise ValueError(f"'{repository}': `configs` in its README.md is not a list of objects "
                         "with a config_name")
    return found


def chosen_config(repository: Repository, configs: dict, subset: str) -> dict:
    """The config of a subset; without one the default. Raises ValueError if it is not clear."""
    if not configs:
        return {}
    known = ", ".join(list(configs)[:20])
    if subset:
        if subset not in configs:
            raise ValueError(f"'{repository.name}' has no subset '{subset}'"
                             f"{did_you_mean(subset, configs)}. It has {known}")
        return configs[subset]
    defaults = [name for name, config in configs.items()
                if len(configs) == 1 or name == "default" or config.get("default")]
    if len(defaults) != 1:
        raise ValueError(f"'{repository.name}' has several subsets; choose one with `subset` in "
                         f"dataset_info.json: {known}")
    return configs[defaults[0]]


def declared_splits(data_files, names: list[str], repository: str) -> dict[str, list[str]]:
    """The files of each split, by the patterns in `data_files`."""
    splits = {}
    for split, patterns in declared_patterns(data_files, repository).items():
        found = [name for pattern in patterns for name in matching(pattern, names)]
        splits[split] = list(dict.fromkeys(found))
    return splits


def declared_patterns(data_files, repository: str) -> dict[str, list[str]]:
    """split -> patterns: `data_files` is a pattern, a list of them, or lists of split and path."""
    items = data_files if isinstance(data_files, list) else [data_files]
    if isinstance(data_files, dict):
        items = [{"split": split, "path": path} for split, path in data_files.items()]
    splits = {}
    for item in items:
        item = item if isinstance(item, dict) else {"split": "train", "path": item}
        paths = item.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        if not all(isinstance(text, str) for text in (item.get("split"), *paths)):
            raise ValueError(f"'{repository}': `data_files` in its README.md cannot be read: "
                             f"{str(item)[:80]}")
        splits.setdefault(item["split"], []).extend(paths)
    for pattern in (pattern for patterns in splits.values() for pattern in patterns):
        if "://" in pattern or ".." in pattern.split("/"):
            raise ValueError(f"'{repository}': `data_files` in its README.md names a file "
                             f"elsewhere, {pattern}; download it and give its file_name")
    return splits


def matching(pattern: str, names: list[str]) -> list[str]:
    """The data files that a pattern means: * within a name, ** over folders, [ab], ?."""
    pattern = pattern.removeprefix("./")
    words = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    expression = ""
    for word in words:
        is_class = word.startswith("[") and word.endswith("]")
        text = re.sub(r"^\[!", "[^", word) if is_class else re.escape(word)
        expression += GLOB_WORDS.get(word, text)
    regex = re.compile(expression)
    return [name for name in names
            if is_data(name) and is_shown(name, pattern) and regex.fullmatch(name)]


# ---- the branch of converted files ------------------------------------------------------------


def converted_branch(repository: Repository, script: str) -> Repository:
    """The hub's own conversion of a repository that has only a script."""
    advice = (f"'{repository.name}' is made by a script, {script}, which is never run, and the hub "
              "has no converted files of it")
    if repository.converted is None:
        raise ValueError(f"{advice} in the cache. Convert it, and give its file_name")
    try:
        return repository.converted()
    except (OSError, ValueError, *hub_errors()) as error:
        raise ValueError(f"{advice} ({first_line(error)}). Convert it, and give its "
                         "file_name") from None


def converted_splits(repository: Repository, subset: str,
                     notes: list[str]) -> dict[str, list[str]]:
    """The files of each split: subset/split/0000.parquet."""
    subsets = {}
    for name in repository.files:
        if name.count("/") == 2 and name.endswith(".parquet"):
            config, split, _ = name.split("/")
            subsets.setdefault(config, {}).setdefault(split, []).append(name)
    if not subset:
        subset = "default" if "default" in subsets or len(subsets) != 1 else next(iter(subsets))
    if subset not in subsets:
        raise ValueError(f"'{repository.name}' has no subset '{subset}'"
                         f"{did_you_mean(subset, subsets)}. It has {', '.join(subsets)}; choose "
                         "one with `subset` in dataset_info.json")
    splits = {}
    for split, names in subsets[subset].items():
        if split.startswith("partial-"):
            notes.append(f"'{repository.name}': the hub has converted only the first part (5 GB) "
                         f"of split '{split.removeprefix('partial-')}'")
        splits[split.removeprefix("partial-")] = names
    return splits
