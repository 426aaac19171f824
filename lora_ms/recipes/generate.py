"""A model that answers, as a configuration asks for it."""

from pathlib import Path

from lora_ms.adapters.peft_files import check_adapter_folder
from lora_ms.adapters.peft_format import load_adapter
from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import GENERATION, SAMPLING, sampling_defaults
from lora_ms.infer.generate import Generator, Speaker
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import CausalLM
from lora_ms.recipes.adapter import quantisation_notes
from lora_ms.recipes.data import tokenizer_for
from lora_ms.recipes.model import build_model, compute_dtype, read_sizes
from lora_ms.runtime.device import Runtime


def model_for_use(config: RunConfig, runtime: Runtime) -> CausalLM:
    """The model of ``load_checkpoint`` with the adapter of ``load_adapter``, not for training."""
    sizes = read_sizes(config)
    if not config.load_checkpoint:
        raise LoraMsError("load_checkpoint is missing: give the Hugging Face directory of the model")
    if config.load_adapter:
        check_adapter_folder(Path(config.load_adapter))
    model = build_model(config, sizes, compute_dtype(config, runtime), runtime)
    if config.load_adapter:
        _, found = load_adapter(model, config.load_adapter, shard=runtime.shard)
        for line in (*found.notes, *quantisation_notes(config.load_adapter, model)) if runtime.is_main else ():
            print(line)
    return model.set_train(False)


def sampling_notes(config: RunConfig) -> list[str]:
    """A line with the settings that the model's authors suggest, where the user chose none; none is taken unasked. A
    line with those of the user's that have no effect, as do_sample is False."""
    sizes = config.model.sizes
    neutral = {"temperature": None, "top_k": 0, "top_p": 1.0}
    given = {name: getattr(sizes, name) for name in neutral if name in sizes.model_fields_set}
    idle = [f"--{name} {value:g}" for name, value in given.items() if value != neutral[name]]
    if idle and not sizes.do_sample and sizes.temperature and sizes.top_p:
        return [f"no effect without --do_sample True: {' '.join(idle)}; an answer is the most likely tokens"]
    if set(SAMPLING) & config.model.sizes.model_fields_set or not Path(config.load_checkpoint).is_dir():
        return []
    suggested = sampling_defaults(Path(config.load_checkpoint))
    if suggested.get("do_sample") is not True:  # then the rest has no effect
        suggested = {name: value for name, value in suggested.items() if name == "repetition_penalty"}
    flags = [f"--{name} {value}" for name, value in suggested.items() if value != getattr(config.model.sizes, name)]
    if not flags:
        return []
    return [f"{GENERATION} suggests {' '.join(flags)}; without these flags an answer is the most likely tokens"]


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
        Generator(model, weights_stay=True),
        tokenizer,
        sampling,
        max_new_tokens=sizes.max_new_tokens,
        max_length=sizes.max_decode_length or model.config.longest,
        more_ends=() if end is None else (end,) if isinstance(end, int) else tuple(end),
    )
