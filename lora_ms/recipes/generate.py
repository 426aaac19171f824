"""A model that answers, as a configuration asks for it."""

from lora_ms.adapters.peft_format import load_adapter
from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.infer.chat import Speaker
from lora_ms.infer.generate import Generator
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import CausalLM
from lora_ms.recipes.data import tokenizer_for
from lora_ms.recipes.model import build_model, compute_dtype, read_sizes
from lora_ms.runtime.device import Runtime


def model_for_use(config: RunConfig, runtime: Runtime) -> CausalLM:
    """The model of ``load_checkpoint`` with the adapter of ``load_adapter``, not for training."""
    sizes = read_sizes(config)
    if not config.load_checkpoint:
        raise LoraMsError("load_checkpoint is missing: give the Hugging Face directory of the model")
    model = build_model(config, sizes, compute_dtype(config, runtime), runtime)
    if config.load_adapter:
        load_adapter(model, config.load_adapter, shard=runtime.shard)
    return model.set_train(False)


def sampling_of(config: RunConfig) -> Sampling:
    """The generation keys of ``model_config``."""
    sizes = config.model.sizes
    return Sampling(
        do_sample=sizes.do_sample,
        temperature=sizes.temperature,
        top_k=sizes.top_k,
        top_p=sizes.top_p,
        repetition_penalty=sizes.repetition_penalty,
        seed=config.seed,
    )


def speaker_for(config: RunConfig, model: CausalLM, sampling: Sampling) -> Speaker:
    """The model with its tokenizer and the lengths that ``config`` allows.

    Raises:
        LoraMsError: no tokenizer.
    """
    tokenizer = tokenizer_for(config)
    if tokenizer is None:
        raise LoraMsError(
            "no tokenizer: load_checkpoint must be a Hugging Face directory with one, "
            "or processor.tokenizer.vocab_file name one"
        )
    sizes = config.model.sizes
    end = sizes.eos_token_id
    return Speaker(
        Generator(model),
        tokenizer,
        sampling,
        max_new_tokens=sizes.max_new_tokens,
        max_length=sizes.max_decode_length or model.config.max_position_embeddings,
        more_ends=() if end is None else (end,) if isinstance(end, int) else tuple(end),
    )
