"""How much memory a training run takes, from sizes alone: arithmetic on what the graph keeps, and measured constants.

Units: MB is 2^20 bytes. Constants were measured with MindSpore 2.9 on the CPU (x86-64); the numbers for Ascend come
from the same arithmetic and were not measured on hardware.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

MB = 2**20
LIBRARIES = 460.0  # MB of a process that has run a step: 410 Python and MindSpore's code, 25 kernels, 25 matplotlib
TOKENIZER = 110.0  # MB of transformers and of a tokenizer of 150,000 entries
# Compiled graphs and their kernels, in MB of resident heap. A layer has some 55 operators forward and backward, and an
# adapter 20 more. Where activations are recomputed, forward operators count twice.
GRAPH = 66.0
GRAPH_LAYER = 26.0
GRAPH_LAYER_NATIVE = 16.0  # native operators are fewer
GRAPH_ADAPTER = 4.8
GRAPH_DROPOUT = 0.8  # of an adapter with dropout
GRAPH_UPDATE = 1.2  # of an adapter, in the optimiser
GRAPH_RECOMPUTED = 1.25  # factor on a layer that is recomputed
BLOCK = 2  # layers that share their graphs with others; as in train.shared_layers
SHARED_FROM = 16  # layers of a model; as in nn.sharing
INDEX = 12  # bytes that kernels keep of every number of a layer's hidden states, for as long as the graph lives
INDEX_NATIVE = 4  # with native operators, besides a few of MindSpore's
GAPS = 1.05  # size of the memory pool over what it holds
LOGITS = 3  # matrices [chunk, vocabulary] alive at once in the loss
LOGITS_NATIVE = 2
CHUNK_NUMBERS = 1 << 24  # numbers of such a matrix; as in train.step
PART_NUMBERS = 1 << 24  # numbers of the head that are widened to float32 at once; as in nn.projection
# bytes of a number of the weight that is multiplied, for a moment: its place in the table, itself, absmax, the product
DECODED = 14
OPTIMIZER_WORK = 9  # vectors of all trainable numbers alive at once in the optimiser's graph
OPTIMIZER_WORK_NATIVE = 3


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
    @property
    def windows(self) -> tuple[int, ...]: ...


class AdapterCost(Protocol):
    """What the adapter on one module costs in training."""

    @property
    def trained(self) -> int:
        """Numbers that train."""

    @property
    def kept(self) -> int:
        """Numbers of every token that the backward pass needs besides the module's own input."""


@dataclass(frozen=True)
class Job:
    """All that decides how much memory one process of a run takes."""

    sizes: Sizes  # of this process's part, where processes share a model
    lines: int  # of a micro-batch
    length: int  # tokens of a line
    # of the adapter on each adapted module, by path; None: all parameters train
    costs: Mapping[str, AdapterCost] | None
    # numbers of each module that trains whole beside the adapter, by path, and of biases that do, by theirs
    saved: Mapping[str, int] = field(default_factory=dict)
    dropout: float = 0.0  # on the inputs of adapters
    separate_dropout: bool = False  # by an operator of its own, even with native ones
    adds_factors_alone: bool = False  # ``scaling B A`` to linear layers
    dtype: str = "float32"  # of weights and, on a card, of activations
    recomputed: Collection[int] = field(default_factory=frozenset)  # layers whose activations are recomputed
    tokenizer: bool = True
    device: Literal["CPU", "Ascend"] = "CPU"
    moments: float = 8.0  # bytes of memory for AdamW's moments of a trained number
    swap: bool = False  # these in the host's memory between steps
    native: bool = False  # on the CPU: native operators in place of MindSpore's
    quantised: Collection[str] = field(default_factory=frozenset)  # modules whose weights are in four bits
    quantised_width: float = 0.5625  # bytes of a number of these; NF4's
    quantisable: bool = False  # whether the weights could be quantised as they are loaded

    @property
    def two_bytes(self) -> bool:
        """Whether a weight has two bytes."""
        return self.dtype != "float32"

    @property
    def weight_width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.two_bytes else 4

    @property
    def width(self) -> int:
        """Bytes of a number that flows between layers: on the CPU it is float32, whatever the weights are."""
        return 4 if self.device == "CPU" else self.weight_width

    @property
    def swapped(self) -> float:
        """Bytes per trained number that leave the device between steps."""
        return self.moments if self.swap and self.device == "Ascend" else 0

    @property
    def fused(self) -> bool:
        """Whether attention keeps no [queries, keys] matrix."""
        return self.native if self.device == "CPU" else self.two_bytes


@dataclass(frozen=True)
class Estimate:
    """MB by purpose."""

    libraries: float
    weights: float
    training: float  # what trains, its gradient and AdamW's moments
    graphs: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.libraries + self.weights + self.training + self.graphs + self.activations + self.logits


def modules(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Dense layers of the decoder: path -> (inputs, outputs)."""
    h = sizes.hidden_size
    f = sizes.intermediate_size
    q = sizes.num_attention_heads * sizes.head_dim
    kv = sizes.num_key_value_heads * sizes.head_dim
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
    """Numbers of the model without an adapter."""
    dense = modules(sizes)
    if sizes.tie_word_embeddings:
        del dense["lm_head"]
    kv = sizes.num_key_value_heads * sizes.head_dim
    biases = sizes.num_attention_heads * sizes.head_dim + 2 * kv if sizes.attention_bias else 0
    norms = 2 * sizes.hidden_size
    rest = sizes.num_hidden_layers * (norms + biases) + sizes.hidden_size
    return sum(inputs * outputs for inputs, outputs in dense.values()) + rest


def weights_mb(job: Job) -> float:
    """MB of the model's weights, without those that copies of their own, which train, take the place of."""
    dense = modules(job.sizes)
    numbers = sum(dense[name][0] * dense[name][1] for name in job.quantised)
    # the matrix that the head shares with the embedding stays for the other one, and goes when both have copies
    shared = ("model.embed_tokens", "lm_head") if job.sizes.tie_word_embeddings else ()
    staying = [name for name in shared if name in job.saved][:1]
    replaced = [name for name in job.saved if name not in staying]
    quantised = sum(job.saved[name] for name in replaced if name in job.quantised)
    whole = sum(job.saved[name] for name in replaced) - quantised
    rest = parameters(job.sizes) - numbers - whole
    return ((numbers - quantised) * job.quantised_width + rest * job.weight_width) / MB


def decoded_mb(job: Job) -> float:
    """MB of the largest weight in four bits while it is multiplied; the native operators decode it piece by piece."""
    if job.native:
        return 0.0
    dense = modules(job.sizes)
    largest_one = max((dense[name][0] * dense[name][1] for name in job.quantised), default=0)
    return largest_one * DECODED / MB


def trainable(job: Job) -> int:
    """Numbers that train."""
    if job.costs is None:
        return parameters(job.sizes)
    return sum(cost.trained for cost in job.costs.values()) + sum(job.saved.values())


def kept(job: Job, layer: int) -> tuple[float, float]:
    """MB that the backward pass needs of a layer's forward pass: of its attention, and of its feed-forward block."""
    s = job.sizes
    tokens = job.lines * job.length
    h = s.hidden_size
    q = s.num_attention_heads * s.head_dim
    kv = s.num_key_value_heads * s.head_dim
    # hidden states before the norm, queries, attention's output, keys and values
    attention = tokens * (h + 2 * q + 2 * kv)
    if not job.fused:
        attention += job.lines * s.num_attention_heads * job.length**2
    # hidden states before the norm, gate and up; MindSpore's operators also keep their product
    feed_forward = tokens * (h + (2 if job.native else 3) * s.intermediate_size)
    dense = modules(s)
    prefix = f"model.layers.{layer}."
    if layer >= in_blocks(job):  # a block's backward graph computes the inputs of adapters again
        attention += tokens * _adapter_inputs(job, dense, f"{prefix}self_attn.")
        feed_forward += tokens * _adapter_inputs(job, dense, f"{prefix}mlp.")
    return attention * job.width / MB, feed_forward * job.width / MB


def _adapter_inputs(job: Job, dense: Mapping[str, tuple[int, int]], prefix: str) -> int:
    # numbers per token that the gradients of adapters need: their inputs, and what they keep besides
    adapted = [name for name in dense if name.startswith(prefix) and (job.costs is None or name in job.costs)]
    saved = {name for name in job.saved if name in dense and name.startswith(prefix)}
    kept_besides = 0 if job.costs is None else sum(job.costs[name].kept for name in adapted)
    if job.dropout and (
        not job.native or job.separate_dropout
    ):  # then each adapter has its own dropped input and its mask
        return kept_besides + 2 * sum(dense[name][0] for name in adapted) + sum(dense[name][0] for name in saved)
    needed = saved.union(adapted)
    shared = {name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_", "gate_") for name in needed}
    return kept_besides + sum(dense[name][0] for name in shared)


def working(job: Job) -> tuple[float, float]:
    """MB that the backward pass of a layer holds for a moment besides: of its attention, and of the rest."""
    s = job.sizes
    tokens = job.lines * job.length
    attention = 0 if job.fused else 3 * job.lines * s.num_attention_heads * job.length**2
    return attention * job.width / MB, tokens * (4 * s.intermediate_size + 2 * s.hidden_size) * job.width / MB


def tables(job: Job) -> float:
    """MB of the rotary tables, which all layers share, and of the attention masks, one for each kind of window."""
    s = job.sizes
    tokens = job.lines * job.length
    rotary = 2 * tokens * (s.num_attention_heads + s.num_key_value_heads) * s.head_dim * job.width
    masks = len(s.windows) * job.lines * job.length**2 * (1 if job.fused else 4 * s.num_attention_heads)
    return (rotary + masks) / MB


def in_blocks(job: Job) -> int:
    """How many layers, from the lowest, run in blocks that share graphs; as in train.gradient."""
    count = job.sizes.num_hidden_layers
    shares = len({*job.recomputed}) == count or (job.device == "CPU" and count >= SHARED_FROM)
    return (count - 1) // BLOCK * BLOCK if shares else 0


def compiled(job: Job) -> list[int]:
    """Layers that have graphs: the last one where the others are one operator; else the first block of those that share
    theirs, and all others."""
    if job.native and job.adds_factors_alone and not job.recomputed:
        return [job.sizes.num_hidden_layers - 1]
    count = in_blocks(job)
    return [*range(min(count, BLOCK)), *range(count, job.sizes.num_hidden_layers)]


def operators_mb(job: Job) -> float:
    """MB of the layers' graphs, and of the optimiser's."""
    adapters = [7 / 4 if job.costs is None else 0.0] * job.sizes.num_hidden_layers  # of each layer
    for name in job.costs or ():
        if name.startswith("model.layers."):
            adapters[int(name.split(".")[2])] += 1
    adapter = GRAPH_ADAPTER + GRAPH_DROPOUT * (job.dropout > 0)
    with_graphs = compiled(job)
    # a layer that shares its graphs has them forward and backward apart, so that nothing is there twice
    recomputed = {*job.recomputed} if len(with_graphs) == len(adapters) else ()
    layer = GRAPH_LAYER_NATIVE if job.native else GRAPH_LAYER
    layers = ((layer + adapter * adapters[i]) * (GRAPH_RECOMPUTED if i in recomputed else 1.0) for i in with_graphs)
    return sum(layers) + GRAPH_UPDATE * sum(adapters)


def estimate(job: Job) -> Estimate:
    """The peak of a training run."""
    s = job.sizes
    tokens = job.lines * job.length
    layers = range(s.num_hidden_layers)
    count = trainable(job)
    recomputed = {*job.recomputed}
    chunk = min(tokens, max(16, CHUNK_NUMBERS // s.vocab_size))
    matrices = LOGITS_NATIVE if job.native else LOGITS
    logits = chunk * s.vocab_size * (10 if job.width == 2 else 4 * matrices) / MB
    if job.two_bytes and job.device == "CPU" and not job.native:  # the head is widened to float32 part by part
        logits += 4 * PART_NUMBERS / MB
    inputs = 2 * len(recomputed) * tokens * s.hidden_size * job.width / MB  # of both halves of a layer
    rest = inputs + sum(sum(kept(job, i)) for i in layers if i not in recomputed) + tables(job)
    # a recomputed layer has one of its halves in memory at a time
    halves = [0.0, 0.0]
    if recomputed:
        halves = [max(parts) for parts in zip(*(kept(job, i) for i in recomputed), strict=True)]
    backward = rest + max(half + work for half, work in zip(halves, working(job), strict=True)) + decoded_mb(job)
    gradients = 2 * 4 * count / MB
    update = 4 * (OPTIMIZER_WORK_NATIVE if job.native else OPTIMIZER_WORK) * count / MB
    peak = GAPS * max(rest + logits, backward + gradients, update + job.swapped * count / MB)
    width = 0 if job.device == "Ascend" else INDEX_NATIVE if job.native else INDEX
    index = width * tokens * s.hidden_size * len(compiled(job)) / MB
    of_loss = min(GAPS * logits, peak)
    return Estimate(
        libraries=LIBRARIES + TOKENIZER * job.tokenizer,
        weights=weights_mb(job),
        training=((8 if job.costs is not None else 4) + job.moments - job.swapped) * count / MB,
        graphs=GRAPH + operators_mb(job) + index,
        activations=peak - of_loss,
        logits=of_loss,
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that fits, 0 where none does; below a number that fits, all must fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def largest_batch(job: Job, room: float, most: int = 4096) -> int:
    """Lines of ``job.length`` tokens that fit into ``room`` MB at once; 0 where not one does."""
    return largest(lambda lines: estimate(replace(job, lines=lines)).total <= room, most)


def largest_length(job: Job, room: float, most: int = 131_072) -> int:
    """Tokens of a single line that fit into ``room`` MB, a multiple of 64; 0 where none do."""
    return 64 * largest(lambda n: estimate(replace(job, lines=1, length=64 * n)).total <= room, most // 64)


def remedies(job: Job, room: float) -> list[str]:
    """Keys to change, one after another, until the run fits into ``room`` MB; empty where nothing makes it fit."""
    every = frozenset(range(job.sizes.num_hidden_layers))
    trains_adapter = job.costs is not None  # else weights stay float32
    steps: list[tuple[str, Job]] = []
    if job.lines > 1:
        lines = max(1, largest_batch(job, room))
        text = f"runner_config.batch_size {lines} with gradient_accumulation_steps x {-(-job.lines // lines)}"
        steps.append((text, replace(job, lines=lines)))
    one = replace(job, lines=1)
    if {*job.recomputed} != every:
        steps.append(("recompute_config.recompute True", replace(one, recomputed=every)))
    if not job.two_bytes and trains_adapter:
        steps.append(("model.model_config.compute_dtype float16", replace(one, recomputed=every, dtype="float16")))
    last = replace(one, recomputed=every, dtype="float16" if trains_adapter and not job.two_bytes else job.dtype)
    layers = frozenset(name for name in modules(job.sizes) if name.startswith("model.layers."))
    if job.quantisable and trains_adapter and not job.quantised:
        last = replace(last, quantised=layers)
        steps.append(("model.model_config.quantization_config nf4 (--quantize)", last))
    length = largest_length(last, room, job.length)
    if 0 < length < job.length:
        steps.append((f"model.model_config.seq_length {length}", replace(last, length=length)))
    found = []
    for text, changed in steps:
        found.append(text)
        if estimate(changed).total <= room:
            return found
    return []
