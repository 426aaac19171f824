"""The decoder of Llama, Qwen2 and Qwen3: one body, told apart by numbers. Cells bear Hugging Face's names."""

from dataclasses import dataclass

import mindspore as ms
from mindspore import Tensor, nn, ops

from lora_ms.models.rope_settings import longest_text
from lora_ms.nn.attention import Attention, attention_bias, uses_flash
from lora_ms.nn.layers import MLP, Embedding, Head, RMSNorm, SplitEmbedding
from lora_ms.nn.parallel import WHOLE, Shard
from lora_ms.nn.projection import WeightMatMul, stream_dtype
from lora_ms.nn.rope import RotaryTables, rotation_of
from lora_ms.ops.portable import RowMask


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
    attention_bias: bool = False  # biases on q, k and v (Qwen2)
    qk_norm: bool = False  # normalised queries and keys (Qwen3)
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    flash_attention: bool = True  # the fused attention of Ascend, where there is one

    @property
    def longest(self) -> int:
        """Tokens of the longest text that the model is made for; see ``rope_settings.longest_text``."""
        return longest_text(self.max_position_embeddings, self.rope_scaling)


class DecoderLayer(nn.Cell):
    """Attention and feed-forward, each behind a norm and beside a residual; x [t, h]."""

    def __init__(self, config: DecoderConfig, dtype: ms.Type, shard: Shard):
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.self_attn = Attention(
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.attention_bias,
            c.rms_norm_eps if c.qk_norm else None,
            c.flash_attention,
            dtype,
            shard,
        )
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, dtype, shard)

    def construct(self, x: Tensor, rope: tuple, bias: Tensor, rows: Tensor | None = None) -> Tensor:
        """rows [c]: the tokens whose output is wanted, all where None; only they pass the output projections."""
        return self.feed(self.attend(x, rope, bias, rows))

    def attend(self, x: Tensor, rope: tuple, bias: Tensor, rows: Tensor | None = None) -> Tensor:
        """The first half: x [t, h] -> [t, h], or [c, h]."""
        mixed = self.self_attn.mix(self.input_layernorm(x), rope, bias)
        if rows is not None:
            x, mixed = ops.gather(x, rows, 0), ops.gather(mixed, rows, 0)
        return x + self.self_attn.output(mixed)

    def feed(self, x: Tensor) -> Tensor:
        """The second half."""
        return x + self.mlp(self.post_attention_layernorm(x))

    def cached(self, x: Tensor, rope: tuple, bias: Tensor, cache: nn.Cell, layer: int, rows: Tensor) -> Tensor:
        """New tokens only; see ``Attention.mix_cached``."""
        mixed = self.self_attn.mix_cached(self.input_layernorm(x), rope, bias, cache, layer, rows)
        return self.feed(x + self.self_attn.output(mixed))


class Decoder(nn.Cell):
    """input_ids [b, s] -> normalised hidden states [t, h], or those of the tokens ``rows`` [c] alone."""

    def __init__(self, config: DecoderConfig, dtype: ms.Type, shard: Shard):
        super().__init__()
        c = config
        heads, kv_heads = c.num_attention_heads // shard.count, c.num_key_value_heads // shard.count
        self.num_heads, self.num_kv_heads = heads, kv_heads
        self.stream = stream_dtype(dtype)
        if shard.count > 1:
            self.embed_tokens: Embedding = SplitEmbedding(c.vocab_size, c.hidden_size, dtype, shard)
        else:
            self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, dtype)
        self.layers = nn.CellList([DecoderLayer(c, dtype, shard) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        rotation = rotation_of(c.head_dim, c.rope_theta, c.rope_scaling, c.max_position_embeddings)
        self.rotary_tables = RotaryTables(c.head_dim, heads, kv_heads, rotation, self.stream)
        self.row_mask = RowMask(heads, kv_heads, uses_flash(c.flash_attention, dtype))

    def construct(self, input_ids: Tensor, position_ids: Tensor, bias: Tensor, rows: Tensor | None = None) -> Tensor:
        rope = self.rotary_tables(position_ids.reshape((-1,)))
        x = self.embed_tokens(input_ids.reshape((-1,))).astype(self.stream)  # [t, h]
        for layer in self.layers[:-1]:
            x = layer(x, rope, bias)
        return self.norm(self.layers[-1](x, rope, bias, rows))

    def cached(self, input_ids: Tensor, cache: nn.Cell, start: Tensor, padding: Tensor) -> Tensor:
        """New tokens input_ids [b, s], from slot ``start`` [] of ``cache`` on -> [b * s, h] (see ``KVCache``)."""
        positions, rows, bias = cache(start, padding, input_ids.shape[1])
        new = input_ids.shape[1]
        ends = positions.reshape((-1, new))[:, -1:] + 1  # a prompt is padded on the left: the last token is the newest
        rope = self.rotary_tables(positions, ops.tile(ends, (1, new)).reshape((-1,)))
        x = self.embed_tokens(input_ids.reshape((-1,))).astype(self.stream)
        for i in range(len(self.layers)):
            x = self.layers[i].cached(x, rope, bias, cache, i, rows)
        return self.norm(x)


class CausalLM(nn.Cell):
    """A decoder with its head: ``logits = model(input_ids, attention_mask)``.

    shard: with which ranks it is shared; on more than one, it is there for its loss alone, and has no logits.
    """

    def __init__(self, config: DecoderConfig, dtype: ms.Type = ms.float32, shard: Shard = WHOLE):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Decoder(config, dtype, shard)
        self.project = WeightMatMul()
        self.lm_head = Head(config.hidden_size, config.vocab_size // shard.count, "zeros", has_bias=False, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

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
            position_ids = ops.tile(ops.arange(seq).reshape((1, seq)), (batch, 1))
        return self.model(input_ids, position_ids, self.model.row_mask(position_ids), rows)

    def next_logits(self, input_ids: Tensor, cache: nn.Cell, start: Tensor, padding: Tensor) -> Tensor:
        """input_ids [b, s], the newest tokens -> logits [b, v] float32 of the token after the last."""
        batch, seq = input_ids.shape
        x = self.model.cached(input_ids, cache, start, padding).reshape((batch, seq, -1))[:, -1]
        return self.project(x, self.head_weight()).astype(ms.float32)

    def construct(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [b, s], attention_mask [b, s] of 0 and 1 -> logits [b, s, v] float32."""
        batch, seq = input_ids.shape
        if attention_mask is None:
            x = self.hidden_states(input_ids)
        else:
            bias = attention_bias(attention_mask, batch, seq, self.model.num_heads, self.model.num_kv_heads)
            positions = ops.maximum(ops.cumsum(attention_mask.astype(ms.int32), 1) - 1, 0)
            x = self.model(input_ids, positions, bias)
        return self.project(x, self.head_weight()).astype(ms.float32).reshape((batch, seq, -1))
