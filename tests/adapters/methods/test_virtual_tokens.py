"""Virtual tokens: prompts, their starts, generation behind them, packed rows, several by name, and files."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import lora_ms
from lora_ms.adapters.inject import adapter_cells, inject
from lora_ms.adapters.methods.prefix import PrefixTuningConfig
from lora_ms.adapters.methods.prompt import PromptTuningConfig
from lora_ms.adapters.methods.ptuning import PTuningConfig
from lora_ms.adapters.peft_format import load_adapter, read_tensors, restore_adapter, save_adapter
from lora_ms.cli import main as cli
from lora_ms.data.collate import collate
from lora_ms.data.example import TokenRow
from lora_ms.data.loader import DataPlan
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss

pytestmark = pytest.mark.usefixtures("graph_mode")
VARIANTS = ("qwen2_prefix", "qwen2_prompt", "qwen3_ptuning_lstm")


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", VARIANTS)
def test_generated_tokens_are_pefts(reference, golden, name):
    """And with a repetition penalty, which must not look at virtual ids."""
    values = golden(f"variants/{name}")
    model = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / name.partition("_")[0])
    load_adapter(model, reference / "variants" / name)
    ids, wanted = values["input_ids"], values["generated"]
    found = model.generate(ids, max_new_tokens=wanted.shape[1])
    np.testing.assert_array_equal(found[:, ids.shape[1] :], wanted)
    model.generate(ids, max_new_tokens=1, repetition_penalty=1.2)


@pytest.mark.parametrize("name", VARIANTS[:2])
def test_padded_bucketed_and_packed_rows_give_one_loss(reference, native, name):
    model = load_directory(reference / "models" / name.partition("_")[0], operators=native).set_train(False)
    load_adapter(model, reference / "variants" / name)
    rng = np.random.default_rng(4)
    rows = []
    for number, length in enumerate((5, 9, 7, 3)):
        ids = rng.integers(4, 128, length).astype(np.int32)
        rows.append(TokenRow(str(number), ids, np.where(np.arange(length) > 1, ids, -100).astype(np.int32)))
    store = TokenStore.of(rows).led_by(model.leading_ids)
    loss, found = SummedLoss(model, 128), {}
    for kind in ("padded", "bucketed", "packed"):
        plan = DataPlan.build(
            store, batch_size=4, accumulation=1, epochs=1, seed=0, pad_id=0, seq_length=16, kind=kind, buckets=2
        )
        batches, _ = plan.step(0)
        found[kind] = sum(float(loss(*map(Tensor, batch[:4])).asnumpy()) for batch in batches)
    np.testing.assert_allclose([found["bucketed"], found["packed"]], found["padded"], rtol=1e-5)


def test_a_prefix_trains_in_shared_graphs_but_not_its_network(reference, native):
    """Recomputed layers, which deep models are like: the gradient of the one graph, to rounding."""

    def start(recompute: bool, **settings):
        model = load_directory(reference / "models" / "qwen2", operators=native)
        ms.set_seed(3)
        inject(model, PrefixTuningConfig(num_virtual_tokens=3, **settings))
        model.set_train(True)
        optimizer = FlatAdamW(model.trainable_params(), operators=native)
        return model, optimizer, MicroStep(SummedLoss(model, 128), optimizer, recompute)

    ids = np.random.default_rng(5).integers(4, 128, 9).astype(np.int32)
    found = []
    for recompute in (False, True):
        model, optimizer, micro_step = start(recompute)
        row = TokenRow("", np.append(np.arange(128, 131, dtype=np.int32), ids), np.append([-100] * 4, ids[1:]))
        batch = collate([[row]], 1, 16, 16, 0)
        loss = float(micro_step(*map(Tensor, batch[:4])).asnumpy())
        found.append((loss, optimizer.grad.asnumpy()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and np.abs(found[0][1]).max() > 1e-4
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)
    assert "prefix_projection: False" in error_of(start, True, prefix_projection=True, encoder_hidden_size=4)


def test_rows_led_by_ids():
    rows = [
        TokenRow("a", *np.array([[4, 5, 6], [-100, 5, 6]], np.int32)),
        TokenRow("b", *np.array([[7, 8]] * 2, np.int32)),
    ]
    led = TokenStore.of(rows).led_by([90, 91])
    assert [row.input_ids.tolist() for row in led] == [[90, 91, 4, 5, 6], [90, 91, 7, 8]]
    assert [row.labels.tolist() for row in led] == [[-100, -100, -100, 5, 6], [-100, -100, 7, 8]]
    assert led.label_counts.tolist() == [2, 2] and [row.where for row in led] == ["a", "b"]
    assert TokenStore.of(rows).led_by([]).lengths.tolist() == [3, 2]


def test_where_prompts_start(bare):
    """From normal numbers, from rows of the embedding, from those of a text's tokens, repeated as in PEFT."""
    weight = bare().model.embed_tokens.weight.asnumpy()

    def start(**settings) -> np.ndarray:
        model = bare()
        ms.set_seed(1)
        config = PromptTuningConfig(num_virtual_tokens=5, **settings)
        inject(model, config.reading(lambda text: {"input_ids": [5, 9]}))
        return adapter_cells(model)["model.embed_tokens"].prompt_embeddings.asnumpy()

    assert 0.7 < start().std() < 1.3
    drawn = start(prompt_tuning_init="SAMPLE_VOCAB")
    assert all((row == weight).all(1).any() for row in drawn)
    text = start(prompt_tuning_init="TEXT", prompt_tuning_init_text="some text")
    np.testing.assert_array_equal(text, weight[[5, 9, 5, 9, 5]])
    assert "go together" in error_of(PromptTuningConfig, prompt_tuning_init="TEXT")
    assert "needs a tokenizer" in error_of(
        PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="a").reading, None
    )
    assert error_of(PromptTuningConfig, target_modules=("q_proj",)) == (
        "target_modules with pet_type prompt: leave it out, virtual tokens have no modules"
    )


def test_the_network_of_p_tuning_is_restored_and_pefts_file_has_vectors_alone(reference, native, tmp_path):
    def fresh():
        return load_directory(reference / "models" / "qwen2", operators=native)

    config = PTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8)
    model, other = fresh(), fresh()
    inject(model, config)
    save_adapter(model, tmp_path, config)
    inject(other, config)
    restore_adapter(other, tmp_path, config)
    first, second = (adapter_cells(each)["model.embed_tokens"].export() for each in (model, other))
    assert first.keys() == second.keys() == read_tensors(tmp_path).keys() and len(first) == 8
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    load_adapter(fresh(), tmp_path)
    theirs = fresh()
    load_adapter(theirs, reference / "variants" / "qwen2_ptuning")
    assert list(adapter_cells(theirs)["model.embed_tokens"].tensors()) == ["prompt_embeddings"]
    assert {p.name for p in theirs.trainable_params()} == {"model.embed_tokens.vectors_alone"}


def test_several_by_name_and_refusals(reference, golden):
    values = golden("variants/qwen2_prompt")
    ids = Tensor(values["input_ids"])
    model = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
    peft = lora_ms.PeftModel.from_pretrained(model, reference / "variants" / "qwen2_prompt", "a")
    np.testing.assert_allclose(peft(ids).asnumpy(), values["logits"], rtol=0, atol=1e-4)
    with peft.disable_adapter():
        np.testing.assert_allclose(peft(ids).asnumpy(), values["base_logits"], rtol=0, atol=1e-4)
    peft.add_adapter("b", lora_ms.PromptTuningConfig(num_virtual_tokens=3))
    peft.set_adapter("b")
    peft.set_adapter("a")
    np.testing.assert_allclose(peft(ids).asnumpy(), values["logits"], rtol=0, atol=1e-4)
    assert "cannot be merged" in error_of(peft.merge_adapter)
    assert "cannot share a batch" in error_of(peft, ids, adapter_names=["a", "b"])


def test_check_adapter_and_merge(reference, tmp_path, capsys):
    path, base = (str(reference / kind) for kind in ("variants/qwen2_prompt", "models/qwen2"))
    words = ["--load_adapter", path, "--load_checkpoint", base]
    assert cli.main(["check-adapter", *words]) == 0
    table = capsys.readouterr().out
    for line in (
        "prompt tuning, 3 virtual tokens",
        "1 tensor, prompt tuning on 1 module: embed_tokens",
        "has its place",
    ):
        assert line in table
    assert cli.main(["merge", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "cannot be merged" in capsys.readouterr().err and not (tmp_path / "out").exists()
