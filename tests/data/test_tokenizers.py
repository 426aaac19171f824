"""Tokenizers as they are found: several chat templates, and what transformers 5 writes."""

import json
import shutil

import pytest

from lora_ms.adapters.check import template_of as template_in
from lora_ms.cli import main as cli
from lora_ms.data.example import Example, Message
from lora_ms.data.template import encode_prompt, encode_text, set_template, template_of
from lora_ms.data.tokenizer import load_tokenizer
from lora_ms.errors import LoraMsError
from lora_ms.saving import new_folder

EXAMPLE = Example("a", (Message("user", "q"), Message("assistant", "a")))


@pytest.fixture
def folder(root, tmp_path):
    """A copy of the bundled tokenizer, whose template stands in tokenizer_config.json."""
    target = tmp_path / "tokenizer"
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(root / "examples" / "tiny" / "model" / name, target)
    return target


def settings(folder) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def change(folder, **keys) -> None:
    changed = {name: value for name, value in (settings(folder) | keys).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))


def named(folder, **templates) -> str:
    """Puts templates by name in; returns the one that was there."""
    plain = settings(folder)["chat_template"]
    listed = [{"name": name, "template": text or plain} for name, text in templates.items()]
    change(folder, chat_template=listed)
    return plain


def test_the_default_of_named_templates_is_the_template(folder):
    before = encode_text(load_tokenizer(folder), "Who are you?")
    plain = named(folder, default=None, tool_use="TOOLS {{ messages }}")
    tokenizer = load_tokenizer(folder)
    assert template_of(tokenizer) == plain == template_in(folder)
    assert encode_text(tokenizer, "Who are you?") == before


def test_templates_in_a_folder_of_their_own(folder):
    """As transformers 5 writes them."""
    before = encode_text(load_tokenizer(folder), "Who are you?")
    plain = settings(folder)["chat_template"]
    change(folder, chat_template=None)
    (folder / "chat_template.jinja").write_text(plain)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ messages }}")
    tokenizer = load_tokenizer(folder)
    assert sorted(tokenizer.chat_template) == ["default", "tool_use"]
    assert template_of(tokenizer) == plain == template_in(folder)
    assert encode_text(tokenizer, "Who are you?") == before


def test_named_templates_without_a_default_are_named(folder):
    named(folder, tool_use="TOOLS", rag="RAG")
    tokenizer = load_tokenizer(folder)
    with pytest.raises(LoraMsError, match="no default: give --chat_template one of rag, tool_use"):
        encode_prompt(tokenizer, EXAMPLE.messages[:1])
    assert template_in(folder) is None


@pytest.mark.parametrize(("name", "text"), [("tool_use", "TOOLS"), ("rag", "RAG"), ("default", "PLAIN")])
def test_one_of_the_tokenizers_own_templates_can_be_chosen(folder, name, text):
    named(folder, tool_use="TOOLS", rag="RAG", default="PLAIN")
    tokenizer = load_tokenizer(folder)
    set_template(tokenizer, name)
    assert template_of(tokenizer) == text
    with pytest.raises(LoraMsError, match="chat_template nothing: no such file, and none of chatml, .*, default, rag"):
        set_template(load_tokenizer(folder), "nothing")


def test_our_own_templates_stand_in_for_named_ones(folder):
    named(folder, tool_use="TOOLS", default="PLAIN")
    tokenizer = load_tokenizer(folder)
    set_template(tokenizer, "chatml")
    assert "<|im_start|>" in template_of(tokenizer)


def test_further_templates_go_along_with_a_merged_model(reference, folder, tmp_path):
    base = shutil.copytree(reference / "models" / "qwen2", tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, base)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ messages }}")
    out = tmp_path / "out"
    words = [
        "merge",
        "--load_checkpoint",
        base,
        "--load_adapter",
        reference / "adapters" / "qwen2",
        "--output_dir",
        out,
    ]
    for more in ([], ["--overwrite", "True"]):
        assert cli.main([str(word) for word in (*words, *more)]) == 0
        assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "TOOLS {{ messages }}"


def test_a_folder_in_a_folder_is_replaced(tmp_path):
    for text in ("one", "two"):
        with new_folder(tmp_path / "out", 10) as part:
            (part / "inner").mkdir()
            (part / "inner" / text).write_text(text)
    assert [path.name for path in (tmp_path / "out" / "inner").iterdir()] == ["two"]


# what transformers 5 writes


@pytest.mark.parametrize(
    "keys",
    [
        {"extra_special_tokens": ["<|im_start|>"], "additional_special_tokens": None},
        {"extra_special_tokens": [{"content": "<|im_start|>", "__type": "AddedToken"}]},
        {"extra_special_tokens": [], "backend": "tokenizers", "is_local": True, "local_files_only": True},
        {"extra_special_tokens": {}},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_start|>"]},
    ],
)
def test_tokenizers_of_transformers_5(folder, keys):
    before = load_tokenizer(folder)
    change(folder, **keys)
    tokenizer = load_tokenizer(folder)
    text = "<|im_start|>user\nHello<|im_end|>\n"
    assert tokenizer.encode(text) == before.encode(text)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (before.eos_token_id, len(before))
    assert encode_text(tokenizer, "Who are you?") == encode_text(before, "Who are you?")


@pytest.mark.parametrize("keys", [{"extra_special_tokens": 5}, {"tokenizer_class": "NoSuchTokenizer"}])
def test_a_tokenizer_that_cannot_be_read_is_no_traceback(folder, keys):
    change(folder, **keys)
    with pytest.raises(LoraMsError, match="not readable as a tokenizer|extra_special_tokens expects"):
        load_tokenizer(folder)
