"""MindFormers' own models and MindPet's own LoRA beside ours, on the tiny weights of ``tests/reference``."""

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.models.decoder import CausalLM, DecoderConfig
from lora_ms.models.hub import hugging_face_name, load_directory
from lora_ms.runtime import device

REFERENCE = Path(__file__).parents[1] / "reference"
SEQ = 12  # ids in a row; MindFormers' causal mask has one size
PROJECTIONS = ".*wq|.*wk|.*wv|.*wo"


@dataclass(frozen=True)
class Pair:
    """The same weights twice; of the adapters' factors, ours and theirs by our name."""

    ours: CausalLM
    theirs: nn.Cell
    factors: dict[str, tuple[Parameter, Parameter]] = field(default_factory=dict)


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """MindFormers and MindPet, whose logs go to a temporary folder; the tests are skipped where either is missing.

    MindPet logs under HOME, MindFormers under LOCAL_DEFAULT_PATH, which it asks at every message; both keep the
    standard output of their import. MindFormers also replaces ``warnings.showwarning``.
    """
    for name in ("mindformers", "mindpet"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    folder = tmp_path_factory.mktemp("mindformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_DEFAULT_PATH", str(folder))
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with patch.context() as at_home:
                at_home.setenv("HOME", str(folder))
                from mindpet.delta import LoRADense
            from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
            from mindformers.pet import get_pet_model
        here, _ = device.setup("CPU")
        yield SimpleNamespace(
            operators=here.operators,
            LlamaConfig=LlamaConfig,
            LlamaForCausalLM=LlamaForCausalLM,
            get_pet_model=get_pet_model,
            LoRADense=LoRADense,
        )


def their_model(packages: SimpleNamespace, ours: CausalLM) -> nn.Cell:
    """MindFormers' Llama of the sizes and with the weights of ``ours``."""
    c: DecoderConfig = ours.config
    scaling = {key: value for key, value in (c.rope_scaling or {}).items() if key != "rope_type"}
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
        extend_method="LLAMA3" if scaling else "None",  # of our models, llama3 alone is scaled
        scaling_factor=scaling or 1.0,
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


@pytest.fixture(scope="session", params=["llama2", "llama3", "qwen2"])
def family(request):
    return request.param


@pytest.fixture(scope="session")
def base(packages, family) -> Pair:
    """Without adapters."""
    ours = load_directory(REFERENCE / "models" / family, operators=packages.operators).set_train(False)
    return Pair(ours, their_model(packages, ours))


@pytest.fixture(scope="session")
def golden(family) -> dict[str, np.ndarray]:
    """What transformers makes of the family's weights."""
    with np.load(REFERENCE / f"logits_{family}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def lora(packages, family, base) -> Pair:
    """With equal adapters, found by both from one expression, whose factors are all random and none zero."""
    ours = load_directory(REFERENCE / "models" / family, operators=packages.operators)
    inject(ours, LoraConfig(4, 8, 0.0, PROJECTIONS))
    settings = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    settings["target_modules"] = PROJECTIONS
    theirs = packages.get_pet_model(their_model(packages, base.ours), settings)

    factors = {p.name: p for p in ours.trainable_params()}
    their_factors = {
        hugging_face_name(p.name).replace("mindpet_delta_lora_", "lora_"): p for p in theirs.trainable_params()
    }
    assert set(their_factors) == set(factors)
    rng = np.random.default_rng(0)
    for name, parameter in factors.items():
        value = Tensor(rng.normal(0, 0.2, parameter.shape).astype(np.float32))
        assert their_factors[name].shape == parameter.shape
        parameter.set_data(value)
        their_factors[name].set_data(value.copy())
    return Pair(ours, theirs, {name: (factors[name], their_factors[name]) for name in factors})
