"""text/named_sets.json: the data sets that LLaMA-Factory names, as LLaMA-Factory lays them out."""
import json

import pytest

from tests.common import ROOT, SHARED, needs_shared
from tests.rows import ALPACA, load_rows, write_info
from text import data_files
from text.conversations import OPENAI_TAGS
from text.data_files import NAMED_SETS, named_sets
from text.hub_files import Repository, hub_files

PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "subset", "split", "folder", "ranking")
# what the pages of two repositories list
LISTED = {
    "belle_2m": [".gitattributes", "README.md", "train_2M_CN.json"],
    "belle_1m": [".gitattributes", "Belle_open_source_1M.json", "README.md"],
}


@needs_shared
def test_entries_are_those_of_llama_factory():
    """Its text sets on hubs, with their places, columns and words for speakers."""
    info = json.loads((SHARED / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    theirs = {name: entry for name, entry in info.items()
              if "file_name" not in entry and "images" not in entry.get("columns", {})}
    ours = named_sets()
    assert set(ours) == set(theirs) and len(ours) > 80
    for name, entry in theirs.items():
        for key in PLACES:
            assert ours[name].get(key) == entry.get(key), (name, key)
        default = {"messages": "messages"} if entry.get("tags") else None
        assert ours[name].get("columns", default) == entry.get("columns"), name
        formatting = "messages" if entry.get("tags") else entry.get("formatting")
        assert ours[name].get("formatting") == formatting, name
        assert (entry.get("tags") or {}).items() <= OPENAI_TAGS.items(), name


def test_the_page_lists_them():
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    for name, entry in named_sets().items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert entry.get("hf_hub_url", entry.get("ms_hub_url")) in line


@pytest.mark.parametrize("name", LISTED)
def test_listed_repositories(tmp_path, name):
    (tmp_path / "README.md").write_text("---\nlicense: gpl-3.0\n---\n", encoding="utf-8")
    entry = named_sets()[name]
    repository = Repository(entry["hf_hub_url"], LISTED[name], lambda file: tmp_path / file)
    _, files = hub_files(repository, entry, [])
    assert files == [file for file in LISTED[name] if file.endswith(".json")]


def test_an_entry_and_a_file_of_the_users_come_first(tmp_path, monkeypatch):
    def repository(name, cache_dir):
        (tmp_path / "hub.json").write_text(json.dumps([{**ALPACA, "output": name}]))
        return Repository(name, ["hub.json"], lambda file: tmp_path / file)
    monkeypatch.setattr(data_files, "open_repository", repository)
    notes = []
    found = load_rows(tmp_path, "alpaca_en", notes)
    assert found[0].data["output"] == "llamafactory/alpaca_en"
    assert "docs/datasets.md" in notes[0]

    (tmp_path / "mine.json").write_text(json.dumps([ALPACA]))
    write_info(tmp_path, other={"file_name": "mine.json"})
    assert load_rows(tmp_path, "alpaca_en")[0].data["output"] == "llamafactory/alpaca_en"
    write_info(tmp_path, alpaca_en={"file_name": "mine.json"})
    assert load_rows(tmp_path, "alpaca_en")[0].data["output"] == "answer"


def test_a_misspelled_name_finds_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean 'alpaca_en'"):
        load_rows(tmp_path, "alpca_en")
    assert NAMED_SETS.is_file()
