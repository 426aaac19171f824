"""Sliding windows against transformers: logits, gradients, generation, in every way that a row can lie in a batch."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import ParameterTuple, Tensor, ops

from lora_ms.infer.generate import Generator
from lora_ms.models.decoder import DecoderConfig
from lora_ms.models.hub import load_directory, new_model, read_config, save_directory
from lora_ms.nn.attention import first_in_window
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss

WINDOW = 8
QWEN = {"use_sliding_window": True, "sliding_window": WINDOW}
# name -> the reference model, and the keys that change in its config.json
WINDOWS = {
    "mistral": (
        "llama2",
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": WINDOW},
    ),
    "qwen2": ("qwen2", {**QWEN, "max_window_layers": 1, "layer_types": None}),
    "qwen3": ("qwen3", {**QWEN, "layer_types": ["sliding_attention", "full_attention"]}),
}
NAMES = list(WINDOWS)


@pytest.fixture
def folder(reference, tmp_path):
    """``folder(name)``: a reference model's folder with a window in its config.json; ``changes`` besides."""

    def make(name: str, **changes):
        base, keys = WINDOWS[name]
        path = shutil.copytree(reference / "models" / base, tmp_path / name, dirs_exist_ok=True)
        hf = json.loads((path / "config.json").read_text()) | keys | changes
        (path / "config.json").write_text(json.dumps({key: value for key, value in hf.items() if value is not None}))
        return path

    return make


@pytest.mark.parametrize("name", NAMES)
def test_logits(operators, folder, golden, name):
    """Alone, and in batches that are padded on either side, with shorter rows beside it."""
    values = golden(f"windows_{name}")
    ids, wanted = values["input_ids"][0], values["logits"][0]
    model = load_directory(folder(name), operators=operators)
    np.testing.assert_allclose(model(Tensor(ids[None])).asnumpy()[0], wanted, rtol=0, atol=1e-4)
    rows, mask = np.zeros((4, 40), np.int32), np.zeros((4, 40), np.int32)
    for line, (length, start) in enumerate(((32, 8), (32, 0), (20, 20), (20, 0))):
        rows[line, start : start + length] = ids[:length]
        mask[line, start : start + length] = 1
    logits = model(Tensor(rows), Tensor(mask)).asnumpy()
    expected = np.concatenate((wanted, wanted, wanted[:20], wanted[:20]))
    np.testing.assert_allclose(logits[mask == 1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rows_packed_in_one_line(native, folder, golden, name):
    values = golden(f"windows_{name}")
    ids, wanted = values["input_ids"][0], values["logits"][0]
    model = load_directory(folder(name), operators=native)
    lengths = (20, 32, 5, 12)
    line = np.concatenate([ids[:n] for n in lengths])
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    hidden = model.hidden_states(Tensor(line[None]), Tensor(positions[None]))
    logits = model.project(hidden, model.head_weight()).asnumpy()
    np.testing.assert_allclose(logits, np.concatenate([wanted[:n] for n in lengths]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_generation(operators, folder, golden, name):
    """A prompt shorter than the window and one longer, in one batch; both answers run past the window."""
    values = golden(f"windows_{name}")
    ids = values["input_ids"][0].tolist()
    new = Generator(load_directory(folder(name), operators=operators)).generate([ids[:5], ids[:12]], 16)
    np.testing.assert_array_equal(new, [values["greedy/5"], values["greedy/12"]])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(operators, folder, golden, name):
    """Float16 weights, with a window and without: each is near its own, and the two are far apart."""
    values = golden(f"windows_{name}")
    ids = Tensor(values["input_ids"])
    found = load_directory(folder(name), ms.float16, operators=operators)(ids).asnumpy()
    np.testing.assert_allclose(found, values["logits"], rtol=0, atol=0.02)
    full = load_directory(folder(name, sliding_window=32), ms.float16, operators=operators)(ids).asnumpy()
    np.testing.assert_allclose(full[:, :WINDOW], found[:, :WINDOW], rtol=0, atol=0.02)
    assert np.abs(full[:, WINDOW:] - values["logits"][:, WINDOW:]).max() > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_seen_by_the_last_of_its_window(native, folder, golden, name):
    """Token 3 is changed: in layers that all have the window, two of them, tokens 3 to 3 + 2 (8 - 1) change."""
    changes = {} if name == "mistral" else {"layer_types": ["sliding_attention"] * 2}
    model = load_directory(folder(name, **changes), operators=native)
    ids = golden(f"windows_{name}")["input_ids"].copy()
    before = model(Tensor(ids)).asnumpy()[0]
    ids[0, 3] = (ids[0, 3] + 50) % 128
    moved = np.abs(model(Tensor(ids)).asnumpy()[0] - before).max(-1) > 1e-6
    assert np.flatnonzero(moved).tolist() == list(range(3, 3 + 2 * (WINDOW - 1) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(native, folder, golden, tmp_path, name):
    values = golden(f"windows_{name}")
    save_directory(load_directory(folder(name), operators=native), tmp_path / "saved")
    again = load_directory(tmp_path / "saved", operators=native)
    np.testing.assert_allclose(again(Tensor(values["input_ids"])).asnumpy(), values["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_layers": (0, 1)},
        {"sliding_layers": (1,), "attention_bias": True},
        {"sliding_layers": (0,), "qk_norm": True},
    ],
)
def test_a_model_of_ones_own_says_its_window(native, tmp_path, changes):
    """config.json of a model that came without one."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    config = DecoderConfig(**sizes, sliding_window=3, **changes)
    save_directory(new_model(config, ms.float32, 0, native), tmp_path / "new")
    assert read_config(tmp_path / "new")[0] == config


def batch_of(ids: np.ndarray) -> tuple[Tensor, ...]:
    """A micro-batch of one row all of whose tokens are learnt but the first."""
    count = len(ids) - 1
    places = np.arange(len(ids), dtype=np.int32)
    return Tensor(ids[None]), Tensor(places[None]), Tensor(places[:count]), Tensor(ids[1:])


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(operators, folder, golden, name):
    values = golden(f"windows_{name}")
    model = load_directory(folder(name), operators=operators)
    keys = [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]
    weights = ParameterTuple([dict(model.parameters_and_names())[key] for key in keys])
    loss, gradients = ops.value_and_grad(SummedLoss(model, 128), None, weights)(*batch_of(values["input_ids"][0]))
    np.testing.assert_allclose(loss.asnumpy(), values["loss"], rtol=1e-5)
    for key, gradient in zip(keys, gradients, strict=True):
        wanted = values[f"gradient/{key}"]
        np.testing.assert_allclose(gradient.asnumpy(), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("recompute", [False, [1], True])
def test_training_steps_however_much_is_recomputed(native, folder, golden, recompute):
    """A layer with a window above one without."""
    values = golden("windows_qwen2")
    model = load_directory(folder("qwen2"), operators=native)
    keys = [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]
    for key, parameter in model.parameters_and_names():
        parameter.requires_grad = key in keys
    optimizer = FlatAdamW(model.trainable_params(), operators=native)
    loss = MicroStep(SummedLoss(model, 128), optimizer, recompute)(*batch_of(values["input_ids"][0]))
    np.testing.assert_allclose(loss.asnumpy(), values["loss"], rtol=1e-5)
    wanted = np.concatenate([values[f"gradient/{key}"].ravel() for key in keys])
    np.testing.assert_allclose(optimizer.grad.asnumpy(), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


READ = [
    ("mistral", {}, 8, (0, 1)),
    ("mistral", {"sliding_window": 1}, 1, (0, 1)),
    ("mistral", {"sliding_window": None}, 4096, (0, 1)),  # the key is missing: Mistral's default
    ("mistral", {"use_sliding_window": False}, 8, (0, 1)),  # which Mistral does not read either
    ("mistral", {"layer_types": ["full_attention"]}, 8, (0, 1)),  # which Mistral does not read
    ("qwen2", {}, 8, (1,)),
    ("qwen2", {"max_window_layers": 0}, 8, (0, 1)),
    ("qwen2", {"max_window_layers": 2}, 0, ()),
    ("qwen2", {"max_window_layers": None}, 0, ()),  # 28
    ("qwen2", {"use_sliding_window": False}, 0, ()),
    ("qwen3", {}, 8, (0,)),
    ("qwen3", {"layer_types": ["full_attention", "full_attention"]}, 0, ()),
    ("qwen3", {"layer_types": None, "max_window_layers": 1}, 8, (1,)),
]


@pytest.mark.parametrize(("name", "changes", "window", "layers"), READ)
def test_which_layers_have_a_window(folder, name, changes, window, layers):
    config, _ = read_config(folder(name, **changes))
    assert (config.sliding_window, config.sliding_layers) == (window, layers)
    assert config.layer_windows == tuple(window if i in layers else 0 for i in range(2))
    assert tuple(config.windows[i] for i in config.window_indices) == config.layer_windows


def test_what_mistral_leaves_out(folder):
    config, _ = read_config(
        folder("mistral", num_attention_heads=8, num_key_value_heads=None, max_position_embeddings=None)
    )
    assert (config.num_key_value_heads, config.max_position_embeddings) == (8, 131072)


def test_mistral_without_a_window_is_a_llama(reference, folder):
    path = folder("mistral")
    hf = json.loads((path / "config.json").read_text()) | {"sliding_window": None}
    (path / "config.json").write_text(json.dumps(hf))
    assert read_config(path)[0] == read_config(reference / "models" / "llama2")[0]


@pytest.mark.parametrize(
    ("window", "seen"), [(0, [0, 0, 0, 0, 4, 4, 4]), (1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 0, 1, 2, 4, 4, 5]),
                         (3, [0, 0, 0, 1, 4, 4, 4]), (100, [0, 0, 0, 0, 4, 4, 4])]
)  # fmt: skip
def test_first_keys(native, window, seen):
    """Two rows in a line, of four and three tokens."""
    first, places = (Tensor(np.array([numbers], np.int32)) for numbers in ([0, 0, 0, 0, 4, 4, 4], range(7)))
    assert first_in_window(first, places, window).asnumpy().tolist() == [seen]
    assert first.dtype == ms.int32
