"""``lora-ms predict``: answers to the prompts on the command line, or of a file."""

from lora_ms.config import RunConfig
from lora_ms.data.example import Message
from lora_ms.errors import LoraMsError
from lora_ms.recipes import session
from lora_ms.recipes.generate import model_for_use, sampling_notes, sampling_of, speaker_for
from lora_ms.recipes.predict import PromptFile


def run(
    config: RunConfig,
    predict_data: list[str] | None = None,
    system: str | None = None,
    predict_file: str | None = None,
    predict_output: str | None = None,
) -> None:
    """Prints each prompt with its answer; all prompts go in one batch. With ``predict_file``, see ``PromptFile``.

    system: a message before each prompt.
    """
    if (predict_data is None) == (predict_file is None):
        raise LoraMsError('give --predict_data "a prompt" "another", or --predict_file FILE')
    if predict_output is not None and predict_file is None:
        raise LoraMsError("--predict_output is for the answers to --predict_file: leave it out, or give both")
    session.check_alone(config, "predict")
    prompts = None if predict_file is None else PromptFile(config, predict_file, predict_output or "", system)
    runtime = session.start(config)
    speaker = speaker_for(config, model_for_use(config, runtime), sampling_of(config))
    for line in sampling_notes(config) if runtime.is_main else ():
        print(line)
    if prompts is not None and runtime.is_main:
        prompts.run(speaker)
    elif predict_data is not None:
        opening = [Message("system", system)] if system else []
        answers = speaker.answers([[*opening, Message("user", prompt)] for prompt in predict_data])
        if runtime.is_main:
            for prompt, answer in zip(predict_data, answers, strict=True):
                print(f"> {prompt}\n{answer}")
