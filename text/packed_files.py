"""Compressed data files, parquet and arrow, read as if they were plain text.

    file = open_packed(Path("rows.jsonl.gz"))       # seekable; unpacked as far as it is read

What is unpacked goes to a temporary file without a name, so that any row can be read again, also by
a forked process. Parquet becomes one JSON object a line; one row group at a time is in memory.

Requires: errors.py.
Next: text/data_files.py.

Formats: RFC 1952 (gzip), RFC 8878 (Zstandard), parquet.apache.org, arrow.apache.org. The packages
pyarrow and zstandard are needed only for files of their kinds.
"""
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from errors import first_line

BLOCK = 2**20                   # bytes unpacked at once
ROWS = 1000                     # rows of a parquet file that are converted at once
LARGEST_CHECKED = 2**30         # bytes that any file may unpack to ...
LARGEST_RATIO = 200             # ... and beyond them, how many for each byte that was read


class UnpackedFile(io.RawIOBase):
    """A file made of blocks, which are written to a temporary file when they are asked for.

    blocks: an iterator over bytes.
    """

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks = blocks
        self.copy = tempfile.TemporaryFile(prefix="pocket-factory-", buffering=0)
        self.size = 0           # bytes unpacked so far
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.copy.fileno()

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            raise io.UnsupportedOperation("the end is not known")
        self.position = offset + (self.position if whence == os.SEEK_CUR else 0)
        return self.position

    def readinto(self, buffer) -> int:
        while self.size <= self.position:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.copy.seek(self.size)
            self.size += self.write_whole(block)
        self.copy.seek(self.position)
        count = self.copy.readinto(memoryview(buffer)[:self.size - self.position])
        self.position += count
        return count

    def write_whole(self, block: bytes) -> int:
        """Write a block to the copy. -> its size"""
        rest = memoryview(block)
        while rest:
            rest = rest[self.copy.write(rest):]
        return len(block)

    def close(self):
        if not self.closed:
            self.copy.close()
        super().close()


def unpacked_suffix(path: Path) -> str:
    """The type of what is in a file: .jsonl for rows.jsonl.gz and for rows.parquet, too."""
    suffix = path.suffix.lower()
    if suffix in TABLES:
        return ".jsonl"
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def file_type(path: Path) -> str:
    """The whole type of a file: .jsonl.gz."""
    suffix = path.suffix.lower()
    return unpacked_suffix(path) + suffix if suffix in COMPRESSED else suffix


def open_packed(path: Path):
    """A data file opened for reading bytes, unpacked if need be. Raises ValueError."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        blocks = unpack(path, COMPRESSED[suffix])
    elif suffix in TABLES:
        blocks = table_blocks(path, TABLES[suffix])
    else:
        return open(path, "rb")
    return io.BufferedReader(UnpackedFile(blocks), BLOCK)


# ---- compressed text --------------------------------------------------------------------------


def unpack(path: Path, open_stream) -> Iterator[bytes]:
    """The content of a compressed file in blocks. Raises ValueError for a damaged or absurd one."""
    size = 0
    with open(path, "rb") as raw, open_stream(path, raw) as stream:
        while True:
            try:
                block = stream.read(BLOCK)
            except (OSError, EOFError, ValueError, zlib.error, *zstd_errors()) as error:
                raise ValueError(f"{path} cannot be unpacked ({first_line(error)}). Is it "
                                 "complete? Fetch it again") from None
            if not block:
                return
            size += len(block)
            if size > max(LARGEST_CHECKED, LARGEST_RATIO * raw.tell()):
                raise ValueError(f"{path} unpacks to more than {LARGEST_RATIO} times its size; if "
                                 "that is meant, unpack it first and name the unpacked file")
            yield block


def open_gzip(path: Path, raw):
    """The unpacked bytes of a .gz file."""
    return gzip.GzipFile(fileobj=raw)


def open_zstandard(path: Path, raw):
    """The unpacked bytes of a .zst file."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ValueError(f"{path}: reading .zst needs the package zstandard: pip install "
                         "zstandard (or unpack it: zstd -d FILE)") from None
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


def zstd_errors() -> tuple:
    """The exceptions of zstandard, if it is installed."""
    try:
        import zstandard
    except ModuleNotFoundError:
        return ()
    return (zstandard.ZstdError,)


COMPRESSED = {".gz": open_gzip, ".zst": open_zstandard}


# ---- tables -----------------------------------------------------------------------------------


def table_blocks(path: Path, batches_of) -> Iterator[bytes]:
    """The rows of a table as lines of JSON. Raises ValueError for a file that cannot be read."""
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ValueError(f"{path}: reading {path.suffix} needs the package pyarrow: pip install "
                         "pyarrow") from None
    try:
        for batch in batches_of(path):
            for start in range(0, batch.num_rows, ROWS):
                rows = batch.slice(start, ROWS).to_pylist()
                yield b"".join(json_line(row) for row in rows)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]} ({first_line(error)}). Is it "
                         "complete? Fetch it again") from None


def json_line(row: dict) -> bytes:
    """A row as a line of JSON; what JSON has no word for becomes a text."""
    return json.dumps(row, ensure_ascii=False, default=as_text).encode() + b"\n"


def as_text(value) -> str:
    """A value that JSON does not know: bytes by their number, dates and decimals as written."""
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def parquet_batches(path: Path) -> Iterator:
    """The batches of a parquet file, one row group after the other."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield from file.iter_batches(ROWS, row_groups=[number])


def arrow_batches(path: Path) -> Iterator:
    """The batches of an arrow file; the package `datasets` writes streams, others files."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


TABLES = {".parquet": parquet_batches, ".arrow": arrow_batches}
