"""Pipeline parallelism: each process of an axis holds some consecutive layers, a stage.

    torchrun --nproc-per-node 2 train.py --config my.yaml pipeline_parallel_size=2

    first stage     embedding and its layers
    last stage      its layers, the last norm, the head and the loss

What a stage computes from a micro-batch, x (1, N, D), it sends to the next one, and receives the
gradient of x (scale/stage_messages.py). When a backward pass runs is the schedule, 1F1B
(scale/stage_gradients.py).

    dropout     every stage draws the masks of all layers, and so has the numbers of one process
    balance     the experts' balance loss is one of all layers: tokens and probabilities of each
                expert are summed from stage to stage, beside x, and the gradient comes back

The twin is one process.

Requires: scale/stage_messages.py, checkpoint/shards.py, model.py.
Next: scale/stage_gradients.py; runtime/stages.py, which shares the layers out.
Papers: GPipe arXiv:1811.06965, 1F1B arXiv:2006.09503 (sec. 2.2) and arXiv:2104.04473 (sec. 2.2).
"""
from functools import partial

import torch

from checkpoint.shards import Held, parameter_like, replace_parameters
from losses import Objective, balance_of_sums, routing_sums
from scale.mesh import Axis
from scale.stage_messages import PipelineStage


def keep_stage(model, axis: Axis, stages: list[range], dtype: torch.dtype, device: torch.device,
               neftune: bool):
    """Leave a model, whose adapters are attached, only the layers of this stage, in place.

    All other parameters stay, without storage (device meta), so that names, numbers of layers and
    counts are those of the whole model. stages: the layers of each. dtype: of x between the blocks.
    neftune: whether the embeddings get noise in training. Raises ValueError for dropout of experts.
    """
    owners = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(p, set()).add(stage_of(name, stages))

    def kept(p):
        held = Held(tuple(sorted(owners[p])), axis, device)
        p = p if held.here else parameter_like(p, "meta")
        p.held = held
        return p

    replace_parameters(model, kept)
    model.stage = PipelineStage(model, axis, stages, dtype, device, neftune)
    model.forward = partial(forward_of_stage, model, model.stage)


def stage_of(name: str, stages: list[range]) -> int:
    """The stage that holds a parameter."""
    if name.startswith("model.embed_tokens."):
        return 0
    if not name.startswith("model.layers."):
        return len(stages) - 1
    layer = int(name.split(".")[2])
    return next(number for number, layers in enumerate(stages) if layer in layers)


def forward_of_stage(model, stage: PipelineStage, input_ids, position_ids, layout=None, cache=None,
                     routers: list | None = None):
    """CausalLM.forward of a stage: (B, T, D) after its layers; on the last one, normalized."""
    with_sums = routers is not None and stage.experts > 0
    x, sums = (model.embed(input_ids), None) if stage.is_first else stage.input(input_ids.shape,
                                                                                with_sums)
    if model.training and stage.noise and torch.is_grad_enabled():
        torch.rand_like(x, dtype=torch.float32)                 # as optim.add_neftune
    if model.training:
        stage.draw_masks(range(stage.layers.start), x)
    ctx = model.context(position_ids, x, layout, cache, routers)
    for layer in stage.layers:
        x = model.model.layers[layer](x, ctx)
    if model.training:
        stage.draw_masks(range(stage.layers.stop, len(model.model.layers)), x)
    stage.sums = sums
    if with_sums and routers:
        own = torch.stack(routing_sums(routers, model.config.num_experts_per_tok))
        stage.sums = own if sums is None else sums + own
    elif with_sums and sums is None:
        stage.sums = torch.zeros(2, stage.experts, device=stage.device)
    return model.for_head(model.model.norm(x)) if stage.is_last else x


def balance_of_stages(model, routers: list):
    """SFTObjective.balance_of on the last stage: the balance loss of the layers of all stages."""
    sums = model.stage.sums
    return 0.0 if sums is None else balance_of_sums(*sums, model.config.num_experts_per_tok)


class StageObjective(Objective):
    """An objective below the last stage: a forward pass whose output is sent; its loss is 0."""

    def __init__(self, whole: Objective, config):
        super().__init__(whole.matmul)
        self.whole = whole
        self.config = config
        self.metric_names = whole.metric_names

    def loss_sum(self, model, batch):
        balance = getattr(self.whole, "balance", 0.0)
        routers = [] if balance and not batch.filler else None
        return self.forward(model, batch, routers), 0.0, {}

    def forward(self, model, batch, routers: list | None = None):
        """Compute the layers of this stage, and send."""
        x = model(batch.input_ids, batch.position_ids, batch.layout, routers=routers)
        return model.stage.output(x)

    @torch.no_grad()
    def with_reference(self, model, batches: list) -> list:
        """A pass of the reference for each batch; the last stage has its log-probabilities."""
        if self.config.has_reference:
            with self.whole.reference_model(model) as reference:
                for batch in batches:
                    self.forward(reference, batch)
        return batches
