"""Folders as transformers 5 writes them load here with transformers 4 and 5, and give the same numbers and tokens."""

import json
import shutil

import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.models import hub

TEXTS = ("Hello, world! 12345", "  two  spaces\n\nand\ttabs", "<|im_start|>user\nhi<|im_end|>", "你好 naïve")


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3"])
def test_a_model(reference, golden, tmp_path, graph_mode, name):
    shutil.copytree(reference / "models" / name, tmp_path / name)
    shutil.copyfile(reference / "transformers5" / f"{name}.json", tmp_path / name / "config.json")
    values = golden(f"logits_{name}")
    logits = hub.load_directory(tmp_path / name)(Tensor(values["input_ids"])).asnumpy()
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("file", ["tokenizer_config", "tokenizer_config_qwen2"])
def test_a_tokenizer(root, reference, tmp_path, file):
    """``TokenizersBackend``, or the class of the model's family without the files of its vocabulary."""
    tiny = root / "examples/tiny/model"
    shutil.copyfile(tiny / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(reference / "transformers5" / f"{file}.json", tmp_path / "tokenizer_config.json")
    before = load_tokenizer(tiny)
    (tmp_path / "chat_template.jinja").write_text(before.chat_template, "utf-8")  # version 5 writes it apart
    after = load_tokenizer(tmp_path)
    assert [after(text).input_ids for text in TEXTS] == [before(text).input_ids for text in TEXTS]
    assert after.all_special_tokens == before.all_special_tokens or file.endswith("qwen2")
    assert (after.eos_token, after.pad_token, after.chat_template) == (
        before.eos_token, before.pad_token, before.chat_template,
    )  # fmt: skip
    after.save_pretrained(tmp_path / "again")  # what is saved with an adapter names a class that both versions know
    kind = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend")
    assert load_tokenizer(tmp_path / "again")(TEXTS[0]).input_ids == before(TEXTS[0]).input_ids
