"""``lora-ms predict``: answers to the prompts on the command line."""

from pathlib import Path

from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.errors import LoraMsError
from lora_ms.hf_folder import GENERATION, SAMPLING, sampling_defaults
from lora_ms.infer.chat import Speaker
from lora_ms.infer.generate import Generator
from lora_ms.infer.sampling import Sampling
from lora_ms.models.decoder import CausalLM
from lora_ms.recipes import data, parallel
from lora_ms.recipes import session as common


def sampling_of(config: RunConfig) -> Sampling:
    """The generation keys of ``model_config``."""
    s = config.model.sizes
    return Sampling(s.do_sample, s.temperature, s.top_k, s.top_p, s.repetition_penalty, config.seed)


def speaker_for(config: RunConfig, model: CausalLM) -> Speaker:
    """The model with its tokenizer and settings.

    Raises:
        LoraMsError: no tokenizer.
    """
    tokenizer, sizes = data.tokenizer_for(config), config.model.sizes
    if tokenizer is None:
        raise LoraMsError(
            "no tokenizer: load_checkpoint must be a Hugging Face directory with one, "
            "or processor.tokenizer.vocab_file name one"
        )
    limit = sizes.max_decode_length or model.config.longest
    end = sizes.eos_token_id
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    return Speaker(Generator(model), tokenizer, sampling_of(config), sizes.max_new_tokens, limit, ends)


def offered(config: RunConfig) -> list[str]:
    """A line with the settings that the model's authors suggest, where the user chose none; none is taken unasked."""
    if set(SAMPLING) & config.model.sizes.model_fields_set or not Path(config.load_checkpoint).is_dir():
        return []
    suggested = sampling_defaults(Path(config.load_checkpoint))
    if suggested.get("do_sample") is not True:  # then the rest has no effect
        suggested = {name: value for name, value in suggested.items() if name == "repetition_penalty"}
    flags = [f"--{name} {value}" for name, value in suggested.items() if value != getattr(config.model.sizes, name)]
    if not flags:
        return []
    return [f"{GENERATION} suggests {' '.join(flags)}; without these flags an answer is the likeliest tokens"]


def run(config: RunConfig, predict_data: list[str], system: str | None = None) -> None:
    """Prints each prompt with its answer; all prompts go in one batch.

    system: a message before each prompt.
    """
    parallel.check_alone(config, "predict")
    runtime = common.start(config)
    speaker = speaker_for(config, common.model_for_use(config, runtime))
    for line in offered(config) if runtime.is_main else ():
        print(line)
    opening = [Message("system", system)] if system else []
    answers = speaker.answers([[*opening, Message("user", prompt)] for prompt in predict_data])
    if runtime.is_main:
        for prompt, answer in zip(predict_data, answers, strict=True):
            print(f"> {prompt}\n{answer}")
