"""The bundled model, small and with a tokenizer."""

import pytest

import lora_ms


@pytest.fixture(scope="session")
def tiny(root) -> str:
    return str(root / "examples" / "tiny" / "model")


@pytest.fixture(scope="module")
def net(graph_mode, tiny):
    return lora_ms.AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return lora_ms.AutoTokenizer.from_pretrained(tiny)
