"""Terms of the loss that are functions of the parameters: against NumPy's float64, and in whole runs."""

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from lora_ms.config import load_config
from lora_ms.errors import LoraMsError
from lora_ms.nn.flat_groups import FlatGroups
from lora_ms.objectives import fisher_file
from lora_ms.objectives.base import GivenRows, Start
from lora_ms.objectives.parameter_cells import Overlap
from lora_ms.recipes.objectives import ConfiguredTerms

A = "model.layers.{}.mlp.up_proj.lora_a"
B = "model.layers.{}.mlp.up_proj.lora_b"


def keys(*terms: dict) -> list:
    """``objectives`` of a YAML."""
    return load_config(None, flags={"objectives": list(terms)}).objectives


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@pytest.fixture
def start() -> Start:
    """Two modules of one shape and one of another."""
    shapes = {A.format(0): (2, 6), B.format(0): (5, 2), A.format(1): (2, 6), B.format(1): (5, 2), A.format(2): (3, 4)}
    params = [Parameter(Tensor(drawn(*s, seed=i)), name=n) for i, (n, s) in enumerate(shapes.items())]
    return Start(list(shapes), params)


@pytest.fixture
def elsewhere(start) -> np.ndarray:
    """Where training has moved the parameters to [n]."""
    return np.concatenate([p.asnumpy().ravel() for p in start.params]) + 0.1 * drawn(sum(p.size for p in start.params))


def write_fisher(path, start: Start, names: list[str]) -> dict[str, np.ndarray]:
    values = {n: np.abs(drawn(*p.shape, seed=9)) for n, p in zip(start.names, start.params, strict=True) if n in names}
    held = {n: p.asnumpy() for n, p in zip(start.names, start.params, strict=True) if n in names}
    fisher_file.write(path, values, {"rows": 3, "start": fisher_file.digest_of_values(held)})
    return values


def check(term, flat: np.ndarray, value: float, gradient: np.ndarray) -> None:
    found, slope = term(Tensor(flat.astype(np.float32)))
    np.testing.assert_allclose(float(found.asnumpy()), value, rtol=1e-4)
    np.testing.assert_allclose(slope.asnumpy(), gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


def test_ewc(graph_mode, start, elsewhere, tmp_path):
    """lambda Σ F (w - w0)², times the weight; parameters without F are free."""
    file = tmp_path / "fisher.safetensors"
    values = write_fisher(file, start, start.names[1:])
    (term,) = keys({"type": "ewc", "weight": 0.2, "lambda": 30, "fisher": str(file)})
    fisher = np.concatenate([np.zeros(12), *(values[n].ravel() for n in start.names[1:])]).astype(np.float64)
    moved = elsewhere.astype(np.float64) - np.concatenate([p.asnumpy().ravel() for p in start.params])
    cell = term.parameter_term(start)
    check(cell, elsewhere, 0.2 * 30 * np.sum(fisher * moved**2), 0.2 * 30 * 2 * fisher * moved)
    assert term.notes(start) == ["ewc: 44 of 56 trained numbers are held, by 3 rows"]


def test_l2_anchor(graph_mode, start, elsewhere):
    (term,) = keys({"type": "l2_anchor", "weight": 0.3})
    moved = elsewhere.astype(np.float64) - np.concatenate([p.asnumpy().ravel() for p in start.params])
    check(term.parameter_term(start), elsewhere, 0.3 * np.sum(moved**2), 0.6 * moved)


def test_orthogonal(graph_mode, start, elsewhere):
    """Σ (A earlier^T)²: two earlier adapters on module 0, one on module 1, and on module 2 one of another width."""
    earlier = [{A.format(i)[:-7]: drawn(rank, width, seed=20 + i) for i, rank, width in per} for per in (
        [(0, 2, 6), (1, 3, 6), (2, 3, 5)], [(0, 4, 6)],
    )]  # fmt: skip
    value = 0.0
    gradient = []
    position = 0
    for name, p in zip(start.names, start.params, strict=True):
        a = elsewhere[position : position + p.size].reshape(p.shape).astype(np.float64)
        position += p.size
        slope = np.zeros(p.shape)
        for adapter in earlier:
            old = adapter.get(name.removesuffix(".lora_a"))
            if old is not None and old.shape[1] == p.shape[1]:
                value += 0.5 * np.sum((a @ old.T.astype(np.float64)) ** 2)
                slope += 0.5 * 2 * (a @ old.T) @ old
        gradient.append(slope.ravel())
    check(Overlap.of(start, earlier, 0.5), elsewhere, value, np.concatenate(gradient))
    assert Overlap.of(start, [{"model.layers.7.mlp.up_proj": drawn(2, 6)}], 0.5) is None


def test_tensors_of_a_deep_model_are_grouped(graph_mode):
    """As many modules as a model of 30 layers adapts, more than the compiler's functions go deep one in another."""
    shapes = [((2, 3), range(0, 300 * 10, 10)), ((4, 1), range(6, 300 * 10, 10))]
    flat = drawn(3001)
    groups = FlatGroups(shapes, 3001)

    class Twice(nn.Cell):
        def __init__(self):
            super().__init__()
            self.groups = groups

        def construct(self, x):
            return self.groups.whole([2.0 * self.groups.tensors(x, 0), 3.0 * self.groups.tensors(x, 1)])

    wanted = np.append(flat[:-1].reshape(300, 10) * np.float32([2] * 6 + [3] * 4), np.float32(0))
    np.testing.assert_array_equal(Twice()(Tensor(flat)).asnumpy(), wanted)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (
            {"type": "ewc", "fisher": "f", "lamda": 1},
            "unknown key objectives.0.lamda; did you mean objectives.0.lambda",
        ),
        ({"type": "ewc"}, "objectives.0.fisher is missing"),
        ({"type": "ewcc"}, r"objectives.0.type expects one of ewc, .*\(nearest: ewc\)"),
        ({"weight": 1}, "objectives.0.type is missing: give one of ewc, "),
        ({"type": "l2_anchor", "weight": -1}, "objectives.0.weight expects 0 or more"),
    ],
)
def test_keys_that_are_wrong(term, said):
    with pytest.raises(LoraMsError, match=said):
        keys(term)


def test_files_that_do_not_fit(start, tmp_path):
    with pytest.raises(LoraMsError, match="objectives: l2_anchor is given twice"):
        keys({"type": "l2_anchor"}, {"type": "l2_anchor"})
    file = tmp_path / "fisher.safetensors"
    (term,) = keys({"type": "ewc", "fisher": str(file)})
    with pytest.raises(LoraMsError, match="no such file: lora-ms fisher writes it"):
        term.check()
    settings = {"rows": 1, "start": ""}
    for values, said in [
        ({"x": np.ones(3, np.float32)}, "has none of the parameters that are trained"),
        ({start.names[0]: np.ones((2, 5), np.float32)}, "made of another model or adapter: .*2, 5. there, .2, 6. here"),
        ({start.names[0]: np.full((2, 6), np.nan, np.float32)}, "holds other than float32 numbers of 0 and more"),
        ({start.names[0]: np.full((2, 6), -1, np.float32)}, "holds other than float32 numbers of 0 and more"),
    ]:
        fisher_file.write(file, values, settings)
        with pytest.raises(LoraMsError, match=said):
            term.parameter_term(start)
    fisher_file.write(file, {start.names[0]: np.ones((2, 6), np.float32)}, settings)
    assert term.notes(start)[-1].startswith(f"warning: {file} was made at other values")
    fisher_file.storage.write_tensors(file, {"x": np.ones(3, np.float32)})
    with pytest.raises(LoraMsError, match="no Fisher information"):
        term.check()
    with pytest.raises(LoraMsError, match="orthogonal needs adapters"):
        keys({"type": "orthogonal"})[0].check()


@pytest.fixture(scope="module")
def held(train, plain_run, tmp_path_factory):
    """The six steps of ``plain_run`` with EWC, L2 and orthogonality; saved in the middle."""
    folder = tmp_path_factory.mktemp("held")
    terms = []
    said = []

    def prepare(model):
        trained = {name: p for name, p in model.parameters_and_names() if p.requires_grad}
        values = {name: np.full(p.shape, 0.01, np.float32) for name, p in trained.items()}
        start = fisher_file.digest_of_values({name: p.asnumpy() for name, p in trained.items()})
        fisher_file.write(folder / "fisher.safetensors", values, {"rows": 4, "start": start})
        terms[:] = [ConfiguredTerms(keys(
            {"type": "ewc", "weight": 0.2, "fisher": str(folder / "fisher.safetensors")},
            {"type": "l2_anchor", "weight": 0.5},
            {"type": "orthogonal", "weight": 0.01, "adapters": [str(plain_run.path / "adapter")]},
        ), model)]  # fmt: skip
        said.append(terms[0].describe())

    class Late:
        """The terms of the model, which is there when the steps begin."""

        def __getattr__(self, name):
            return getattr(terms[0], name)

    def run(path, **settings):
        return train(path, prepare=prepare, hooks=[Late()], **settings)

    return run, run(folder / "run", save_steps=3), said


def test_each_term_is_logged_and_the_loss_is_their_sum(held, plain_run):
    _, found, said = held
    for record in found.records:
        assert list(record)[-4:] == ["cross_entropy", "ewc", "l2_anchor", "orthogonal"]
        parts = [record[name] for name in ("cross_entropy", "ewc", "l2_anchor", "orthogonal")]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-7)
    first, last = found.records[0], found.records[-1]
    assert first["ewc"] == first["l2_anchor"] == 0 and first["orthogonal"] > 0
    assert first["cross_entropy"] == plain_run.losses[0]
    # the Fisher is 0.01 everywhere: 0.2 x 1000 x 0.01 beside L2's 0.5
    assert last["ewc"] == pytest.approx(4 * last["l2_anchor"], rel=1e-5)
    assert last["l2_anchor"] > 0
    assert said[0].splitlines()[0] == "loss: cross_entropy + 0.2 ewc + 0.5 l2_anchor + 0.01 orthogonal"
    assert "warning" not in said[0]


def test_a_resumed_run_is_the_same_to_the_bit(held, tmp_path):
    run, wanted, _ = held
    shutil.copytree(wanted.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    found = run(tmp_path / "run", resume=True)
    assert found.records == wanted.records
    for name, value in wanted.adapter.items():
        np.testing.assert_array_equal(found.adapter[name], value, err_msg=name)


def test_other_terms_are_another_run(held, train, tmp_path):
    _, wanted, _ = held
    shutil.copytree(wanted.path, tmp_path / "run")
    other = json.loads(json.dumps(keys({"type": "l2_anchor"})[0].identity()))
    with pytest.raises(LoraMsError, match="made by a run with other settings: objectives"):
        train(tmp_path / "run", resume=True, objectives=(other,))


def test_metadata_beside_tensors(tmp_path):
    from safetensors import safe_open

    fisher_file.write(tmp_path / "f", {"x": np.ones((2, 3), np.float32)}, {"rows": 5, "start": "é"})
    with safe_open(tmp_path / "f", "numpy") as file:
        assert json.loads(file.metadata()[fisher_file.KEY]) == {"rows": 5, "start": "é"}
    assert fisher_file.read(tmp_path / "f").rows == 5


# --- terms that depend on the rows


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def contrast(hidden: np.ndarray, rows: list[np.ndarray], general: np.ndarray, temperature: float) -> float:
    """The mean over pairs, in float64, of domain rows against general ones; rows: the slots of each."""
    means = np.stack([hidden[slots].mean(0) for slots in rows])
    units = means / np.linalg.norm(means, axis=1, keepdims=True)
    domain, others = units[~general], units[general]
    pairs = min(len(domain), len(others))
    chances = softmax(domain @ others.T / temperature)
    return float(np.mean([-np.log(chances[i, i]) for i in range(pairs)]))


def numeric(f, x: np.ndarray) -> np.ndarray:
    """The gradient of f, by central differences in float64."""
    found = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = 1e-5
        found[place] = (f(x + step) - f(x - step)) / 2e-5
    return found


@pytest.mark.parametrize(
    ("general", "symmetric"),
    [([0, 1, 0, 1], False), ([0, 0, 1, 0], False), ([1, 0, 1, 1], False), ([0, 1, 0, 1], True), ([0, 0, 1, 0], True)],
)
def test_contrastive(graph_mode, general, symmetric):
    """Four rows of 2, 3, 1 and 2 label tokens in nine slots, of which the last is unused; a fifth is elsewhere."""
    from mindspore import ops

    general = np.array(general, bool)
    counts = np.array([2, 3, 1, 2])
    slots = np.split(np.arange(8), np.cumsum(counts)[:-1])
    hidden = drawn(9, 5).astype(np.float64)
    (given,) = keys({"type": "contrastive", "weight": 0.3, "temperature": 0.5, "symmetric": symmetric})
    all_rows = GivenRows(np.append(general, True), np.append(counts, 1), 8, lambda rows: [], lambda: None)
    term = given.row_term(all_rows)
    assert term.rows.units(np.arange(4)) == min(general.sum(), 4 - general.sum())
    pairs = term.rows.units(np.arange(4))
    arrays = [Tensor(a) for a in term.rows.arrays(np.arange(4), counts, 9, 8 / pairs)]
    head, targets = Tensor(drawn(7, 5)), Tensor(np.zeros(9, np.int32))
    value, gradient = ops.value_and_grad(term.cell, 0)(Tensor(hidden.astype(np.float32)), head, targets, *arrays)

    def wanted(x):
        sides = [contrast(x, slots, side, 0.5) for side in ([general, ~general] if symmetric else [general])]
        return 0.3 * 8 * np.mean(sides)

    np.testing.assert_allclose(float(value.asnumpy()), wanted(hidden), rtol=1e-4)
    np.testing.assert_allclose(gradient.asnumpy(), numeric(wanted, hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains_head", [False, True])
def test_kl_anchor(graph_mode, trains_head, monkeypatch):
    """Rows 0 and 2 of three are held; more slots than are computed at once."""
    from mindspore import ops

    monkeypatch.setattr("lora_ms.objectives.row_cells.ROWS", 4)
    general, counts = np.array([True, False, True]), np.array([4, 3, 2])
    states = [drawn(4, 5, seed=1), drawn(2, 5, seed=2)]
    now, first = drawn(7, 5, seed=3), drawn(7, 5, seed=4 if trains_head else 3)
    given = GivenRows(general, counts, 8, lambda rows: states, lambda: first if trains_head else None)
    term = keys({"type": "kl_anchor", "weight": 0.7})[0].row_term(given)
    assert term.rows.units(np.array([1])) == 0 and term.rows.units(np.arange(3)) == 6
    arrays = [Tensor(a) for a in term.rows.arrays(np.arange(3), counts, 10, 9 / 6)]
    hidden = drawn(10, 5, seed=5)
    inputs = (Tensor(hidden), Tensor(now), Tensor(np.zeros(10, np.int32)), *arrays)
    value, (d_hidden, d_head) = ops.value_and_grad(term.cell, (0, 1))(*inputs)

    def wanted(x, head):
        total = 0.0
        for slots, state in ((slice(0, 4), states[0]), (slice(7, 9), states[1])):
            before = softmax(state.astype(np.float64) @ first.T.astype(np.float64))
            total += np.sum(before * (np.log(before) - np.log(softmax(x[slots] @ head.T))))
        return 0.7 * 9 * total / 6

    wide, head = hidden.astype(np.float64), now.astype(np.float64)
    np.testing.assert_allclose(float(value.asnumpy()), wanted(wide, head), rtol=1e-4)
    np.testing.assert_allclose(d_hidden.asnumpy(), numeric(lambda x: wanted(x, head), wide), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_head.asnumpy(), numeric(lambda x: wanted(wide, x), head), rtol=1e-4, atol=1e-4)


# --- against torch


def test_terms_of_parameters_against_torch(graph_mode, golden, tmp_path):
    z = golden("forgetting")
    name = "model.layers.0.mlp.up_proj.lora_a"
    start = Start([name], [Parameter(Tensor(z["start"].astype(np.float32)), name=name)])
    fisher_file.write(tmp_path / "f", {name: z["fisher"].astype(np.float32)}, {"rows": 1, "start": ""})
    (ewc,) = keys({"type": "ewc", "weight": 0.2, "fisher": str(tmp_path / "f")})
    check(ewc.parameter_term(start), z["w"].ravel(), float(z["ewc"]), z["d_ewc"].ravel())
    overlap = Overlap.of(start, [{name.removesuffix(".lora_a"): z["earlier"].astype(np.float32)}], 0.5)
    check(overlap, z["w"].ravel(), float(z["orthogonal"]), z["d_orthogonal"].ravel())


def test_a_hybrid_loss_against_torch(graph_mode, golden):
    """Through ``SummedLoss``, as a training step computes it: each term, and the gradient of the sum."""
    from mindspore import nn, ops

    from lora_ms.ops import PORTABLE
    from lora_ms.train.parts import ScaledLoss, SummedLoss

    z = golden("forgetting")
    wide = {key: z[key].astype(np.float32) for key in ("hidden", "head", "before", "first_head")}
    counts, general = z["counts"], z["general"]
    ends = np.cumsum(counts)
    states = [wide["before"][end - count : end] for end, count, g in zip(ends, counts, general, strict=True) if g]
    given = GivenRows(general, counts, 8, lambda rows: states, lambda: wide["first_head"])
    terms = [
        term.row_term(given)
        for term in keys({"type": "contrastive", "weight": 0.1}, {"type": "kl_anchor", "weight": 0.3})
    ]

    class Model(nn.Cell):
        """A norm that changes nothing, and a head."""

        def __init__(self):
            super().__init__()
            self.operators = PORTABLE
            self.norm = nn.Identity()
            self.weight = Parameter(Tensor(wide["head"]), name="head")

        def head_weight(self):
            return self.weight

        def outputs(self):
            return self

    rows = np.arange(4)
    extras = [a for t in terms for a in t.rows.arrays(rows, counts, 12, 11 / t.rows.units(rows))]
    model = Model()
    loss = SummedLoss(model, 9, terms=[term.cell for term in terms]).finish
    scale = Parameter(Tensor(1.0 / 11), name="scale", requires_grad=False)
    hidden = np.concatenate([wide["hidden"], np.ones((1, 5), np.float32)])  # the last slot is unused
    targets = np.concatenate([z["targets"], [-100]]).astype(np.int32)
    gradient = ops.value_and_grad(ScaledLoss(loss, scale), 0, ms.ParameterTuple([model.weight]), has_aux=True)
    (total, parts), (d_hidden, (d_head,)) = gradient(*map(Tensor, (hidden, targets, *extras)))
    names = ("cross_entropy", "contrastive", "kl_anchor")
    np.testing.assert_allclose(parts.asnumpy() / 11, [z[name] for name in names], rtol=1e-4)
    np.testing.assert_allclose(float(total.asnumpy()), sum(z[name] for name in names), rtol=1e-4)
    np.testing.assert_allclose(d_hidden.asnumpy()[:11], z["d_hidden"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_head.asnumpy(), z["d_head"], rtol=1e-4, atol=1e-5)
    assert not d_hidden.asnumpy()[11].any()


def test_twelve_steps_against_torch(graph_mode, golden, reference, native, tmp_path):
    """Five terms at once, of which each is compared at every step, and the weights at the end."""
    from lora_ms.adapters.inject import adapted_layers, inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.data.collate import collate
    from lora_ms.data.example import TokenRow
    from lora_ms.models.hub import load_directory
    from lora_ms.train.gradient import MicroStep
    from lora_ms.train.optimizer import FlatAdamW
    from lora_ms.train.parts import SummedLoss

    z = golden("trace_forgetting_qwen2")
    prefix = "base_model.model."
    model = load_directory(reference / "models/qwen2", operators=native)
    rows = [
        [TokenRow("", ids[:n], labels[:n]) for ids, labels, n in zip(*step, strict=True)]
        for step in zip(z["input_ids"], z["labels"], z["lengths"], strict=True)
    ]
    general = np.arange(len(rows) * 6) % 2 == 1
    counts = np.array([len(row.learnt) for step in rows for row in step])

    def states(asked):
        """Of the model before training, its adapter not yet there."""
        found = []
        for row in asked:
            one = rows[row // 6][row % 6]
            ids, slots = np.zeros((1, 16), np.int32), np.zeros(16, np.int32)
            ids[0, : len(one.input_ids)] = one.input_ids
            slots[: len(one.learnt)] = one.learnt - 1
            found.append(model.hidden_states(Tensor(ids), None, Tensor(slots)).asnumpy()[: len(one.learnt)])
        return found

    model.set_train(False)
    given = GivenRows(general, counts, 6, states, lambda: None)
    contrast, anchor = (
        term.row_term(given)
        for term in keys({"type": "contrastive", "weight": 0.1}, {"type": "kl_anchor", "weight": 0.3})
    )
    inject(model, LoraConfig(4, 8.0, 0.0, "all-linear"))
    for name, layer in adapted_layers(model).items():
        layer.lora_a.set_data(Tensor(z[f"initial/{prefix}{name}.lora_A.weight"]))
    params = {name: p for name, p in model.parameters_and_names() if p.requires_grad}
    named = {
        prefix + name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight"): name for name in params
    }
    start = Start(list(params), list(params.values()))
    fisher = {ours: z[f"fisher/{name}"] for name, ours in named.items()}
    fisher_file.write(tmp_path / "f", fisher, {"rows": 1, "start": ""})
    earlier = {ours.removesuffix(".lora_a"): z[f"earlier/{name}"] for name, ours in named.items() if "lora_A" in name}
    ewc, l2 = keys(
        {"type": "ewc", "weight": 0.2, "lambda": 2, "fisher": str(tmp_path / "f")},
        {"type": "l2_anchor", "weight": 0.05},
    )
    terms = [ewc.parameter_term(start), l2.parameter_term(start), Overlap.of(start, [earlier], 0.05)]
    model.set_train()
    optimizer = FlatAdamW(
        list(params.values()), weight_decay=0.1, max_grad_norm=1.0, objectives=terms, operators=native
    )
    micro_step = MicroStep(SummedLoss(model, 128, terms=[contrast.cell, anchor.cell]), optimizer)
    names = ("cross_entropy", "contrastive", "kl_anchor", "grad_norm", "ewc", "l2_anchor", "orthogonal")
    for number, step in enumerate(rows):
        batch = collate([[row] for row in step], 6, 16, 96, 0)
        taken = np.arange(6) + 6 * number
        label_tokens = int(counts[taken].sum())
        extras = [
            array
            for term in (contrast, anchor)
            for array in term.rows.arrays(taken, counts[taken], 96, label_tokens / term.rows.units(taken))
        ]
        parts = micro_step(*map(Tensor, (*batch[:4], *extras))).asnumpy() / label_tokens
        norm, _, *values = optimizer(Tensor(5e-3, ms.float32), Tensor(label_tokens, ms.float32))
        found = [*parts, *(float(value.asnumpy()) for value in (norm, *values))]
        wanted = [z[name][number] for name in names]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=f"step {number}: {names}")
    assert min(z[name].max() for name in names) > 0.01
    for name, ours in named.items():
        np.testing.assert_allclose(params[ours].asnumpy(), z[f"final/{name}"], rtol=0, atol=1e-4, err_msg=name)


def test_rows_that_cannot_be_compared():
    general = np.array([True, False, True])
    with pytest.raises(LoraMsError, match="compares a domain row with two general ones .* 3 or more, not 2"):
        keys({"type": "contrastive"})[0].row_term(GivenRows(general, np.ones(3, int), 2, lambda rows: [], lambda: None))
