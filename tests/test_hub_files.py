"""text/hub_files.py: the files of a subset and a split, as `datasets` picks them."""
import json
import os
import subprocess
import sys

import pytest

from tests.common import ROOT
from tests.fake_hub import serve
from tests.rows import ALPACA, load_rows, write_info
from text.hub_files import Repository, hub_files, open_repository, read_configs, split_files

LAYOUTS = json.loads((ROOT / "tests/recorded/hub_layouts.json").read_text(encoding="utf-8"))
CASES = [(layout, ask) for layout in LAYOUTS["layouts"] for ask in layout["asks"]]
CARD = "---\nlicense: mit\n{}---\n# A set\n"


def repository_of(tmp_path, files, configs="", name="me/it"):
    """A repository with these names and a README.md."""
    card = tmp_path / "README.md"
    card.write_text(CARD.format(configs), encoding="utf-8")
    return Repository(name, sorted([*files, "README.md"]), lambda file: tmp_path / file)


@pytest.mark.parametrize("layout, ask", CASES, ids=[
    f"{layout['name']}:{ask['subset']}:{ask['folder']}" for layout, ask in CASES])
def test_recorded_layouts(tmp_path, layout, ask):
    """For each split the files that `datasets` reads, in its order."""
    repository = repository_of(tmp_path, layout["files"], layout["configs"])
    entry = {key: ask[key] for key in ("subset", "folder")}
    splits = ask.get("splits", {})
    for split, files in splits.items():
        _, found = hub_files(repository, {**entry, "split": split}, [])
        assert found == files
    if splits:
        found = split_files(repository, read_configs(repository), **entry)
        assert {split for split, files in found.items() if files} == set(splits)
    elif layout["name"] != "marked default":    # a mapping as data_files, which we read
        with pytest.raises(ValueError):
            hub_files(repository, entry, [])


@pytest.mark.parametrize("configs, entry, sentence", [
    ("configs:\n- config_name: en\n  data_files: a.json\n", {"subset": "eng"},
     "no subset 'eng' .did you mean 'en'.*It has en"),
    ("configs:\n- config_name: a\n- config_name: b\n", {}, "several subsets; choose one .*a, b"),
    ("configs:\n- config_name: a\n  data_files: https://x.org/y.json\n", {}, "elsewhere"),
    ("configs:\n- config_name: a\n  data_files: ../y.json\n", {}, "elsewhere"),
    ("configs:\n- config_name: a\n  data_files: [3]\n", {}, "data_files.* cannot be read"),
    ("configs: 5\n", {}, "not a list of objects"),
    ("configs: [en]\n", {}, "not a list of objects"),
    ("a: [\n", {}, "not valid YAML"),
    ("a: " + "[" * 100_000 + "\n", {}, "not valid YAML"),
    ("", {"split": "tarin"}, "has the splits train and none called 'tarin' .did you mean 'train'"),
    ("", {"split": "train[:10]"}, "must be the name of one split"),
    ("", {"subset": "fr"}, "no subset 'fr'"),
    ("", {"folder": "x"}, "has no data files .*in folder 'x'"),
])
def test_what_a_repository_lacks_is_a_sentence(tmp_path, configs, entry, sentence):
    with pytest.raises(ValueError, match=sentence):
        hub_files(repository_of(tmp_path, ["a.json"], configs), entry, [])


def test_a_subset_without_configs_is_a_folder_or_a_word(tmp_path):
    """en is not found in french.json."""
    files = ["en/train.json", "fr/train.json", "french.json", "train_en.json"]
    repository = repository_of(tmp_path, files)
    assert hub_files(repository, {"subset": "en"}, [])[1] == ["en/train.json", "train_en.json"]


# ---- with a hub ----------------------------------------------------------------------------------


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PART = [lines(*({**ALPACA, "output": f"{part}-{row}"} for row in range(3))) for part in range(3)]
SHARDS = {f"data/train-0000{part}-of-00003.jsonl": PART[part] for part in range(3)}
SHARDS |= {"data/test-00000-of-00001.jsonl": lines({**ALPACA, "output": "test"})}
# a new process: huggingface_hub reads its settings when it is imported
READ = ("import sys, json; from pathlib import Path; from tests.rows import load_rows; notes = []; "
        "most = int(sys.argv[3]) or None; "
        "rows = load_rows(Path(sys.argv[1]), sys.argv[2], notes, max_samples=most); "
        "print(json.dumps([[row.data['output'] for row in rows], notes]))")


def read(folder, name, most=0, **settings):
    """([the outputs of the rows], notes), read by a new process."""
    env = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", **settings}
    run = subprocess.run([sys.executable, "-c", READ, str(folder), name, str(most)], cwd=ROOT,
                         env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-800:]
    return json.loads(run.stdout)


def test_only_what_is_needed_is_fetched_and_the_cache_works_offline(tmp_path):
    write_info(tmp_path, d={"hf_hub_url": "me/it"}, t={"hf_hub_url": "me/it", "split": "test"})
    with serve({"me/it": {**SHARDS, "README.md": b"# no head", "big.bin": b"x"}}) as hub:
        address, fetched = hub
        outputs, notes = read(tmp_path, "d", 4, HF_ENDPOINT=address)
        assert outputs == ["0-0", "0-1", "0-2", "1-0"]
        assert fetched == ["README.md", *list(SHARDS)[:2]]
        assert "2 of 3 files hold the 4 rows of max_samples" in " ".join(notes)
        assert read(tmp_path, "t", HF_ENDPOINT=address)[0] == ["test"]
        assert fetched[3:] == ["data/test-00000-of-00001.jsonl"]

        outputs, _ = read(tmp_path, "d", HF_ENDPOINT=address)
        assert outputs == [f"{part}-{row}" for part in range(3) for row in range(3)]
    for settings in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": address}):    # nobody answers there
        outputs, notes = read(tmp_path, "d", **settings)
        assert len(outputs) == 9
        assert "in the cache are taken; whether it has more is not known" in " ".join(notes)
    write_info(tmp_path, d={"hf_hub_url": "me/other"})
    with pytest.raises(AssertionError, match="'me/other' could not be fetched .*a network"):
        read(tmp_path, "d", HF_ENDPOINT=address)


def test_a_script_is_not_run(tmp_path):
    """The hub's own parquet files are read in its place."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist([ALPACA]), tmp_path / "x.parquet")
    table = (tmp_path / "x.parquet").read_bytes()
    write_info(tmp_path, d={"hf_hub_url": "me/it", "subset": "en"})
    script = {"it.py": b"raise SystemExit('was run')", "train.jsonl": PART[0]}
    branch = {"en/partial-train/0000.parquet": table, "zh/train/0000.parquet": table}
    with serve({"me/it": script}, {("me/it", "refs/convert/parquet"): branch}) as hub:
        address, fetched = hub
        outputs, notes = read(tmp_path, "d", HF_ENDPOINT=address)
    assert outputs == ["answer"]
    assert fetched == ["en/partial-train/0000.parquet"]
    assert "script, it.py, which is not run" in " ".join(notes)
    assert "only the first part (5 GB) of split 'train'" in " ".join(notes)


def test_a_script_without_converted_files(tmp_path):
    repository = repository_of(tmp_path, ["it.py"])

    def missing():
        raise OSError("404")
    with pytest.raises(ValueError, match="script, it.py, which is never run"):
        hub_files(repository._replace(converted=missing), {}, [])


def test_a_missing_repository_is_a_sentence(tmp_path):
    write_info(tmp_path, d={"hf_hub_url": "me/other"})
    with serve({}) as (address, _):
        with pytest.raises(AssertionError,
                           match="dataset 'd': 'me/other' could not be fetched .*Is the name"):
            read(tmp_path, "d", HF_ENDPOINT=address)


def test_a_local_folder_is_read_as_a_repository(tmp_path):
    """As by load_dataset(FOLDER)."""
    for name, content in SHARDS.items():
        (tmp_path / "it" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "it" / name).write_bytes(content)
    write_info(tmp_path, d={"hf_hub_url": str(tmp_path / "it"), "split": "test"})
    assert [row.data["output"] for row in load_rows(tmp_path)] == ["test"]
    assert len(open_repository(str(tmp_path / "it"), None).files) == 4


def test_online_names_are_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "it").mkdir(parents=True)
    (tmp_path / "me" / "it" / "train.jsonl").write_bytes(PART[0])
    assert len(load_rows("ONLINE", "me/it")) == 3


# ---- ModelScope, OpenMind ------------------------------------------------------------------------


def test_modelscope(tmp_path, monkeypatch):
    """Where LLaMA-Factory would read it; its package is asked for README.md and data files."""
    import types
    asked = []

    def download(name, cache_dir=None, allow_patterns=None):
        asked.append((name, allow_patterns))
        (tmp_path / "ms").mkdir(exist_ok=True)
        (tmp_path / "ms" / "train.jsonl").write_bytes(PART[0])
        return str(tmp_path / "ms")
    module = types.ModuleType("modelscope.hub.snapshot_download")
    module.dataset_snapshot_download = download
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    write_info(tmp_path, only={"ms_hub_url": "a/b"}, both={"ms_hub_url": "a/b",
                                                           "hf_hub_url": "none/here"})
    assert len(load_rows(tmp_path, "only")) == 3
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert len(load_rows(tmp_path, "both")) == 3
    assert asked[0][0] == "a/b"
    assert {"README.md", "*.jsonl", "*.jsonl.gz"} <= set(asked[0][1])

    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(ValueError, match="needs its package: pip install modelscope"):
        load_rows(tmp_path, "both")


def test_openmind_is_not_read(tmp_path, monkeypatch):
    write_info(tmp_path, d={"om_hub_url": "a/b", "hf_hub_url": "a/b"})
    monkeypatch.setenv("USE_OPENMIND_HUB", "1")
    with pytest.raises(ValueError, match="USE_OPENMIND_HUB is set, but OpenMind is not read"):
        load_rows(tmp_path)
