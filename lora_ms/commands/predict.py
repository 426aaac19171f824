"""``lora-ms predict``: answers to the prompts on the command line."""

from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.recipes import session
from lora_ms.recipes.generate import model_for_use, sampling_of, speaker_for


def run(config: RunConfig, predict_data: list[str]) -> None:
    """Prints each prompt with its answer; all prompts go in one batch."""
    session.check_alone(config, "predict")
    runtime = session.start(config)
    speaker = speaker_for(config, model_for_use(config, runtime), sampling_of(config))
    answers = speaker.answers([[Message("user", prompt)] for prompt in predict_data])
    if runtime.is_main:
        for prompt, answer in zip(predict_data, answers, strict=True):
            print(f"> {prompt}\n{answer}")
