"""What merge.py writes: the plain export, a checkpoint like the base; other formats derive from it.

An export is told the plan of the merge (set_plan). It says which tensors it will write, and which
of the plan's it reads for them, in which order (sources); then it writes them (write), each from
the rows that `read(name)` yields, encoded by the threads that read them (encode), and the files
that describe them (finish).

Requires: exporting/merge_plan.py, runtime/merge_folder.py, checkpoint/files.py.
Next: exporting/gguf_export.py, exporting/gptq_export.py, merge.py.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from checkpoint.files import stored_as, tensor_files, write_json, write_tensors
from exporting.merge_plan import Planned
from runtime.merge_folder import EXPORT_MARK


class Export:
    """Safetensors of the plan's tensors, and config.json.

    tensors: {name: (shape, dtype)} of the new files, in their order.
    """
    verb = "merging"
    computes = False            # uses all cores while it writes: rows are not made ahead
    default_dtype: torch.dtype | None = None        # where infer_dtype does not say

    def set_plan(self, plan: dict[str, Planned], untied: bool, dtype: torch.dtype | None):
        """plan, untied: of plan_tensors. dtype: of all weights; None keeps each tensor's."""
        self.plan = plan
        self.untied = untied
        self.dtype = dtype
        self.tensors = self.tensors_of({name: (tensor.shape, tensor.dtype)
                                        for name, tensor in plan.items()})

    def tensors_of(self, shapes: dict) -> dict:
        """The tensors to write, from {name: (shape, dtype)} of the plan."""
        return shapes

    def sources(self) -> Iterator[str]:
        """Names in the plan of the tensors that are read, in their order."""
        return (name for name in self.tensors if name in self.plan)

    def nbytes(self) -> int:
        """Bytes of the tensors to write."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())

    def encode(self, name: str, rows: torch.Tensor):
        """What `read` yields for a block of rows of a source; threads call this ahead of time."""
        return rows

    def rows_of(self, name: str, read: Callable) -> Iterable[torch.Tensor]:
        """The rows of a tensor to write, in one or several blocks."""
        return read(name)

    def write(self, folder: Path, read: Callable, shard_bytes: int, progress: Callable):
        """Write the weights. read(name): the next of sources, its rows in blocks."""
        write_tensors(folder, self.tensors, lambda name: self.rows_of(name, read), shard_bytes,
                      progress, metadata=EXPORT_MARK)

    def finish(self, folder: Path, fields: dict):
        """Write config.json, from the base's fields, and read all files again. Raises OSError."""
        write_json(folder / "config.json", self.merged_fields(fields))
        found = {name: stored_as(file, name) for name, file in tensor_files(folder).items()}
        if found != self.tensors:
            raise OSError(f"{folder}: the written files differ from the plan. Is the disk damaged?")

    def merged_fields(self, fields: dict) -> dict:
        """config.json of the new model: how it is quantized, its dtype, and tying of the head."""
        fields = {key: value for key, value in fields.items() if key != "quantization_config"}
        if self.untied:
            fields["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if self.dtype and key in fields:
                fields[key] = str(self.dtype).removeprefix("torch.")
        if settings := self.settings():
            fields["quantization_config"] = settings
        return fields

    def settings(self) -> dict:
        """quantization_config of config.json; {} for unquantized weights."""
        return {}

    def report(self) -> str:
        """Lines to print at the end."""
        return ""


def check_stored(name: str, numbers: torch.Tensor, stored: torch.Tensor, advice: str = ""):
    """Raise ValueError for numbers that are NaN or infinite, or become so where they are stored."""
    # the sum is much sooner there; one that is not finite is looked at again
    if stored.sum(dtype=torch.float32).isfinite() or stored.isfinite().all():
        return
    if not numbers.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity: the base is damaged. Fetch or train it "
                         "again")
    raise ValueError(f"{name}: values up to {float(numbers.abs().max()):.3g} are beyond float16, "
                     f"which ends at 65,504; {advice}")
