"""``model`` and, inside it, ``pet_config``: what is trained, and the adapter that is put on it."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from lora_ms.config.values import (
    AlphaPattern,
    Exclusions,
    Flag,
    Init,
    Layers,
    NoEffect,
    Number,
    RankPattern,
    Scaling,
    Section,
    Targets,
    Text,
    Texts,
    TokenIds,
    Whole,
    WholeOrNumber,
)

ExtendMethod = Literal["None", "PI", "linear", "NTK", "DYNAMIC_NTK", "YARN", "LLAMA3"]


class LayerGroupKeys(Section):
    """One entry of ``pet_config.layer_groups``: layers that share a rank."""

    layers: Layers  # indices from 0: 3, [0, 1, 8], "0-10" or "0-3,8"
    lora_rank: Whole = Field(ge=1)
    lora_alpha: WholeOrNumber | None = Field(None, gt=0)  # None: the scaling lora_alpha / lora_rank of pet_config
    target_modules: Targets | None = None  # None: those of pet_config


class PetConfig(Section):
    """LoRA. ``pet_config: null`` in the YAML means no adapter: all parameters are trained."""

    pet_type: Literal["lora", "adalora"] = "lora"
    lora_impl: Literal["mindpet", "lora_ms"] = "mindpet"  # whose cells, with backend mindformers (ours)
    lora_rank: Whole = Field(16, ge=1)  # rows of A, columns of B
    lora_alpha: WholeOrNumber = Field(16, gt=0)  # the adapter's output is scaled by lora_alpha / lora_rank
    lora_dropout: Number = Field(0.05, ge=0, lt=1)  # probability, on the adapter's input
    target_modules: Targets = ".*wq|.*wk|.*wv|.*wo"  # regex (str), suffixes (list), or all-linear
    exclude_layers: Texts = []  # modules left without an adapter although target_modules matches
    exclude_modules: Exclusions = []  # the same as PEFT has it: regex for the whole path (str), or suffixes (list)
    layers_to_transform: Layers | None = None  # layers with adapters; None: all
    layers_pattern: Texts = []  # names of the list that these count in, where a model has several
    rank_pattern: RankPattern = {}  # other ranks: {regex for the end of a module's path: rank}
    alpha_pattern: AlphaPattern = {}  # other alphas, in the same way
    layer_groups: list[LayerGroupKeys] = []  # ranks by ranges of layers, in place of the two patterns
    modules_to_save: Texts = []  # whole modules to train beside the adapter: lm_head, embed_tokens, norm …
    use_rslora: Flag = False  # scale by lora_alpha / sqrt(lora_rank)
    use_dora: Flag = False  # train the length of each row of the weight apart from its direction
    lora_bias: Flag = False  # a bias beside each B
    bias: Literal["none", "all", "lora_only"] = "none"  # which biases of the base model train
    init_lora_weights: Init = True  # True: A Kaiming uniform, B zero; gaussian, orthogonal, pissa, pissa_niter_N, olora

    loraplus_lr_ratio: Number = Field(1.0, gt=0)  # learning rate of B over that of A (LoRA+); 1: one rate for both
    loraplus_lr_embedding: Number = Field(1e-6, gt=0)  # highest rate of an adapter on the embedding, with LoRA+
    neftune_noise_alpha: Number = Field(0.0, ge=0)  # noise on the embedding in training, 5 to 15; 0: none

    # adalora: from init_rank everywhere to target_rank on average, by importance
    init_rank: Whole | None = Field(None, ge=1)  # None: lora_rank
    target_rank: Whole | None = Field(None, ge=1)  # None: half of that
    tinit: Whole | None = Field(None, ge=0)  # optimiser steps before ranks fall; None: a tenth of the run
    tfinal: Whole | None = Field(None, ge=1)  # optimiser steps at the end with ranks fixed; None: three tenths
    delta_t: Whole = Field(1, ge=1)  # optimiser steps between two allocations of rank
    beta1: Number = Field(0.85, gt=0, lt=1)  # smoothing of the importance
    beta2: Number = Field(0.85, gt=0, lt=1)  # smoothing of its spread
    orth_reg_weight: Number = Field(0.5, ge=0)  # weight in the loss of how far A and B are from orthogonal

    freeze_include: Texts = []  # parameter names (with *) to freeze besides the base model's
    freeze_exclude: Texts = []  # parameter names (with *) to train besides the adapter
    lora_a_init: NoEffect = None  # init_lora_weights says how A and B start
    lora_b_init: NoEffect = None
    param_init_type: NoEffect = "float32"  # type of the adapter's parameters
    compute_dtype: NoEffect = None

    @model_validator(mode="after")
    def _adalora_alone(self) -> "PetConfig":
        adalora = self.pet_type == "adalora"
        keys, reason = (LORA_KEYS, "AdaLoRA goes without") if adalora else (ADALORA_KEYS, "set pet_type: adalora")
        fields = type(self).model_fields
        wrong = [name for name in keys if getattr(self, name) != fields[name].get_default()]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} with pet_type {self.pet_type}: {reason}")
        if self.init_rank not in (None, self.lora_rank) and self.lora_rank != fields["lora_rank"].default:
            raise ValueError(f"init_rank {self.init_rank} and lora_rank {self.lora_rank} differ: give one of the two")
        return self


ADALORA_KEYS = ("init_rank", "target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
LORA_KEYS = (
    *("rank_pattern", "alpha_pattern", "layer_groups", "use_rslora", "use_dora", "lora_bias"),
    *("init_lora_weights", "loraplus_lr_ratio"),
)


class ModelSizes(Section):
    """``model.model_config``. A size that is None was not given: it comes from the checkpoint's config.json."""

    type: Literal["LlamaConfig", "Qwen2Config", "Qwen3Config"] | None = None
    seq_length: Whole | None = Field(None, ge=1)  # tokens of a training row; of prompt and answer in generation
    hidden_size: Whole | None = Field(None, ge=1)  # width of a token's vector
    num_layers: Whole | None = Field(None, ge=1)
    num_heads: Whole | None = Field(None, ge=1)  # query heads
    n_kv_heads: Whole | None = Field(None, ge=1)  # key and value heads; None in a full set of sizes: num_heads
    head_dim: Whole | None = Field(None, ge=1)  # width of a head (ours; Qwen3 needs it)
    vocab_size: Whole | None = Field(None, ge=1)  # tokens
    intermediate_size: Whole | None = Field(None, ge=1)  # width of the MLP, or else the next two keys
    multiple_of: Whole | None = Field(None, ge=1)  # MLP width is rounded up to this
    ffn_dim_multiplier: Number | None = Field(None, gt=0)
    rms_norm_eps: Number | None = Field(None, gt=0)
    theta: Number | None = Field(None, gt=0)  # base of the rotary frequencies
    scaling_factor: Scaling | None = None  # a number, or the keys that extend_method needs (YARN, LLAMA3)
    extend_method: Annotated[ExtendMethod, BeforeValidator(lambda v: "None" if v is None else v)] = "None"
    qkv_has_bias: Flag | None = None
    qkv_concat: Flag = False  # the checkpoint (.ckpt) holds q, k and v as one matrix
    tie_word_embeddings: Flag | None = None  # the head is the embedding
    max_position_embedding: Whole | None = Field(None, ge=1)  # longest sequence the model was made for, tokens
    bos_token_id: Whole | None = None
    eos_token_id: TokenIds | None = None  # one, or all that end an answer
    pad_token_id: Whole | None = None
    ignore_token_id: Whole = -100  # label that carries no loss
    compute_dtype: Literal["float32", "float16", "bfloat16"] | None = None  # None: the device's default
    use_flash_attention: Flag = True  # Ascend's fused attention, where the device has it
    pet_config: PetConfig | None = None

    do_sample: Flag = False  # False: always the likeliest token
    temperature: Number = Field(1.0, ge=0)  # 0: the likeliest token
    top_k: Whole = Field(0, ge=0)  # sample among this many tokens; 0: all
    top_p: Number = Field(1.0, ge=0, le=1)  # sample among the likeliest tokens of this total probability; 0: one
    repetition_penalty: Number = Field(1.0, gt=0)  # 1: none
    max_new_tokens: Whole = Field(128, ge=1)  # longest answer, tokens (ours)
    max_decode_length: Whole | None = Field(None, ge=1)  # longest prompt and answer together, tokens

    batch_size: NoEffect = 1
    layernorm_compute_type: NoEffect = "float32"
    softmax_compute_type: NoEffect = "float32"
    rotary_dtype: NoEffect = "float32"
    rotary_pct: NoEffect = 1.0
    param_init_type: NoEffect = "float32"
    embedding_init_type: NoEffect = None
    residual_dtype: NoEffect = None
    emb_dropout_prob: NoEffect = 0.0
    use_past: NoEffect = False  # generation always keeps its keys and values
    use_past_shard: NoEffect = False
    checkpoint_name_or_path: NoEffect = ""  # load_checkpoint is read instead
    fine_grain_interleave: NoEffect = 1
    pp_interleave_num: NoEffect = 1
    offset: NoEffect = 0
    is_dynamic: NoEffect = False
    use_rope_slice: NoEffect = False
    use_ring_attention: NoEffect = False
    use_attn_mask_compression: NoEffect = False
    use_eod_attn_mask_compression: NoEffect = False
    fused_rms_norm: NoEffect = True
    parallel_optimizer: NoEffect = False
    input_sliced_sig: NoEffect = False
    block_size: NoEffect = 16
    num_blocks: NoEffect = 512
    parallel_config: NoEffect = None
    moe_config: NoEffect = None


class Arch(Section):
    """``model.arch``."""

    type: Literal["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"] | None = None


class Model(Section):
    """``model``."""

    sizes: ModelSizes = Field(default_factory=ModelSizes, alias="model_config")  # pydantic reserves that name in Python
    arch: Arch = Field(default_factory=Arch)


class Tokenizer(Section):
    """``processor.tokenizer``."""

    vocab_file: Text | None = None  # tokenizer file or folder; None: the one beside the checkpoint
    chat_template: Text = ""  # a name (see README) or a file of Jinja; "": the tokenizer's own, else alpaca (ours)
    type: NoEffect = "LlamaTokenizer"
    unk_token: NoEffect = None
    bos_token: NoEffect = None
    eos_token: NoEffect = None
    pad_token: NoEffect = None
    add_bos_token: NoEffect = None
    add_eos_token: NoEffect = None
    merges_file: NoEffect = None
    tokenizer_file: NoEffect = None
    model_max_length: NoEffect = None
    padding_side: NoEffect = None


class Processor(Section):
    """``processor``."""

    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    return_tensors: NoEffect = "ms"
    type: NoEffect = "LlamaProcessor"
