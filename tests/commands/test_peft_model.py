"""The life of adapters: several on one base, switched, mixed in a batch, merged and taken out again."""

import gc
import os
import signal
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
from mindspore import Tensor

import lora_ms
from lora_ms.errors import LoraMsError
from lora_ms.nn.graph import Graph
from lora_ms.python.adapter_set import BASE

pytestmark = pytest.mark.usefixtures("graph_mode")
ROWS = ("a", "b", "c", BASE)


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def base_of(reference, name: str):
    return lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / name)


@pytest.fixture(scope="module")
def values(golden):
    return golden("combined/qwen2")


@pytest.fixture
def loaded(reference):
    """``loaded("a", "b")``: the qwen2 model with these adapters, the first active."""

    def load(*names: str, model: str = "qwen2") -> lora_ms.PeftModel:
        folder = reference / "combined" / model
        peft = lora_ms.PeftModel.from_pretrained(base_of(reference, model), folder / names[0], names[0])
        for name in names[1:]:
            peft.load_adapter(folder / name, name)
        return peft

    return load


def logits(peft, ids, **kwargs) -> np.ndarray:
    return peft(Tensor(ids), **kwargs).asnumpy()


@pytest.mark.parametrize("model", ["llama3", "qwen2", "qwen3"])
def test_a_mixed_batch_equals_the_single_runs(loaded, golden, model):
    wanted = golden(f"combined/{model}")
    peft, ids = loaded("a", "b", "c", model=model), wanted["input_ids"]
    for index, name in enumerate(ROWS[:3]):
        peft.set_adapter(name)
        single = logits(peft, ids)
        assert_near(single, wanted[f"logits/{name}"])
        mixed = logits(peft, ids, adapter_names=ROWS)
        assert_near(mixed[index], single[index])
    assert_near(mixed, wanted["mixed_logits"])
    with peft.disable_adapter():
        assert_near(logits(peft, ids)[3], mixed[3])
    other = ("c", BASE, "a", "a")
    for index, (name, row) in enumerate(zip(other, logits(peft, ids, adapter_names=other), strict=True)):
        assert_near(row, wanted[f"logits/{name}"][index])


def test_switching_between_equal_shapes_compiles_nothing_and_moves_no_base_weight(loaded, values, reference):
    peft, ids = loaded("a", "b"), values["input_ids"]
    weights = {id(p) for p in peft.model.get_parameters()}
    before = {name: p.asnumpy().copy() for name, p in peft.model.parameters_and_names() if "lora_" not in name}
    for name in ("a", "b", "a", "b"):
        peft.set_adapter(name)
        assert_near(logits(peft, ids), values[f"logits/{name}"])
        assert {id(p) for p in peft.model.get_parameters()} == weights
    (graph, _), *more = peft.graphs.values()
    assert not more and len(graph.compile_cache) == 1
    for name, p in peft.model.parameters_and_names():
        if name in before and not name.endswith("scaling"):
            np.testing.assert_array_equal(p.asnumpy(), before[name], err_msg=name)


def test_adapters_of_other_shapes_stand_side_by_side(loaded, values):
    peft, ids = loaded("a", "d"), values["input_ids"]  # rank 4 and rank 2
    for name in ("d", "a", "d", "a"):
        peft.set_adapter(name)
        assert peft.active_adapter == name
        assert_near(logits(peft, ids), values[f"logits/{name}"])
    assert len(peft.graphs) == 2 and all(len(graph.compile_cache) == 1 for graph, _ in peft.graphs.values())


def test_hot_swap_across_ranks_and_targets_compiles_nothing(reference, tmp_path, monkeypatch):
    """Ranks 4 and 16 on other modules: the tokens of a fresh load, in the graphs of the first one."""
    rng = np.random.default_rng(3)
    ids = rng.integers(4, 128, (2, 6)).astype(np.int32)
    settings = {"small": (4, ("q_proj", "v_proj")), "large": (16, "all-linear"), "other": (3, ("down_proj",))}
    wanted, found = {}, {}
    for name, (rank, targets) in settings.items():
        model = base_of(reference, "qwen2")
        peft = lora_ms.get_peft_model(model, lora_ms.LoraConfig(rank, 2.0 * rank, target_modules=targets))
        for parameter in model.trainable_params():
            parameter.set_data(Tensor(0.3 * rng.standard_normal(parameter.shape).astype(np.float32)))
        peft.save_pretrained(tmp_path / name)
        if name != "other":
            wanted[name] = peft.generate(ids, max_new_tokens=5), logits(peft, ids)
    peft = lora_ms.PeftModel.from_pretrained(base_of(reference, "qwen2"), tmp_path / "small", "small")
    peft.prepare_for_hotswap(16)
    found["small"] = peft.generate(ids, max_new_tokens=5), logits(peft, ids)
    compiled = []

    @contextmanager
    def compiling(graph, args):
        compiled.append(graph)
        yield

    monkeypatch.setattr(Graph, "compiling", staticmethod(compiling))
    peft.load_adapter(tmp_path / "large", "large")
    peft.set_adapter("large")
    found["large"] = peft.generate(ids, max_new_tokens=5), logits(peft, ids)
    peft.set_adapter("small")
    assert_near(logits(peft, ids), wanted["small"][1])
    assert not compiled and len(peft.graphs) == 1
    for name, (tokens, numbers) in wanted.items():
        np.testing.assert_array_equal(found[name][0], tokens)
        assert_near(found[name][1], numbers)
    peft.save_pretrained(tmp_path / "wide")
    again = lora_ms.PeftModel.from_pretrained(base_of(reference, "qwen2"), tmp_path / "wide")
    assert_near(logits(again, ids), wanted["small"][1])
    narrow = lora_ms.PeftModel.from_pretrained(base_of(reference, "qwen2"), tmp_path / "small")
    with pytest.raises(LoraMsError, match="rank 4 of .* is above target_rank 2"):
        narrow.prepare_for_hotswap(2)
    narrow.prepare_for_hotswap(8, ("q_proj", "v_proj"))
    with pytest.raises(LoraMsError, match="none of the modules that were prepared"):
        narrow.load_adapter(tmp_path / "other", "other")
    assert list(narrow.peft_config) == ["default"]


def test_disabled_inside_the_block_alone(loaded, values):
    peft, ids = loaded("a"), values["input_ids"]
    on = logits(peft, ids)
    with peft.disable_adapter():
        assert_near(logits(peft, ids), values["logits/__base__"])
    np.testing.assert_array_equal(logits(peft, ids), on)
    with pytest.raises(ZeroDivisionError), peft.disable_adapter():
        raise ZeroDivisionError
    np.testing.assert_array_equal(logits(peft, ids), on)


def test_merged_unmerged_and_merged_again(loaded, values):
    peft, ids = loaded("a", "b"), values["input_ids"]
    on = logits(peft, ids)
    peft.merge_adapter()
    peft.merge_adapter()  # changes nothing
    merged = logits(peft, ids)
    assert_near(merged, on)
    assert not any("lora_" in p.name for p in peft.model.get_parameters())
    with peft.disable_adapter():
        assert_near(logits(peft, ids), values["logits/__base__"])
    np.testing.assert_array_equal(logits(peft, ids), merged)
    peft.unmerge_adapter()
    np.testing.assert_array_equal(logits(peft, ids), on)  # to the last bit, however often
    peft.merge_adapter()
    peft.set_adapter("b")
    assert_near(logits(peft, ids), values["logits/b"])


def test_a_safe_merge_refuses_what_is_not_finite(loaded, values):
    peft, ids = loaded("a"), values["input_ids"]
    layer = peft.model.model.layers[1].self_attn.q_proj
    good = layer.lora_b.asnumpy().copy()
    layer.lora_b.set_data(Tensor(np.full_like(good, np.nan)))
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(lora_ms.LoraMsError, match=r"model\.layers\.1\.self_attn\.q_proj holds NaN or infinity"):
            merge(safe_merge=True)
    layer.lora_b.set_data(Tensor(good))
    assert_near(logits(peft, ids), values["logits/a"])


def test_unloaded_and_merged_for_good(loaded, values):
    ids = values["input_ids"]
    bare = loaded("a", "b").unload()
    assert_near(bare(Tensor(ids)).asnumpy(), values["logits/__base__"])
    peft = loaded("b")
    peft.model(Tensor(ids))  # compiled with the adapter in it
    merged = peft.merge_and_unload()
    assert not any("lora_" in p.name for p in merged.get_parameters())
    assert_near(merged(Tensor(ids)).asnumpy(), values["logits/b"])


def test_deleted_adapters(loaded, values):
    peft, ids = loaded("a", "b", "d"), values["input_ids"]
    peft.delete_adapter("a")
    assert peft.active_adapter == "b" and list(peft.peft_config) == ["b", "d"]
    assert_near(logits(peft, ids), values["logits/b"])
    for name in ("d", "b"):
        peft.delete_adapter(name)
    assert peft.active_adapter is None
    assert_near(logits(peft, ids), values["logits/__base__"])
    with pytest.raises(lora_ms.LoraMsError, match="no adapter is active"):
        peft.save_pretrained("nowhere")


def test_deleting_another_adapter_leaves_the_active_one(loaded, values):
    peft, ids = loaded("a", "b", "d"), values["input_ids"]  # b has a's shape, d another
    on = logits(peft, ids)
    for name in ("b", "d"):
        peft.delete_adapter(name)
        np.testing.assert_array_equal(logits(peft, ids), on)


def test_an_adapter_in_the_place_of_a_deleted_one_computes_with_its_own_numbers(loaded, reference, values, token_rows):
    peft, ids = loaded("d", "a"), values["input_ids"]
    peft.set_adapter("a")
    trainer = lora_ms.Trainer(peft, eval_dataset=token_rows)
    assert_near(logits(peft, ids), values["logits/a"])
    before = trainer.evaluate()["eval_loss"]
    peft.delete_adapter("a")
    peft.load_adapter(reference / "combined/qwen2/b", "b")
    peft.set_adapter("b")
    assert_near(logits(peft, ids), values["logits/b"])
    assert trainer.evaluate()["eval_loss"] != before


def test_what_was_compiled_goes_with_its_cells(loaded, values, token_rows):
    peft, ids = loaded("a", "d"), values["input_ids"]
    trainer = lora_ms.Trainer(peft, eval_dataset=token_rows)
    on, before = logits(peft, ids), trainer.evaluate()["eval_loss"]
    for _ in range(3):
        peft.merge_adapter()
        assert_near(logits(peft, ids), on)
        trainer.evaluate()
        compiled = [weakref.ref(graph) for graph, _ in peft.graphs.values()][1:]
        peft.unmerge_adapter()
        np.testing.assert_array_equal(logits(peft, ids), on)
        assert trainer.evaluate()["eval_loss"] == before
        gc.collect()
        assert len(peft.graphs) == len(trainer._evaluators) == 1
        assert [graph() for graph in compiled] == [None]
    peft.set_adapter("d")
    logits(peft, ids)
    assert len(peft.graphs) == 2
    peft.delete_adapter("a")
    assert len(peft.graphs) == 1 and len(trainer._evaluators) == 0


def test_a_mixed_batch_leaves_merged_weights_and_numbers_as_they_were(loaded, values):
    peft, ids = loaded("a", "b"), values["input_ids"]
    on = logits(peft, ids)
    peft.merge_adapter()
    merged, kept = logits(peft, ids), len(peft.graphs)
    logits(peft, ids, adapter_names=("b",) * len(ids))
    np.testing.assert_array_equal(logits(peft, ids), merged)
    assert len(peft.graphs) == kept + 1
    peft.unmerge_adapter()
    with pytest.raises(lora_ms.LoraMsError):
        peft.add_weighted_adapter(["a", "b"], [1.0], "c")
    np.testing.assert_array_equal(logits(peft, ids), on)


def test_names_that_contain_parts_of_parameter_names(loaded, reference, values, tmp_path):
    peft = lora_ms.PeftModel.from_pretrained(base_of(reference, "qwen2"), reference / "combined/qwen2/a", "weight")
    peft.load_adapter(reference / "combined" / "qwen2" / "b", "lora_A")
    peft.set_adapter("lora_A")
    assert_near(logits(peft, values["input_ids"]), values["logits/b"])
    peft.save_pretrained(tmp_path, selected_adapters=["weight", "lora_A"])
    again = lora_ms.PeftModel.from_pretrained(base_of(reference, "qwen2"), tmp_path / "weight")
    np.testing.assert_array_equal(logits(again, values["input_ids"]), logits_of(peft, "weight", values))


def logits_of(peft, name: str, values) -> np.ndarray:
    peft.set_adapter(name)
    return logits(peft, values["input_ids"])


def test_generation_with_another_adapter_in_each_row(loaded, values):
    peft, prompts = loaded("a", "b", "c"), values["input_ids"].tolist()
    mixed = peft.generate(prompts, max_new_tokens=8, eos_token_id=[], adapter_names=ROWS)
    for index, name in enumerate(ROWS):
        if name == BASE:
            with peft.disable_adapter():
                single = peft.generate(prompts, max_new_tokens=8, eos_token_id=[])
        else:
            peft.set_adapter(name)
            single = peft.generate(prompts, max_new_tokens=8, eos_token_id=[])
        np.testing.assert_array_equal(mixed[index], single[index])
    assert len({tuple(row[6:]) for row in mixed}) > 1


def test_a_second_adapter_trains_and_the_first_stays(loaded, values, token_rows, tmp_path):
    peft, ids = loaded("a"), values["input_ids"]
    peft.add_adapter("fresh", lora_ms.LoraConfig(2, 4.0, target_modules=["q_proj", "down_proj"]))
    before = logits_of(peft, "a", values)
    peft.set_adapter("fresh")
    np.testing.assert_array_equal(logits(peft, ids)[0], logits(peft, ids, adapter_names=[BASE] * 4)[0])
    args = lora_ms.TrainingArguments(tmp_path, 1e-2, max_steps=2, per_device_train_batch_size=2, max_seq_length=16)
    lora_ms.Trainer(peft, args, token_rows).train()
    assert np.abs(logits(peft, ids) - values["logits/__base__"]).max() > 1e-3
    trained = logits(peft, ids)
    mixed = logits(peft, ids, adapter_names=["fresh", "a", "fresh", "a"])
    assert_near(mixed[[0, 2]], trained[[0, 2]])
    np.testing.assert_array_equal(logits_of(peft, "a", values), before)
    saved = lora_ms.PeftModel.from_pretrained(peft.unload(), tmp_path / "adapter")
    np.testing.assert_array_equal(logits(saved, ids), trained)


@pytest.mark.parametrize(("method", "names"), [("linear", "abc"), ("cat", "abd"), ("svd", "abd"), ("ties", "abc")])
def test_weighted_adapters(loaded, golden, method, names, tmp_path):
    wanted, peft = golden(f"combined/qwen2_{method}"), loaded(*names)
    more = {"density": 0.5} if method == "ties" else {}
    peft.add_weighted_adapter(list(names), wanted["weights"].tolist(), "sum", method, **more)
    assert peft.active_adapter == "a"
    peft.set_adapter("sum")
    assert_near(logits(peft, wanted["input_ids"]), wanted["logits"])
    peft.save_pretrained(tmp_path)
    again = lora_ms.PeftModel.from_pretrained(peft.unload(), tmp_path)
    assert_near(logits(again, wanted["input_ids"]), wanted["logits"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda peft: peft.set_adapter("z"), "no adapter 'z'; there are: a, b"),
        (lambda peft: peft.delete_adapter("z"), "no adapter 'z'; there are: a, b"),
        (lambda peft: peft.load_adapter(".", "a"), ".: no adapter here: adapter_config.json is missing"),
        (lambda peft: peft.add_adapter("b", lora_ms.LoraConfig()), "adapter name 'b' is taken: give another"),
        (lambda peft: peft.add_adapter(BASE, lora_ms.LoraConfig()), "adapter name '__base__' is taken: give another"),
        (lambda peft: peft(Tensor([[1, 2]]), adapter_names=["z"]), "no adapter z; there are: a, b, __base__"),
        (lambda peft: peft(Tensor([[1, 2]]), adapter_names=["a", "b"]), "adapter_names has 2 names for 1 rows"),
    ],
)
def test_wrong_names(loaded, values, call, message):
    peft = loaded("a", "b")
    with pytest.raises(lora_ms.LoraMsError) as caught:
        call(peft)
    assert str(caught.value) == message
    assert_near(logits(peft, values["input_ids"]), values["logits/a"])


def test_kinds_that_cannot_share_a_batch_say_so(loaded, reference, values):
    peft = loaded("a")
    peft.load_adapter(reference / "variants" / "qwen2_dora", "dora")
    with pytest.raises(lora_ms.LoraMsError, match=r"'dora' cannot share a batch with others: model\.layers\.0"):
        logits(peft, values["input_ids"], adapter_names=["a", "dora", "a", "a"])
    assert_near(logits(peft, values["input_ids"]), values["logits/a"])


def test_a_model_called_before_does_not_go_on_with_its_old_cells(reference, values):
    """MindSpore keeps compiled graphs by the cell that is called, whatever stands inside it since."""
    model, ids = base_of(reference, "qwen2"), Tensor(values["input_ids"])
    assert_near(model(ids).asnumpy(), values["logits/__base__"])
    peft = lora_ms.PeftModel.from_pretrained(model, reference / "combined" / "qwen2" / "a")
    assert_near(model(ids).asnumpy(), values["logits/a"])
    assert_near(peft.unload()(ids).asnumpy(), values["logits/__base__"])


def test_adalora_from_python_shares_its_ranks_out(reference, values, token_rows, tmp_path):
    config = lora_ms.AdaLoraConfig(4, 8.0, target_modules=["q_proj", "v_proj"], target_rank=2, bias="lora_only")
    peft = lora_ms.get_peft_model(base_of(reference, "qwen2"), config)
    args = lora_ms.TrainingArguments(
        tmp_path, 2e-2, max_steps=6, save_steps=1, per_device_train_batch_size=2, max_seq_length=16
    )

    class Stop(lora_ms.TrainerCallback):
        def on_step_end(self, state, record):
            if record.step == 4:  # some ranks have been cut by then
                os.kill(os.getpid(), signal.SIGINT)

    trainer = lora_ms.Trainer(peft, args, token_rows, callbacks=[Stop()])
    assert trainer.train().stopped
    trainer.callbacks.clear()
    trainer.train(resume_from_checkpoint=True)
    assert sum(map(sum, peft.active_peft_config.kept.values())) == 4 * 2  # modules, average rank
    trained = logits(peft, values["input_ids"])
    for folder in ("adapter", "adapter_lora"):
        again = lora_ms.PeftModel.from_pretrained(base_of(reference, "qwen2"), tmp_path / folder)
        assert_near(logits(again, values["input_ids"]), trained)
