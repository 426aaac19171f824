"""``lora-ms predict``: answers to the prompts on the command line."""

from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.errors import LoraMsError
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
    limit = sizes.max_decode_length or model.config.max_position_embeddings
    end = sizes.eos_token_id
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    return Speaker(Generator(model), tokenizer, sampling_of(config), sizes.max_new_tokens, limit, ends)


def run(config: RunConfig, predict_data: list[str]) -> None:
    """Prints each prompt with its answer; all prompts go in one batch."""
    parallel.check_alone(config, "predict")
    runtime = common.start(config)
    speaker = speaker_for(config, common.model_for_use(config, runtime))
    answers = speaker.answers([[Message("user", prompt)] for prompt in predict_data])
    if runtime.is_main:
        for prompt, answer in zip(predict_data, answers, strict=True):
            print(f"> {prompt}\n{answer}")
