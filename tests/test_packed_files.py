"""text/packed_files.py: compressed files and tables give the rows of the plain file."""
import gzip
import json
import sys
from pathlib import Path

import pytest

from tests.rows import ALPACA, load_rows, write_info
from text import packed_files
from text.data_files import DataFile

ROWS = [{**ALPACA, "output": f"answer {number} \u2028 é"} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "instruction,input,output\n" + "".join(f'ask,"","{row["output"]}"\n' for row in ROWS)


def compress(path, text):
    """Write a text as .gz, or as .zst in two frames, as `zstd` appends them."""
    raw = text.encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw[:100]) + gzip.compress(raw[100:]))
        return
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[:100], raw[100:])]
    path.write_bytes(b"".join(frames))


def write_table(path, rows, group_size=2):
    """Write rows as .parquet in row groups, or as .arrow: a stream, as `datasets` keeps it."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=group_size)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, group_size)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name, text", [
    ("d.jsonl", LINES), ("d.json", json.dumps(ROWS, indent=1)), ("d.csv", CSV),
    ("d.json", "\ufeff" + LINES),
])
def test_a_compressed_file_gives_the_rows_of_the_plain_one(tmp_path, name, text, suffix):
    compress(tmp_path / (name + suffix), text)
    write_info(tmp_path, d={"file_name": name + suffix})
    rows = load_rows(tmp_path)
    assert [row.data for row in rows] == ROWS
    assert rows[3].data == ROWS[3]      # again, and out of order
    assert rows[3].where.endswith(f"{name}{suffix} row 4")


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_tables(tmp_path, name):
    """Nested columns, missing values, and values that JSON has no word for."""
    import datetime
    rows = [{"messages": [{"role": "user", "content": "ask", "weight": None},
                          {"role": "assistant", "content": str(number), "weight": number % 2}],
             "when": datetime.date(2026, 1, 2), "image": b"\x00\xff", "score": 0.5}
            for number in range(5)]
    write_table(tmp_path / name, rows)
    notes = []
    found = load_rows(tmp_path, str(tmp_path / name), notes=notes)
    assert [row.data["messages"] for row in found] == [row["messages"] for row in rows]
    assert found[0].data["when"] == "2026-01-02"
    assert found[0].data["image"] == "<2 bytes>"
    assert "recognized as messages" in notes[0]
    assert "columns not used: when" in notes[1]


def test_an_arrow_file_is_read_as_an_arrow_stream_is(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, 2)
    assert [row.data for row in load_rows(tmp_path, str(tmp_path / "d.arrow"))] == ROWS


def test_only_the_row_groups_that_are_needed_are_read(tmp_path, monkeypatch):
    write_table(tmp_path / "d.parquet", ROWS)
    converted = []
    real = packed_files.json_line
    monkeypatch.setattr(packed_files, "json_line", lambda row: converted.append(row) or real(row))
    found = load_rows(tmp_path, str(tmp_path / "d.parquet"), max_samples=2)
    assert [row.data for row in found] == ROWS[:2]
    assert len(converted) <= 4      # of five rows in groups of two: the next group tells the end


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.txt"])
def test_reading_stops_at_max_samples(tmp_path, name):
    """What follows is not looked at, and its columns are not missed."""
    text = {"d.jsonl": LINES, "d.json": json.dumps(ROWS), "d.csv": CSV, "d.txt": LINES}[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    file = DataFile(tmp_path / name, 2)
    assert len(file) == 2 and not file.is_read
    file = DataFile(tmp_path / name, 5)
    assert len(file) == 5 and file.is_read


def test_max_samples_over_several_files(tmp_path):
    (tmp_path / "many").mkdir()
    for part in range(3):
        text = "".join(json.dumps({**row, "part": part}) + "\n" for row in ROWS)
        (tmp_path / "many" / f"{part}.jsonl").write_text(text, encoding="utf-8")
    write_info(tmp_path, d={"file_name": "many", "columns": {
        "prompt": "instruction", "response": "output", "system": "only_in_later_rows"}})
    found = load_rows(tmp_path, max_samples=7)
    assert [row.data["part"] for row in found] == [0] * 5 + [1] * 2
    with pytest.raises(ValueError, match="no row has the column 'only_in_later_rows'"):
        load_rows(tmp_path)


# gzip writes the second of its run into its header: without mtime=0 two test workers that start
# at different seconds would collect tests of different names
@pytest.mark.parametrize("name, raw, sentence", [
    ("d.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20],
     "cannot be unpacked .*Is it complete"),
    ("d.jsonl.gz", b"no gzip", "cannot be unpacked"),
    ("d.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
    ("d.jsonl.zst", b"no zst", "cannot be unpacked|needs the package zstandard"),
    ("d.parquet", b"PAR1", "cannot be read as parquet|needs the package pyarrow"),
    ("d.arrow", b"ARROW1", "cannot be read as arrow|needs the package pyarrow"),
    ("d.arrow", b"", "cannot be read as arrow|is empty|needs the package pyarrow"),
])
def test_damaged_files(tmp_path, name, raw, sentence):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=sentence):
        load_rows(tmp_path, str(tmp_path / name))


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_files, "LARGEST_CHECKED", 2**16)
    monkeypatch.setattr(packed_files, "BLOCK", 2**16)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b" " * 2**24))
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        load_rows(tmp_path, str(tmp_path / "d.jsonl.gz"))


@pytest.mark.parametrize("name, package", [
    ("d.parquet", "pyarrow"), ("d.arrow", "pyarrow"), ("d.jsonl.zst", "zstandard")])
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"needs the package {package}: pip install {package}"):
        load_rows(tmp_path, str(tmp_path / name))


def test_a_folder_of_compressed_files_has_one_type(tmp_path):
    (tmp_path / "many").mkdir()
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        compress(tmp_path / "many" / name, LINES)
    assert len(load_rows(tmp_path, str(tmp_path / "many"))) == 10
    (tmp_path / "many" / "c.jsonl").write_text(LINES, encoding="utf-8")
    with pytest.raises(ValueError, match="one type; it has .jsonl, .jsonl.gz"):
        load_rows(tmp_path, str(tmp_path / "many"))
    assert packed_files.file_type(Path("A.CSV.GZ")) == ".csv.gz"
