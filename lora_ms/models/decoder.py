"""The decoder of all families: one body, told apart by numbers. Cells bear Hugging Face's names."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from lora_ms.models.rope_settings import longest_text
from lora_ms.nn.attention import Attention, first_in_window
from lora_ms.nn.graph import Graph
from lora_ms.nn.kv_cache import KVCache
from lora_ms.nn.layers import (
    MLP,
    Embedding,
    Head,
    MakeProjection,
    RMSNorm,
    SplitEmbedding,
    dense_projections,
    inside,
)
from lora_ms.nn.linear import LayerOperands, operands_of
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.nn.rope import RotaryTables, rotation_of
from lora_ms.ops import PORTABLE, Operators
from lora_ms.ops.operators import Visibility


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, by Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None
    max_position_embeddings: int = 2048  # tokens
    sliding_window: int = 0  # tokens that a query of ``sliding_layers`` sees, itself included
    sliding_layers: tuple[int, ...] = ()  # indices; the other layers see all before a query
    unrotated_layers: tuple[int, ...] = ()  # indices; queries and keys are not rotated there (SmolLM3)
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    qk_norm: bool = False  # normalised queries and keys (Qwen3)
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    flash_attention: bool = True  # use the device's fused attention, where it has one

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Of each layer, the tokens that a query sees, itself included; 0: all before it."""
        return tuple(self.sliding_window if i in self.sliding_layers else 0 for i in range(self.num_hidden_layers))

    @property
    def windows(self) -> tuple[int, ...]:
        """The different ones among ``layer_windows``: one, or two."""
        return tuple(dict.fromkeys(self.layer_windows))

    @property
    def window_indices(self) -> tuple[int, ...]:
        """Of each layer, the index of its window in ``windows``."""
        return tuple(self.windows.index(window) for window in self.layer_windows)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model is made for; see ``rope_settings.longest_text``."""
        return longest_text(self.max_position_embeddings, self.rope_scaling)


def weight_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of ``CausalLM``, known before anything is built."""
    hidden, width = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        layer[f"self_attn.{name}.weight"] = (rows, hidden)
        if config.attention_bias:
            layer[f"self_attn.{name}.bias"] = (rows,)
    layer["self_attn.o_proj.weight"] = (hidden, q)
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    layer |= {
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.up_proj.weight": (config.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, config.intermediate_size),
    }
    layers = range(config.num_hidden_layers)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    shapes |= {f"model.layers.{number}.{name}": shape for number in layers for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config.tie_word_embeddings else {**shapes, "lm_head.weight": (config.vocab_size, hidden)}


class DecoderLayer(nn.Cell):
    """Attention and feed-forward, each behind a norm and beside a residual; x [t, h].

    index: of the layer in the model, from 0.
    """

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        dtype: ms.Type,
        make: MakeProjection,
        operators: Operators,
        shard: Shard,
    ):
        super().__init__()
        c = config
        self.shared = shard.count > 1
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, operators)
        self.self_attn = Attention(
            hidden_size=c.hidden_size,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            qkv_bias=c.attention_bias,
            qk_norm_eps=c.rms_norm_eps if c.qk_norm else None,
            flash_attention=c.flash_attention,
            dtype=dtype,
            make=inside("self_attn", make),
            operators=operators,
            shard=shard,
            rotates=index not in c.unrotated_layers,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, operators)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, inside("mlp", make), operators, shard)

    def construct(self, x: Tensor, rope: tuple, visible: Visibility, rows: Tensor | None = None) -> Tensor:
        """rows [c]: the tokens whose output is needed, all where None; only they pass what follows the attention."""
        return self.feed(self.attend(x, rope, visible, rows))

    def attend(self, x: Tensor, rope: tuple, visible: Visibility, rows: Tensor | None = None) -> Tensor:
        """The first half: x [t, h] -> [t, h], or [c, h]."""
        q, k, v = self.project(x)
        return self.join(x, self.self_attn.mix(q, k, v, rope, visible), rows)

    def feed(self, x: Tensor) -> Tensor:
        """The second half: x [t, h] -> [t, h]."""
        gate, up = self.expand(x)
        return self.contract(x, gate, up)

    # the steps of the two halves, between which a gradient keeps what it needs

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [t, h] -> queries, keys and values; see ``Attention.project``."""
        return self.self_attn.project(self.input_layernorm(x))

    def join(self, x: Tensor, mixed: Tensor, rows: Tensor | None) -> Tensor:
        """x [t, h] and what the attention mixed [t, n_h * d] -> [t, h], or [c, h]."""
        if rows is not None:
            x = ops.gather(x, rows, 0)
            mixed = ops.gather(mixed, rows, 0)
        return x + self.self_attn.output(mixed)

    def expand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [t, h] -> gate and up; see ``MLP.expand``."""
        return self.mlp.expand(self.post_attention_layernorm(x))

    def contract(self, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """x [t, h], gate and up -> [t, h]."""
        return x + self.mlp.contract(gate, up)

    def operands(self) -> LayerOperands | None:
        """What it consists of; None: adapters have changed more than linear layers, or other ranks have parts of it."""
        attention, mlp = self.self_attn, self.mlp
        four, three = attention.operands(), operands_of((mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        norms = [self.input_layernorm, self.post_attention_layernorm, *attention.norms()]
        if self.shared or four is None or three is None or not all(type(norm) is RMSNorm for norm in norms):
            return None
        return LayerOperands(attention.rotates, [norm.weight for norm in norms], four + three, self.input_layernorm.eps)

    def cached(self, x: Tensor, rope: tuple, visible: Visibility, cache: tuple) -> Tensor:
        """New tokens only; see ``Attention.mix_cached``."""
        q, k, v = self.project(x)
        return self.feed(self.join(x, self.self_attn.mix_cached(q, k, v, rope, visible, cache), None))


class DecoderInputs(nn.Cell):
    """What stands before the layers of a decoder.

    Args:
        windows: the different ones among the layers: tokens that a query sees, itself included; 0: all before it.
        window_indices: of each layer, the index of its window.
        stream: the type of what flows between layers.
        auto_prefix: whether the parameters get names of this cell.
    """

    def __init__(
        self,
        embed_tokens: Embedding,
        rotary_tables: RotaryTables,
        make_visible: nn.Cell,
        windows: tuple[int, ...],
        window_indices: tuple[int, ...],
        stream: ms.Type,
        auto_prefix: bool = True,
    ):
        super().__init__(auto_prefix=auto_prefix)
        self.embed_tokens = embed_tokens
        self.rotary_tables = rotary_tables
        self.make_visible = make_visible
        self.windows = windows
        self.window_indices = window_indices
        self.stream = stream
        self.spread = ops.MatMul()

    def alone(self) -> "DecoderInputs":
        """The same cells, as they are now, without the layers of a decoder: a graph of it compiles nothing else."""
        cells = self.embed_tokens, self.rotary_tables, self.make_visible
        return DecoderInputs(*cells, self.windows, self.window_indices, self.stream, auto_prefix=False)

    def rope(self, position_ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """The four of ``rotary_tables``, and the positions themselves: position_ids [t], that of padding as 0."""
        positions = ops.maximum(position_ids.astype(ms.int32), 0)
        return self.rotary_tables(positions, lengths, self.embed_tokens.unrotated) + (positions,)

    def embed(self, input_ids: Tensor, real: Tensor) -> Tensor:
        """input_ids [b, s] -> x [t, h], zero where ``real`` [t] is false."""
        x = self.embed_tokens(input_ids.reshape((-1,))).astype(self.stream)
        spread = self.spread(real.astype(x.dtype).reshape((-1, 1)), ops.ones((1, x.shape[1]), x.dtype))
        return x * spread

    def visibility(self, position_ids: Tensor) -> tuple[Visibility, ...]:
        """What every token sees through each of ``windows``: position_ids [b, s], from 0 in each row."""
        batch, seq = position_ids.shape
        places = ops.tile(Tensor(np.arange(seq, dtype=np.int32)[None]), (batch, 1))
        first = places - position_ids.astype(ms.int32)
        visible: tuple[Visibility, ...] = ()
        for window in self.windows:
            visible = visible + (self.make_visible(first_in_window(first, places, window)),)
        return visible

    def of_layers(self, visible: tuple[Visibility, ...]) -> tuple[Visibility, ...]:
        """What every token sees in each layer, of what it sees through each of ``windows``."""
        found: tuple[Visibility, ...] = ()
        for i in self.window_indices:
            found = found + (visible[i],)
        return found

    # generation

    def cached_inputs(
        self, input_ids: Tensor, cache: KVCache, lines: Tensor, start: Tensor, lengths: Tensor
    ) -> tuple[Tensor, ...]:
        """New tokens input_ids [b, s] of the lines ``lines`` [b] of ``cache``, from slot ``start`` [b] on -> what the
        layers take.

        lengths [b]: tokens of each line, as far as they are known; new tokens beyond them are padding. See also
        ``RotaryTables``.
        Returns x [b * s, h], what ``rope`` gives (5), the rows of the cache where they are put, where
        their heads begin in it, and what each token sees through each of ``windows`` ….
        """
        new = input_ids.shape[1]
        lengths = ops.tile(lengths.reshape((-1, 1)), (1, new)).reshape((-1,))
        positions, real, rows, begins, visible = cache(new, lines, start, lengths)
        return (self.embed(input_ids, real),) + self.rope(positions, lengths) + (rows, begins) + visible


class Decoder(DecoderInputs):
    """input_ids [b, s] -> normalised hidden states [t, h], or those of the tokens ``rows`` [c] alone.

    position_ids [b, s]: where a line holds several rows, each from 0; a token sees its own row, up to itself; in a
    layer with a sliding window, the last tokens of these. -1 for padding, which no token sees: its embedding is zero,
    and where it sees nothing either it stays so, and native operators leave it out.
    """

    def __init__(self, config: DecoderConfig, dtype: ms.Type, make: MakeProjection, operators: Operators, shard: Shard):
        c = config
        heads = c.num_attention_heads // shard.count
        kv_heads = c.num_key_value_heads // shard.count
        stream = operators.stream_dtype(dtype)
        if shard.count > 1:
            embedding: Embedding = SplitEmbedding(c.vocab_size, c.hidden_size, dtype, operators, shard)
        else:
            embedding = Embedding.zeros(c.vocab_size, c.hidden_size, dtype, operators)
        rotation = rotation_of(c.head_dim, c.rope_theta, c.rope_scaling, c.max_position_embeddings)
        tables = RotaryTables(c.head_dim, heads, kv_heads, rotation, stream)
        visible = operators.visibility(num_heads=heads, num_kv_heads=kv_heads, dtype=dtype, flash=c.flash_attention)
        super().__init__(embedding, tables, visible, c.windows, c.window_indices, stream)
        self.operators = operators
        layers = [
            DecoderLayer(c, i, dtype, inside(f"layers.{i}", make), operators, shard) for i in range(c.num_hidden_layers)
        ]
        self.layers = nn.CellList(layers)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype, operators)

    def construct(self, input_ids: Tensor, position_ids: Tensor, rows: Tensor | None = None) -> Tensor:
        rope = self.rope(position_ids.reshape((-1,)))
        visible = self.of_layers(self.visibility(position_ids))
        x = self.embed(input_ids, position_ids.reshape((-1,)) >= 0)  # [t, h]
        for i in range(len(self.layers) - 1):
            x = self.layers[i](x, rope, visible[i])
        return self.norm(self.layers[-1](x, rope, visible[-1], rows))


class DecoderOutputs(nn.Cell):
    """What stands behind the layers of a decoder: the last norm and the head. x [t, h] of the last layer, rows [c] ->
    logits [c, v] float32 of what follows these tokens."""

    def __init__(self, norm: nn.Cell, lm_head: Head, dtype: ms.Type, operators: Operators):
        super().__init__(auto_prefix=False)
        self.norm = norm
        self.lm_head = lm_head
        self.dtype = dtype
        self.project = operators.product()

    def head_weight(self) -> Tensor:
        """[v, h] in the model's type; of a shared model, this rank's rows."""
        return self.lm_head.whole_weight().astype(self.dtype)

    def operands(self) -> tuple[float, Parameter, Parameter] | None:
        """The norm's eps and weight, and the head's; None: an adapter has changed them."""
        plain = type(self.norm) is RMSNorm and type(self.lm_head) is Head
        return (self.norm.eps, self.norm.weight, self.lm_head.weight) if plain else None

    def construct(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.project(self.norm(ops.gather(x, rows, 0)), self.head_weight()).astype(ms.float32)


class CausalLM(Graph):
    """A decoder with its head: ``logits = model(input_ids, attention_mask)``.

    Args:
        dtype: of the weights.
        operators: what all its cells compute with.
        shard: with which ranks it is shared; on more than one, it is there for its loss alone, and has no logits.
        make: makes the layers' projections, by their paths; None: with weights of ``dtype``, to be loaded.
    """

    title = "the model"

    def __init__(
        self,
        config: DecoderConfig,
        dtype: ms.Type = ms.float32,
        operators: Operators = PORTABLE,
        shard: Shard = WHOLE,
        make: MakeProjection | None = None,
    ):
        super().__init__()
        make = dense_projections(dtype, operators) if make is None else make
        self.config = config
        self.vocab_size = config.vocab_size
        self.dtype = dtype
        self.operators = operators
        self.model = Decoder(config, dtype, inside("model", make), operators, shard)
        self.project = operators.product()
        self.lm_head = Head.zeros(
            config.hidden_size, config.vocab_size // shard.count, has_bias=False, dtype=dtype, operators=operators
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def leading_ids(self) -> range:
        """Ids beyond the vocabulary that every row begins with: the virtual tokens of a prompt that was trained."""
        first = self.config.vocab_size
        return range(first, first + self.model.embed_tokens.virtual_tokens)

    def head_weight(self) -> Tensor:
        """[v, h] in the model's type; of a shared model, this rank's rows."""
        return self.lm_head.whole_weight().astype(self.dtype)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """input_ids [b, s], right-padded -> [t, h], or [c, h] of the flat positions ``rows`` [c].

        position_ids [b, s]: where a line holds several rows, each from 0; a token sees its own row alone. None: a
        line is a row. Causality alone hides the padding from every real token.
        """
        batch, seq = input_ids.shape
        if position_ids is None:
            position_ids = ops.tile(Tensor(np.arange(seq, dtype=np.int32)[None]), (batch, 1))
        return self.model(input_ids, position_ids, rows)

    def outputs(self) -> DecoderOutputs:
        """What stands behind the layers, as it is now: a graph of it compiles nothing else."""
        return DecoderOutputs(self.model.norm, self.lm_head, self.dtype, self.operators)

    def construct(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [b, s], attention_mask [b, s] of 0 and 1 -> logits [b, s, v] float32.

        The logits of masked tokens mean nothing. Virtual tokens are put in front of each line here, and have none.
        """
        virtual = self.model.embed_tokens.virtual_tokens
        if virtual:
            batch = input_ids.shape[0]
            first = self.vocab_size
            lead = ops.tile(Tensor(np.arange(first, first + virtual, dtype=np.int32)[None]), (batch, 1))
            input_ids = ops.concat((lead, input_ids.astype(ms.int32)), 1)
            if attention_mask is not None:
                attention_mask = ops.concat((ops.ones_like(lead), attention_mask.astype(ms.int32)), 1)
            return self.logits(input_ids, attention_mask)[:, virtual:]
        return self.logits(input_ids, attention_mask)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """As ``construct``, for lines that hold their virtual tokens."""
        batch, seq = input_ids.shape
        if attention_mask is None:
            x = self.hidden_states(input_ids)
        else:
            places = left_places(attention_mask)
            moved = ops.scatter_nd(places.reshape((-1, 1)), input_ids.reshape((-1,)), (batch * seq,))
            x = self.hidden_states(moved.reshape((batch, seq)), left_positions(attention_mask))
            x = ops.gather(x, places, 0)
        return self.project(x, self.head_weight()).astype(ms.float32).reshape((batch, seq, -1))


def left_positions(attention_mask: Tensor) -> Tensor:
    """Positions [b, s] of the tokens where ``left_places`` puts them: the real tokens of a line are a row, the masked
    ones behind them padding."""
    batch, seq = attention_mask.shape
    places = ops.tile(Tensor(np.arange(seq, dtype=np.int32)[None]), (batch, 1))
    real = ops.tile(attention_mask.astype(ms.int32).sum(1).reshape((batch, 1)), (1, seq))
    return ops.select(places < real, places, ops.full_like(places, -1))


def left_places(attention_mask: Tensor) -> Tensor:
    """attention_mask [b, s] of 0 and 1 -> where each token goes, among b * s, when the real tokens of every line move
    to its left, in their order, and the masked ones behind them; [b * s] int32."""
    batch, seq = attention_mask.shape
    real = attention_mask.astype(ms.int32)
    before = ops.cumsum(real, 1) - 1  # places of real tokens
    masked_before = ops.cumsum(1 - real, 1) - 1
    behind = ops.tile(real.sum(1).reshape((batch, 1)), (1, seq)) + masked_before
    place = real * before + (1 - real) * behind
    lines = ops.tile(Tensor(np.arange(0, batch * seq, seq, dtype=np.int32)[:, None]), (1, seq))
    return (lines + place).reshape((-1,)).astype(ms.int32)
