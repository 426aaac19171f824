"""DPO, ORPO, SimPO and KTO: step for step as torch with TRL's formulas, in every layout, and in whole runs."""

import dataclasses
import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import adapter_cells, inject
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.cli.main import main
from lora_ms.config import load_config
from lora_ms.data.example import TokenRow
from lora_ms.data.loader import DataPlan
from lora_ms.data.preferences import with_mismatched
from lora_ms.data.store import TokenStore
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory
from lora_ms.objectives.base import Answers
from lora_ms.recipes import data
from lora_ms.recipes.data import PreparedRows, held_out_plan
from lora_ms.recipes.evaluate import evaluator_of
from lora_ms.runtime.device import Runtime
from lora_ms.train.evaluation import LabelLogProbs
from lora_ms.train.gradient import MicroStep
from lora_ms.train.optimizer import FlatAdamW
from lora_ms.train.parts import SummedLoss

pytestmark = pytest.mark.usefixtures("graph_mode")
PREFIX = "base_model.model."
TARGETS = ("q_proj", "v_proj", "down_proj")
TERMS = {  # as tests/reference/make_preferences.py has them
    "dpo": {"type": "dpo", "beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.2},
    "orpo": {"type": "orpo", "beta": 0.5},
    "simpo": {"type": "simpo", "beta": 2.0, "gamma": 0.7},
    "kto": {"type": "kto", "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
}


def keys(term: dict):
    return load_config(None, flags={"objectives": [term]}).objectives[0]


@pytest.fixture(scope="module")
def z(golden) -> dict[str, np.ndarray]:
    return golden("preferences")


@pytest.fixture(scope="module")
def store(z) -> TokenStore:
    """48 rows, four a step, of two answers each."""
    ids, labels, lengths = (z[key].reshape(-1, *z[key].shape[4:]) for key in ("input_ids", "labels", "lengths"))
    liked = np.repeat(z["liked"].ravel(), 2)
    return TokenStore.of(
        [TokenRow(f"row {i // 2}", ids[i, :n], labels[i, :n], bool(liked[i])) for i, n in enumerate(lengths)]
    )


@pytest.fixture(scope="module")
def start(reference, native, z, store):
    """The model with the adapter that the traces begin with, put there anew by a call; and the references."""
    model = load_directory(reference / "models" / "qwen2", operators=native)
    plan = held_out_plan(store, 4, None, 16, Runtime("CPU"))
    found = LabelLogProbs(SummedLoss(model, 128)).of_rows(plan)
    references = np.array([one.astype(np.float64).sum() for one in found]).reshape(-1, 2)
    inject(model, LoraConfig(4, 8, target_modules=TARGETS))

    def again():
        for path, cell in adapter_cells(model).items():
            for factor, parameter in cell.tensors().items():
                parameter.set_data(Tensor(z[f"initial/{PREFIX}{path}.{factor}"]))
        model.set_train(True)
        return model

    return again, references


def prepared(name: str, store: TokenStore, references: np.ndarray, batch_size: int = 2, **layout):
    """The term, and the plan of steps of four rows in their order."""
    counts, liked = store.label_counts.reshape(-1, 2), store.columns.liked[::2].astype(bool)
    term = keys(TERMS[name]).preference_term(Answers(counts, liked, batch_size, references))
    layout = {"accumulation": 4 // batch_size, "epochs": 1, "seed": 0, "shuffle": False, "pad_id": 0, **layout}
    plan = DataPlan.build(store, batch_size=batch_size, seq_length=32, unit=2, **layout)
    return term, dataclasses.replace(plan, terms=[term.rows])


def step_of(micro_step, plan: DataPlan, step: int) -> tuple[np.ndarray, int]:
    """What the cells sum up in a step, the loss as a mean; and the step's label tokens."""
    batches, label_tokens = plan.step(step)
    sums = sum(micro_step(*map(Tensor, (*b[:4], *b.extras))).asnumpy().astype(np.float64) for b in batches)
    return np.concatenate([sums[:1] / label_tokens, sums[1:]]), label_tokens


@pytest.mark.parametrize("name", TERMS)
def test_twelve_steps_against_torch(name, z, store, start, native):
    again, references = start
    model = again()
    term, plan = prepared(name, store, references)
    params = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    optimizer = FlatAdamW(list(params.values()), weight_decay=0.1, max_grad_norm=1.0, operators=native)
    micro_step = MicroStep(SummedLoss(model, 128, comparison=term.cell), optimizer)
    losses, shown, norms = [], [], []
    last = PreparedRows(store.take(np.arange(88, 96)), [], [], 2)  # of the last step
    held_out = held_out_plan(last.store, 2, None, 16, Runtime("CPU"), packing=False, length_buckets=1, unit=2)
    evaluator = evaluator_of([keys(TERMS[name])], model, held_out, last, Runtime("CPU"), references=references[44:])
    for step in range(12):
        if step == 11 and name in ("dpo", "kto"):  # a comparison of two answers, and of one with the others
            record = evaluator.evaluate(11, 1.0, None)
            assert model.training
        found, label_tokens = step_of(micro_step, plan, step)
        norm, _ = optimizer(Tensor(5e-3, ms.float32), Tensor(label_tokens, ms.float32))
        losses.append(found[0])
        shown.append(term.rows.metrics(found[1:]))
        norms.append(float(norm.asnumpy()))
    np.testing.assert_allclose(losses, z[f"{name}/loss"], rtol=1e-4)
    np.testing.assert_allclose(norms, z[f"{name}/grad_norm"], rtol=1e-3)
    rewards = np.array([[one["rewards/chosen"], one["rewards/rejected"]] for one in shown])
    np.testing.assert_allclose(rewards, z[f"{name}/rewards"], rtol=1e-3, atol=1e-4)
    if name in ("dpo", "kto"):
        assert record.eval_loss == pytest.approx(z[f"{name}/loss"][11], rel=1e-4)
        assert record.metrics == {f"eval_{key}": pytest.approx(value, rel=1e-4) for key, value in shown[11].items()}
    np.testing.assert_allclose([one["rewards/margins"] for one in shown], rewards[:, 0] - rewards[:, 1])
    for key, value in z.items():
        if key.startswith(f"{name}/final/"):
            path = key.removeprefix(f"{name}/final/{PREFIX}").replace("lora_A.weight", "lora_a")
            ours = params[path.replace("lora_B.weight", "lora_b")].asnumpy()
            far = np.abs(ours - value)
            # AdamW divides a gradient that is almost 0 by itself: a number in hundreds moves otherwise by a step or so
            assert np.quantile(far, 0.99) < 1e-4 and far.max() < 5e-3, key


def test_layouts_have_the_same_loss(store, start, native):
    """A pair stays together: padded, in buckets and packed, in two micro-batches and in one."""
    again, references = start
    model = again()
    found = []
    for kind, batch_size in (("padded", 2), ("bucketed", 4), ("packed", 4)):
        term, plan = prepared("dpo", store, references, batch_size, kind=kind)
        assert plan.layout.kind == kind and plan.total_steps == 12
        optimizer = FlatAdamW([p for p in model.get_parameters() if p.requires_grad], operators=native)
        micro_step = MicroStep(SummedLoss(model, 128, comparison=term.cell), optimizer)
        sums, label_tokens = step_of(micro_step, plan, 0)
        found.append((sums, optimizer.grad.asnumpy() / label_tokens))
    for sums, grad in found[1:]:
        np.testing.assert_allclose(sums, found[0][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grad, found[0][1], rtol=1e-4, atol=1e-6)


def test_the_other_answers_of_kto():
    rows = [TokenRow(f"row {i}", np.array(ids), np.array(labels), i != 1) for i, (ids, labels) in enumerate([
        ([5, 6, 7], [-100, 6, 7]), ([8, 9, 10, 11], [-100, -100, 10, 11]), ([12, 13], [-100, 13]),
    ])]  # fmt: skip
    found = with_mismatched(TokenStore.of(rows), seq_length=4)
    assert [row.input_ids.tolist() for row in found][1::2] == [[5, 13], [8, 9, 6, 7], [12, 10, 11]]
    assert [row.labels.tolist() for row in found][1::2] == [[-100, 13], [-100, -100, 6, 7], [-100, 10, 11]]
    assert [row.liked for row in found] == [True, True, False, False, True, True]


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_rows_held_out_keep_both_answers(root, tmp_path, kind):
    """A fifth of ten rows."""
    file = tmp_path / "rows.jsonl"
    answers = {"dpo": {"chosen": "Yes.", "rejected": "No."}, "kto": {"output": "Yes.", "label": True}}[kind]
    file.write_text("".join(json.dumps({"instruction": f"{i}?", **answers}) + "\n" for i in range(10)))
    flags = {"objectives": [{"type": kind}], "train_dataset.validation_split": 0.2}
    flags["load_checkpoint"] = str(root / "examples/tiny/model")
    config = load_config(None, flags=flags)
    tokenizer = data.tokenizer_for(config, training=True)
    preparation = data.preparation_of(config, config.train_dataset, 64, 10**6)
    rows = data.rows_of(config.train_dataset, [str(file)], tokenizer, preparation)
    kept, held_out = data.split_off(config, rows, tokenizer, preparation)
    assert (kept.units, held_out.units, len(held_out.store)) == (8, 2, 4)
    names = [row.where for row in held_out.store]
    assert names[::2] == names[1::2] and len({*names} | {row.where for row in kept.store}) == 10
    assert [row.liked for row in held_out.store] == [True, kind == "kto"] * 2


def test_kto_needs_rows_to_compare():
    with pytest.raises(LoraMsError, match="a batch_size of 2 or more, not 1"):
        keys(TERMS["kto"]).preference_term(Answers(np.ones((3, 2), int), np.ones(3, bool), 1, np.zeros((3, 2))))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"objectives": [{"type": "dpo"}, {"type": "kl_anchor"}]}, "dpo and kl_anchor exclude each other"),
        ({"objectives": [{"type": "kto"}], "runner_config.adaptive_batch": True}, "kto compares the rows of a micro"),
    ],
)
def test_settings_that_exclude_each_other(flags, said):
    with pytest.raises(LoraMsError, match=said):
        load_config(None, flags=flags)


# --- whole runs, of the bundled model


@pytest.fixture(scope="module")
def words(root) -> list[str]:
    """A run that is evaluated on twenty of its rows, after three of four epochs and at its end."""
    saved = "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 39}]"
    held_out = ["--do_eval", "True", "--eval_dataset_dir", str(root / "examples/preferences.jsonl")]
    options = ["eval_step_interval=39", "eval_dataset.num_samples=20"]
    yaml = str(root / "configs/tiny/dpo_tiny.yaml")
    return ["finetune", "--config", yaml, "--epochs", "4", *held_out, "--options", saved, *options]


def records(folder) -> list[dict]:
    times = ("tokens_per_second", "step_time_s", "wait_share", "peak_memory_mb", "eval_time_s")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


@pytest.fixture(scope="module")
def whole(words, root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*words, "--output_dir", str(folder)]) == 0
    return folder


def accuracy(found: list[dict]) -> float:
    """Of an epoch of a hundred rows in thirteen steps, of which the last has four."""
    return sum(one["rewards/accuracies"] * (4 if i == 12 else 8) for i, one in enumerate(found)) / 100


def test_a_hundred_rows_are_learnt(whole):
    found = [one for one in records(whole) if "loss" in one]
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the policy is the reference
    assert accuracy(found[-13:]) >= 0.9
    assert found[-1]["rewards/margins"] > 1
    log = (whole / "run.log").read_text()
    assert "loss: dpo\n" in log and "the model without an adapter scores 200 answers" in log


def test_held_out_pairs_are_evaluated(whole):
    early, late = (one for one in records(whole) if "eval_loss" in one)
    assert (early["step"], late["step"]) == (39, 52) and late["best"]
    assert not {"eval_perplexity", "eval_accuracy"} & late.keys()
    assert late["eval_loss"] < early["eval_loss"] < np.log(2)
    assert late["eval_rewards/accuracies"] >= 0.95
    margin = late["eval_rewards/chosen"] - late["eval_rewards/rejected"]
    assert late["eval_rewards/margins"] == pytest.approx(margin) and margin > early["eval_rewards/margins"]
    log = (whole / "run.log").read_text()
    assert f"eval loss {late['eval_loss']:.4f}  rewards/chosen" in log and (whole / "best").is_dir()


def test_a_resumed_run_is_the_same_to_the_bit(whole, words, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    shutil.copytree(whole, tmp_path / "run")
    assert main([*words, "--output_dir", str(tmp_path / "run"), "--resume_training", "step_39"]) == 0
    assert records(tmp_path / "run") == records(whole)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
