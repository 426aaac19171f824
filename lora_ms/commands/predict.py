"""``lora-ms predict``: answers to the prompts on the command line."""

from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.recipes import session
from lora_ms.recipes.generate import model_for_use, sampling_of, speaker_for, suggested_sampling


def run(config: RunConfig, predict_data: list[str], system: str | None = None) -> None:
    """Prints each prompt with its answer; all prompts go in one batch.

    system: a message before each prompt.
    """
    session.check_alone(config, "predict")
    runtime = session.start(config)
    speaker = speaker_for(config, model_for_use(config, runtime), sampling_of(config))
    for line in suggested_sampling(config) if runtime.is_main else ():
        print(line)
    opening = [Message("system", system)] if system else []
    answers = speaker.answers([[*opening, Message("user", prompt)] for prompt in predict_data])
    if runtime.is_main:
        for prompt, answer in zip(predict_data, answers, strict=True):
            print(f"> {prompt}\n{answer}")
