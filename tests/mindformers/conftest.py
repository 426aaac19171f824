"""MindFormers' own models and MindPet's own LoRA beside ours, on the tiny weights of ``tests/reference``."""

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from lora_ms.adapters.config import LoraConfig
from lora_ms.adapters.inject import inject, lora_layers
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import hugging_face_name, load_directory

REFERENCE = Path(__file__).parents[1] / "reference"
SEQ = 12  # ids in a row; MindFormers' causal mask has one size
RANK, ALPHA = 4, 8
PROJECTIONS = ".*wq|.*wk|.*wv|.*wo"


@dataclass(frozen=True)
class Pair:
    """The same weights twice, and what transformers makes of them."""

    ours: CausalLM
    theirs: nn.Cell
    golden: dict[str, np.ndarray]


def pytest_configure(config):
    config.addinivalue_line("markers", "mindformers: needs MindFormers and MindPet, the extra of the same name")


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """MindFormers and MindPet, whose logs go to a temporary folder; the tests are skipped where either is missing.

    MindPet logs under HOME, MindFormers under LOCAL_DEFAULT_PATH, which it asks at every message; both keep the
    standard output of their import. MindFormers also replaces ``warnings.showwarning``.
    """
    folder = tmp_path_factory.mktemp("mindformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_DEFAULT_PATH", str(folder))
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with patch.context() as at_home:
                at_home.setenv("HOME", str(folder))
                mindpet = pytest.importorskip("mindpet.delta")
            # this folder bears the name of the package: only a module inside tells that it is installed
            llama = pytest.importorskip("mindformers.models.llama")
            from mindformers.pet import get_pet_model
        ms.set_context(mode=ms.GRAPH_MODE)
        ms.set_device("CPU")
        yield SimpleNamespace(
            LlamaConfig=llama.LlamaConfig,
            LlamaForCausalLM=llama.LlamaForCausalLM,
            get_pet_model=get_pet_model,
            LoRADense=mindpet.LoRADense,
        )


def their_model(packages: SimpleNamespace, ours: CausalLM) -> nn.Cell:
    """MindFormers' Llama of the sizes and with the weights of ``ours``."""
    c: DecoderConfig = ours.config
    rope = dict(c.rope_scaling or {})
    kind = rope.pop("rope_type", "None").upper()
    config = packages.LlamaConfig(
        batch_size=3,
        seq_length=SEQ,
        hidden_size=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads,
        max_position_embedding=c.max_position_embeddings,
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps,
        theta=c.rope_theta,
        extend_method="LLAMA3" if kind == "LLAMA3" else "None",
        scaling_factor=rope or 1.0,
        qkv_has_bias=c.attention_bias,
        tie_word_embeddings=c.tie_word_embeddings,
        compute_dtype="float32",
        param_init_type="float32",
        use_rope_slice=True,
        use_flash_attention=False,  # Ascend's operators
        fused_rms_norm=False,
    )
    theirs = packages.LlamaForCausalLM(config)
    weights = {name: p.asnumpy() for name, p in ours.parameters_and_names()}
    places = {hugging_face_name(name): p for name, p in theirs.parameters_and_names()}
    assert set(places) == set(weights)
    for name, parameter in places.items():
        assert parameter.shape == weights[name].shape
        parameter.set_data(Tensor(weights[name]))
    return theirs.set_train(False)


def factors(name: str, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random values of a factor, large enough that its adapter moves every logit."""
    return np.random.default_rng([index, *name.encode()]).normal(0, 0.2, shape).astype(np.float32)


@pytest.fixture(scope="session", params=["llama2", "llama3", "qwen2"])
def family(request):
    return request.param


@pytest.fixture(scope="session")
def base(packages, family) -> Pair:
    ours = load_directory(REFERENCE / "models" / family).set_train(False)
    golden = dict(np.load(REFERENCE / f"logits_{family}.npz"))
    return Pair(ours, their_model(packages, ours), golden)


@pytest.fixture(scope="session")
def lora(packages, family, base) -> Pair:
    """With adapters on q, k, v and o; ours injected by our rules from the expression that MindFormers matches."""
    ours = load_directory(REFERENCE / "models" / family)
    inject(ours, LoraConfig(RANK, ALPHA, 0.0, PROJECTIONS))
    settings = {"pet_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    theirs = packages.get_pet_model(their_model(packages, ours_base(base)), {**settings, "target_modules": PROJECTIONS})
    for name, layer in lora_layers(ours).items():
        layer.lora_a.set_data(Tensor(factors(name, 0, layer.lora_a.shape)))
        layer.lora_b.set_data(Tensor(factors(name, 1, layer.lora_b.shape)))
    return Pair(ours, theirs, base.golden)
