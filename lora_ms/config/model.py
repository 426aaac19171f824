"""``model`` and, inside it, ``pet_config``: what is trained, and the adapter that is put on it."""

import dataclasses
from collections.abc import Container
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, create_model, model_validator

from lora_ms.adapters.methods import METHODS
from lora_ms.adapters.methods.base import REQUIRED, AdapterConfig, Key, keys_of
from lora_ms.quant.settings import read_quantisation
from lora_ms.values import Flag, NoEffect, Number, Scaling, Section, Text, Texts, TokenIds, Whole

ExtendMethod = Literal["None", "PI", "linear", "NTK", "DYNAMIC_NTK", "YARN", "LLAMA3"]


class PetKeys(Section):
    """What ``pet_config`` holds whatever the method."""

    pet_type: str = "lora"  # the method
    lora_impl: Literal["mindpet", "lora_ms"] = "mindpet"  # whose cells, with backend mindformers (ours)
    neftune_noise_alpha: Number = Field(0.0, ge=0)  # noise on the embedding in training, 5 to 15; 0: none
    freeze_include: Texts = []  # parameter names (with *) to freeze besides the base model's
    freeze_exclude: Texts = []  # parameter names (with *) to train besides the adapter
    lora_a_init: NoEffect = None  # init_lora_weights says how A and B start
    lora_b_init: NoEffect = None
    param_init_type: NoEffect = "float32"  # type of the adapter's parameters
    compute_dtype: NoEffect = None

    @classmethod
    def given_counts(cls) -> Container[str]:
        return cls.model_fields  # an adapter to go on from agrees with what is given; a method has its own defaults

    @model_validator(mode="after")
    def _keys_of_one_method(self) -> "PetKeys":
        method, fields = METHODS[self.pet_type], type(self).model_fields
        own, wrong = method_keys(method), []
        for name in OPTIONS:
            if name not in own and getattr(self, name) != fields[name].get_default():
                wrong.append(name)
            elif name in own and name not in self.model_fields_set:
                self.__dict__[name] = own[name].default  # methods may differ in it; the key stays one that is not given
        if wrong:
            others = [name for name, other in METHODS.items() if all(key in method_keys(other) for key in wrong)]
            change = f", or set pet_type: {' or '.join(others)}" if others else ""
            raise ValueError(f"{', '.join(wrong)} with pet_type {self.pet_type}: leave them out{change}")
        method.check_yaml(self)
        return self


def method_keys(method: type[AdapterConfig]) -> dict[str, Key]:
    """All keys of ``pet_config`` that belong to a method."""
    return {**keys_of(method), **method.YAML_KEYS}


def field_of(key: Key) -> Any:
    """A key as pydantic takes a field's declaration."""
    kind = key.type
    entry: Any = next(iter(get_args(kind)), None)
    if isinstance(entry, type) and dataclasses.is_dataclass(entry):  # a list of sections
        fields: dict[str, Any] = {name: field_of(inner) for name, inner in keys_of(entry).items()}
        section = create_model(entry.__name__, __base__=Section, **fields)
        kind = list[section]  # type: ignore[valid-type]
    kind = key.bounds.on(kind)
    if key.default is REQUIRED:
        return (kind, ...)
    return (kind | None if key.default is None else kind, key.default)


def options_of_all() -> dict[str, Key]:
    """The options of all methods; one that several have is the first's."""
    found: dict[str, Key] = {}
    for method in METHODS.values():
        for name, key in method_keys(method).items():
            found.setdefault(name, key)
    return found


OPTIONS = options_of_all()

if TYPE_CHECKING:

    class PetConfig(PetKeys):
        """``pet_config``, with every option of every method; ``null`` trains all parameters."""

        def __init__(self, **keys: Any): ...

        def __getattr__(self, name: str) -> Any: ...

else:
    PetConfig = create_model(
        "PetConfig",
        __base__=PetKeys,
        __doc__="``pet_config``, with every option of every method; ``null`` trains all parameters.",
        pet_type=(Literal[tuple(METHODS)], next(iter(METHODS))),
        **{name: field_of(key) for name, key in OPTIONS.items()},
    )


def _quantization(value: Any) -> dict[str, Any] | None:
    return None if value is None else read_quantisation(value).to_config()


# MindFormers' second spelling of a key -> the one here
SPELLINGS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "n_kv_heads",
    "rope_theta": "theta",
    "add_qkv_bias": "qkv_has_bias",
    "max_position_embeddings": "max_position_embedding",
    "layernorm_compute_dtype": "layernorm_compute_type",
    "softmax_compute_dtype": "softmax_compute_type",
    "params_dtype": "param_init_type",
}


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
    quantization_config: Annotated[dict[str, Any] | None, BeforeValidator(_quantization)] = None  # of 4-bit weights
    pet_config: PetConfig | None = None

    @classmethod
    def given_counts(cls) -> Container[str]:
        return ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")

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
    rotary_emb_base: NoEffect = None  # the base is theta; MindFormers' LlamaConfig does not read these four either
    compute_in_2d: NoEffect = False
    initializer_range: NoEffect = None
    kv_channels: NoEffect = None
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
    auto_map: NoEffect = None  # code of MindFormers' own; the folder's tokenizer is read without it

    @model_validator(mode="before")
    @classmethod
    def _second_spellings(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for spelling in [key for key in data if key in SPELLINGS]:
            key, value = SPELLINGS[spelling], data.pop(spelling)
            if key in data and data[key] != value:
                raise ValueError(f"{key} is {data[key]!r} and {spelling}, the same key, {value!r}: leave one out")
            data[key] = value
        return data


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
    chat_template: Text = ""  # name (docs/data-formats.md), Jinja or its file; "": the tokenizer's, else alpaca (ours)
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
    auto_register: NoEffect = None


class Processor(Section):
    """``processor``."""

    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    return_tensors: NoEffect = "ms"
    type: NoEffect = "LlamaProcessor"
