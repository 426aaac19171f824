"""How much memory a run takes, from its sizes alone: arithmetic on what the graph keeps, and a few measured constants.

Units: MB is 2^20 bytes. Constants were measured with MindSpore 2.9 on the CPU (x86-64); what is said of Ascend follows
from the same arithmetic and was not measured on hardware.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

MB = 2**20
LIBRARIES = 460.0  # MB of a process that has run a step: 410 Python and MindSpore's code, 25 kernels, 25 matplotlib
TOKENIZER = 110.0  # MB of transformers and of a tokenizer of 150,000 entries
# The graph, its compilation and its kernels, in MB of resident heap: by operators, of which a layer has some 55 forward
# and backward, and 20 more for every adapter. Where activations are computed again, forward operators count twice.
GRAPH = 66.0
GRAPH_LAYER = 26.0
GRAPH_LAYER_OWN = 16.0  # of our own operators, which are fewer
GRAPH_ADAPTER = 4.8
GRAPH_DROPOUT = 0.8  # of an adapter with dropout
GRAPH_UPDATE = 1.2  # of an adapter, in the optimiser
GRAPH_AGAIN = 1.25
BLOCK = 3  # layers that share their graphs with others where all are computed again; train.layerwise has it
INDEX = 12  # bytes that kernels keep of every number of a layer's hidden states, for as long as the graph lives
INDEX_OWN = 4  # of our own operators, beside a few of MindSpore's
GAPS = 1.05  # of the pool: what lies between its pieces
LOGITS = 3  # matrices [chunk, vocabulary] alive at once in the loss
LOGITS_OWN = 2
CHUNK_NUMBERS = 1 << 24  # of the loss; train.step has it
PART_NUMBERS = 1 << 24  # of the head that are widened at once; nn.product has it
OPTIMIZER_WORK = 9  # vectors of all trainable numbers alive at once in the optimiser's graph
OPTIMIZER_WORK_OWN = 7


class Sizes(Protocol):
    """A decoder's sizes, as ``DecoderConfig`` names them."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class Job:
    """All that decides how much memory a process of a run takes."""

    sizes: Sizes  # of its part, where processes share a model
    lines: int  # of a micro-batch
    length: int  # tokens of a line
    ranks: Mapping[str, int] | None  # rank of the adapter on each adapted module, by path; None: all parameters train
    dropout: float = 0.0
    half: bool = False  # float16 weights and activations
    again: Collection[int] = field(default_factory=frozenset)  # layers whose activations are computed again
    tokenizer: bool = True
    device: Literal["CPU", "Ascend"] = "CPU"
    swap: bool = False  # AdamW's moments in the host's memory between steps
    own: bool = False  # on the CPU: our own operators, not MindSpore's
    lora_bias: bool = False

    @property
    def weight_width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.half else 4

    @property
    def width(self) -> int:
        """Bytes of what flows between layers: float32 on the CPU, whatever the weights are."""
        return 4 if self.device == "CPU" else self.weight_width

    @property
    def swapped(self) -> int:
        """Bytes of a trained number that leave the device between steps."""
        return 8 if self.swap and self.device == "Ascend" else 0

    @property
    def fused(self) -> bool:
        """Whether attention keeps no [queries, keys] matrix."""
        return self.own if self.device == "CPU" else self.half


@dataclass(frozen=True)
class Estimate:
    """MB by purpose."""

    libraries: float
    weights: float
    training: float  # adapter, its gradient and AdamW's moments
    graphs: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.libraries + self.weights + self.training + self.graphs + self.activations + self.logits


def modules(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Dense layers of the decoder: path -> (inputs, outputs)."""
    h, f = sizes.hidden_size, sizes.intermediate_size
    q, kv = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    shapes = {
        "self_attn.q_proj": (h, q),
        "self_attn.k_proj": (h, kv),
        "self_attn.v_proj": (h, kv),
        "self_attn.o_proj": (q, h),
        "mlp.gate_proj": (h, f),
        "mlp.up_proj": (h, f),
        "mlp.down_proj": (f, h),
    }
    found = {f"model.layers.{i}.{name}": s for i in range(sizes.num_hidden_layers) for name, s in shapes.items()}
    return {"model.embed_tokens": (sizes.vocab_size, h), **found, "lm_head": (h, sizes.vocab_size)}


def parameters(sizes: Sizes) -> int:
    """Numbers of the bare model."""
    dense = modules(sizes)
    if sizes.tie_word_embeddings:
        del dense["lm_head"]
    kv = sizes.num_key_value_heads * sizes.head_dim
    biases = sizes.num_attention_heads * sizes.head_dim + 2 * kv if sizes.attention_bias else 0
    norms = 2 * sizes.hidden_size
    rest = sizes.num_hidden_layers * (norms + biases) + sizes.hidden_size
    return sum(inputs * outputs for inputs, outputs in dense.values()) + rest


def trainable(job: Job) -> int:
    """Numbers that train."""
    if job.ranks is None:
        return parameters(job.sizes)
    dense = modules(job.sizes)
    return sum(rank * sum(dense[name]) for name, rank in job.ranks.items())


def kept(job: Job, layer: int) -> tuple[float, float]:
    """MB that the backward pass needs of a layer's forward pass: of its attention, and of its feed-forward block."""
    s, tokens = job.sizes, job.lines * job.length
    h, f = s.hidden_size, s.intermediate_size
    q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    # before the norm; queries and attention's output, keys and values; gate and up, and what MindSpore's operators
    # leave of their product
    attention, feed = tokens * (h + 2 * q + 2 * kv), tokens * (h + (2 if job.own else 3) * f)
    if not job.fused:
        attention += job.lines * s.num_attention_heads * job.length**2
    dense, prefix = modules(s), f"model.layers.{layer}."
    attention += tokens * _adapter_inputs(job, dense, f"{prefix}self_attn.")
    feed += tokens * _adapter_inputs(job, dense, f"{prefix}mlp.")
    return attention * job.width / MB, feed * job.width / MB


def _adapter_inputs(job: Job, dense: Mapping[str, tuple[int, int]], prefix: str) -> int:
    # numbers of a token that gradients of adapters need: their inputs and low products
    adapted = [name for name in dense if name.startswith(prefix) and (job.ranks is None or name in job.ranks)]
    low = sum((job.ranks or {}).get(name, 0) for name in adapted)
    if job.dropout and (not job.own or job.lora_bias):  # each has its own input then, and its zeros
        return low + 2 * sum(dense[name][0] for name in adapted)
    shared = {name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_", "gate_") for name in adapted}
    return low + sum(dense[name][0] for name in shared)


def working(job: Job) -> tuple[float, float]:
    """MB that the backward pass of a layer holds besides, for a moment: of its attention, and of the rest."""
    s, tokens = job.sizes, job.lines * job.length
    attention = 0 if job.fused else 3 * job.lines * s.num_attention_heads * job.length**2
    return attention * job.width / MB, tokens * (4 * s.intermediate_size + 2 * s.hidden_size) * job.width / MB


def tables(job: Job) -> float:
    """MB of the rotary tables and of the mask, which all layers share."""
    s, tokens = job.sizes, job.lines * job.length
    rotary = 2 * tokens * (s.num_attention_heads + s.num_key_value_heads) * s.head_dim * job.width
    mask = job.lines * job.length**2 * (1 if job.fused else 4 * s.num_attention_heads)
    return (rotary + mask) / MB


def compiled(job: Job) -> list[int]:
    """Layers whose graphs there are: of those that are alike, a block and the rest where all are computed again."""
    layers = list(range(job.sizes.num_hidden_layers))
    if {*job.again} != {*layers}:
        return layers
    blocks = (len(layers) - 1) // BLOCK
    return [*layers[: BLOCK * min(blocks, 1)], *layers[BLOCK * blocks :]]


def operators_mb(job: Job) -> float:
    """MB of the layers' graphs, and of the optimiser's."""
    every = [7 / 4 if job.ranks is None else 0.0] * job.sizes.num_hidden_layers
    for name in job.ranks or ():
        if name.startswith("model.layers."):
            every[int(name.split(".")[2])] += 1
    adapter, shared = GRAPH_ADAPTER + GRAPH_DROPOUT * (job.dropout > 0), compiled(job)
    again = {*job.again} if len(shared) == len(every) else ()
    layer = GRAPH_LAYER_OWN if job.own else GRAPH_LAYER
    layers = ((layer + adapter * every[i]) * (GRAPH_AGAIN if i in again else 1.0) for i in shared)
    return sum(layers) + GRAPH_UPDATE * sum(every)


def estimate(job: Job) -> Estimate:
    """The peak of a training run."""
    s, tokens, layers = job.sizes, job.lines * job.length, range(job.sizes.num_hidden_layers)
    count, again = trainable(job), {*job.again}
    chunk = min(tokens, max(16, CHUNK_NUMBERS // s.vocab_size))
    matrices = LOGITS_OWN if job.own else LOGITS
    logits = chunk * s.vocab_size * (10 if job.width == 2 else 4 * matrices) / MB
    if job.half and job.device == "CPU" and not job.own:  # weights widened, one matrix at a time
        logits += 4 * PART_NUMBERS / MB
    inputs = 2 * len(again) * tokens * s.hidden_size * job.width / MB  # of both halves of a layer
    rest = inputs + sum(sum(kept(job, i)) for i in layers if i not in again) + tables(job)
    # a layer that is computed again has one of its halves there at a time
    halves = [0.0, 0.0] if not again else [max(parts) for parts in zip(*(kept(job, i) for i in again), strict=True)]
    backward = rest + max(half + work for half, work in zip(halves, working(job), strict=True))
    gradients = 2 * 4 * count / MB
    update = 4 * (OPTIMIZER_WORK_OWN if job.own else OPTIMIZER_WORK) * count / MB
    peak = GAPS * max(rest + logits, backward + gradients, update + job.swapped * count / MB)
    width = 0 if job.device == "Ascend" else INDEX_OWN if job.own else INDEX
    index = width * tokens * s.hidden_size * len(compiled(job)) / MB
    of_loss = min(GAPS * logits, peak)
    return Estimate(
        libraries=LIBRARIES + TOKENIZER * job.tokenizer,
        weights=parameters(s) * job.weight_width / MB,
        training=((16 if job.ranks is not None else 12) - job.swapped) * count / MB,
        graphs=GRAPH + operators_mb(job) + index,
        activations=peak - of_loss,
        logits=of_loss,
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that fits, 0 for none; what is smaller fits too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def largest_batch(job: Job, room: float, most: int = 4096) -> int:
    """Lines of ``job.length`` tokens that fit into ``room`` MB at once; 0 where not one does."""
    return largest(lambda lines: estimate(replace(job, lines=lines)).total <= room, most)


def largest_length(job: Job, room: float, most: int = 131_072) -> int:
    """Tokens of a single line that fit into ``room`` MB, a multiple of 64; 0 where none do."""
    return 64 * largest(lambda n: estimate(replace(job, lines=1, length=64 * n)).total <= room, most // 64)


def remedies(job: Job, room: float) -> list[str]:
    """Keys to change, one after another, until the run fits into ``room`` MB; with what it takes then, last."""
    every = frozenset(range(job.sizes.num_hidden_layers))
    found = []
    steps: list[tuple[str, Job]] = []
    if job.lines > 1:
        lines = max(1, largest_batch(job, room))
        text = f"runner_config.batch_size {lines} with gradient_accumulation_steps x {-(-job.lines // lines)}"
        steps.append((text, replace(job, lines=lines)))
    one = replace(job, lines=1)
    if {*job.again} != every:
        steps.append(("recompute_config.recompute True", replace(one, again=every)))
    if not job.half and job.ranks is not None:
        steps.append(("model.model_config.compute_dtype float16", replace(one, again=every, half=True)))
    last = replace(one, again=every, half=job.half or job.ranks is not None)
    length = largest_length(last, room, job.length)
    if 0 < length < job.length:
        steps.append((f"model.model_config.seq_length {length}", replace(last, length=length)))
    for text, changed in steps:
        found.append(text)
        if estimate(changed).total <= room:
            return found
    return []
