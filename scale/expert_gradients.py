"""Gradients where the experts are dealt out (scale/expert_parallel.py).

The backward pass has brought an expert's process the gradient of all rows of its axis. So gradients
of experts are summed over their copies alone, those of all other weights over all ranks. The norm
for clipping counts each weight once. An expert at which no row has arrived in a step, of any
process, has no gradient, as in one process.

Requires: scale/expert_parallel.py, scale/cut_gradients.py.
Next: runtime/build.py.
"""
import torch

from checkpoint.shards import cut_of
from parallel import Bucket, Ranks, split_by_bytes
from scale.cut_gradients import PartGradients
from scale.expert_parallel import OneOwner, mixtures


class ExpertGradients(PartGradients):
    """Gradients of experts, summed over their copies, and of all else, summed over all ranks."""

    axis_name = "expert"

    def __init__(self, model, parameters: dict, ranks: Ranks):
        super().__init__(parameters, ranks)
        self.partial = []
        self.mixtures = mixtures(model)
        self.passes = []        # of a step: (whether it is no filler, MoE.arrived of each layer)

    def make_bucket(self, params: list) -> Bucket:
        cut = cut_of(params[0])
        return Bucket(params, cut.axis.copies if cut else self.ranks.group)

    def grouped(self, bucket_bytes: int) -> list[list]:
        experts = [p for p in self.weights if cut_of(p)]
        others = [p for p in self.weights if not cut_of(p)]
        return split_by_bytes(others, bucket_bytes) + split_by_bytes(experts, bucket_bytes)

    def zero(self):
        """Forget the gradients of the previous step."""
        super().zero()
        self.passes.clear()

    def backward(self, loss: torch.Tensor, batch=None, last: bool = False):
        """Add the gradients of a batch."""
        super().backward(loss, batch, last)
        is_real = batch is None or not batch.filler
        self.passes.append((is_real, [moe.arrived for moe in self.mixtures]))

    def all_reduce(self):
        """Sum over the ranks that have a weight; an expert without a row has no gradient."""
        used = self.experts_with_rows()
        for bucket in self.buckets:
            if cut_of(bucket.params[0]):
                bucket.used = {index for index, p in enumerate(bucket.params)
                               if p in used or not isinstance(cut_of(p), OneOwner)}
        super().all_reduce()

    def experts_with_rows(self) -> set:
        """Weights of own experts at which rows have arrived in this step, not counting fillers."""
        is_real = torch.tensor([is_real for is_real, _ in self.passes])
        first = self.ranks.rank - self.axis.rank
        is_real = self.ranks.gather(is_real)[first:first + self.axis.size]  # of each process
        used = set()
        for number, (_, layers) in enumerate(self.passes):
            for moe, arrived in zip(self.mixtures, layers):
                if moe.config.stacked_experts:          # one weight for all of them
                    continue
                for its_passes, counts in zip(is_real, arrived):
                    if its_passes[number]:
                        for expert, count in zip(moe.experts, counts):
                            used.update(expert.parameters() if count else ())
        return used
