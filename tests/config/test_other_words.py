"""Other tools' words stand for keys that there are, and are no keys themselves where they are looked up."""

from lora_ms.config import load_config
from lora_ms.config.other_words import OTHER_WORDS
from lora_ms.config.problems import known_keys
from lora_ms.config.schema import RunConfig


def test_each_word_stands_for_a_key():
    keys = known_keys(RunConfig)
    for word, meant in OTHER_WORDS.items():
        key, _, value = meant.partition("=")
        assert key in keys or key == "callbacks", word
        if value:
            load_config(None, options=[f"{key}={value.replace('N}', '4}')}"])
