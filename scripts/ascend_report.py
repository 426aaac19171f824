"""Operators one by one, the tiny models against their references, and a few times: the body of ascend_report.sh.

Each try is a process of its own, so that one which ends the process hides no other. A line is
``ok|differs|fails  NAME  what was seen``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"
MODELS = ("llama2", "llama3", "qwen2", "qwen3")
QUICK = ("product", "attention", "model qwen2", "speed product")
DIFFERS = 3  # status of a try; a traceback ends with 1
LIMIT = 600  # seconds for a try; the first compilation on a card takes long


def close(found, wanted, tolerance: float) -> str:
    """The largest difference, relative to the largest number; raises ValueError where it is above ``tolerance``."""
    import numpy as np

    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape or not np.isfinite(found).all():
        raise ValueError(f"shape {found.shape} in place of {wanted.shape}, or numbers that are not finite")
    difference = np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    if difference > tolerance:
        raise ValueError(f"differs by {difference:.1e} of the largest number, more than {tolerance:g}")
    return f"differs by {difference:.1e}"


def operator_tries(device: str) -> dict[str, Callable[[], str]]:
    """By name: computes an operator in float32 and in float16, and compares it with NumPy in float64."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn, ops

    from lora_ms.quant import nf4
    from lora_ms.runtime.device import setup

    operators = setup(device)[0].operators
    rng = np.random.default_rng(0)
    types = ((ms.float32, 2e-3 if device == "Ascend" else 1e-5), (ms.float16, 1e-2))

    def normal(*shape: int):
        return rng.standard_normal(shape).astype(np.float32)

    def each(make, inputs, wanted, kinds=types, keep=()):
        """The cell of ``make()`` on inputs of each type; those at ``keep`` stay as they are."""
        said = []
        for kind, tolerance in kinds:
            given = [Tensor(x) if k in keep else Tensor(x).astype(kind) for k, x in enumerate(inputs)]
            said.append(f"{str(kind).lower()} {close(make()(*given).astype(ms.float32).asnumpy(), wanted, tolerance)}")
        return ", ".join(said)

    x, weight, a, b = normal(32, 64), normal(48, 64), normal(8, 64), normal(48, 8)
    whole = weight + 1.5 * b @ a

    def adapted():
        class Adapted(nn.Cell):
            def __init__(self):
                super().__init__()
                self.product = operators.adapted_product(0.0)

            def construct(self, x, weight, a, b, scaling):
                return self.product(x, weight, a, b, scaling, None, None)

        return Adapted()

    def gradient(cell, count):
        class Gradient(nn.Cell):
            def __init__(self):
                super().__init__()
                self.cell = cell
                self.grad = ops.grad(self.total, tuple(range(count)))

            def total(self, *inputs):
                return self.cell(*inputs).sum()

            def construct(self, *inputs):
                return self.grad(*inputs)[0]

        return Gradient()

    def norm(x):
        return x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-5)

    def silu(x):
        return x / (1 + np.exp(-x.astype(float)))

    def attention(flash: bool):
        said = []
        batch, seq, heads, kv_heads, d = 2, 16, 4, 2, 64
        q, k, v = normal(batch * seq, heads * d), normal(batch * seq, kv_heads * d), normal(batch * seq, kv_heads * d)
        rows = [t.reshape(batch, seq, -1, d).transpose(0, 2, 1, 3).astype(float) for t in (q, k, v)]
        keys, values = (np.repeat(t, heads // kv_heads, 1) for t in rows[1:])
        scores = rows[0] @ keys.transpose(0, 1, 3, 2) / np.sqrt(d) + np.where(np.tri(seq), 0, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        wanted = (probs / probs.sum(-1, keepdims=True) @ values).transpose(0, 2, 1, 3).reshape(batch * seq, -1)
        for kind, tolerance in types[1:] if flash else types:
            if device == "CPU" and kind == ms.float16:
                continue
            # tables that rotate by nothing; the query's carry 1 / sqrt(d)
            tables = ((heads, d**-0.5), (heads, 0), (kv_heads, 1), (kv_heads, 0))
            rope = tuple(Tensor(np.full((batch * seq * n, d), number, np.float32)).astype(kind) for n, number in tables)
            sizes = {"num_heads": heads, "num_kv_heads": kv_heads}
            visible = operators.visibility(**sizes, dtype=kind, flash=flash)(Tensor(np.zeros((batch, seq), np.int32)))
            cell = operators.attention(**sizes, head_dim=d, dtype=kind, flash=flash)
            out = cell(*(Tensor(t).astype(kind) for t in (q, k, v)), rope, visible).astype(ms.float32).asnumpy()
            said.append(f"{str(kind).lower()} {close(out, wanted, tolerance)}")
        return ", ".join(said) or "only on a card"

    def cross_entropy():
        hidden, head = normal(32, 64), normal(100, 64)
        targets = rng.integers(0, 100, 32).astype(np.int32)
        logits = hidden.astype(float) @ head.T
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        loss = operators.cross_entropy()(Tensor(hidden), Tensor(head), Tensor(targets))[0].asnumpy()
        return close(loss, (log_sum - logits[np.arange(32), targets]).sum(), types[0][1])

    def four_bits():
        stored = nf4.quantise(normal(48, 64), False)
        from lora_ms.nn.nf4 import NF4Projection

        layer = NF4Projection(stored, None, operators)
        return close(layer(Tensor(x)).asnumpy(), x.astype(float) @ layer.numbers().T, types[0][1])

    rows = np.arange(32, dtype=np.int32) % 48
    one = np.array(1.5, np.float32)
    return {
        "product": lambda: each(operators.product, [x, weight], x @ weight.T),
        "product, gradient": lambda: each(
            lambda: gradient(operators.product(), 2), [x, weight], np.tile(weight.sum(0), (32, 1))
        ),
        "product_back": lambda: each(
            operators.product_back, [normal(1, 1) * 0 + x @ weight.T, weight], x @ weight.T @ weight
        ),
        "adapted_product": lambda: each(adapted, [x, weight, a, b, one], x @ whole.T),
        "adapted_product, gradient": lambda: each(
            lambda: gradient(adapted(), 4), [x, weight, a, b, one], np.tile(whole.sum(0), (32, 1))
        ),
        "embedding": lambda: each(operators.embedding, [rows, weight], weight[rows], keep=(0,)),
        "rms_norm": lambda: each(lambda: operators.rms_norm(1e-5), [x, weight[0]], norm(x) * weight[0]),
        "gated_silu": lambda: each(operators.gated_silu, [x, x[::-1].copy()], silu(x) * x[::-1]),
        "attention": lambda: attention(False),
        "attention, fused": lambda: attention(True),
        "cross_entropy": cross_entropy,
        "nf4_product": four_bits,
        "low_rank_update": lambda: each(operators.low_rank_update, [x, a, b, one], 1.5 * x @ a.T @ b.T),
        "column_scale": lambda: each(operators.column_scale, [x, weight[0]], x * weight[0]),
    }


def model_try(name: str, device: str) -> str:
    """Logits in float32 of a tiny model against what transformers computed; it generates, and takes an adapter."""
    import numpy as np
    from mindspore import Tensor

    from lora_ms import AutoModelForCausalLM, LoraConfig, get_peft_model
    from lora_ms.runtime.device import setup

    setup(device)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "models" / name)
    with np.load(REFERENCE / f"logits_{name}.npz") as golden:
        said = "logits " + close(
            model(Tensor(golden["input_ids"])).asnumpy(), golden["logits"], 2e-2 if device == "Ascend" else 1e-4
        )
        tokens = model.generate(golden["input_ids"], max_new_tokens=8)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    return f"{said}; {tokens.shape[1]} tokens generated; {len(peft.peft_config)} adapter put on"


def training_try(device: str) -> str:
    """Twenty steps by the command line."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "lora_ms.cli", "finetune", "--config", "configs/tiny/lora_tiny.yaml"]
        argv += ["--device_target", device, "--fill", "NAME=Mira", "--fill", "AUTHOR=Lin", "--max_steps", "20"]
        argv += ["--model.model_config.compute_dtype", "float16" if device == "Ascend" else "float32"]
        done = subprocess.run([*argv, "--output_dir", folder], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"status {done.returncode}: {done.stderr.strip()[-800:]}")
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    seconds = sorted(record["step_time_s"] for record in steps[2:])[len(steps[2:]) // 2]
    if not steps[-1]["loss"] < 0.8 * steps[0]["loss"]:
        raise ValueError(f"the loss goes from {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}")
    return f"loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}, {seconds * 1000:.1f} ms a step (median)"


def speed_try(device: str) -> str:
    """Products of 2,048 in float16 (on a CPU: float32), 20 in one graph."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn, ops

    from lora_ms.runtime.device import setup

    setup(device)
    kind, n, times = (ms.float32 if device == "CPU" else ms.float16), 2048, 20

    class Products(nn.Cell):
        def __init__(self):
            super().__init__()
            self.product = ops.MatMul()

        def construct(self, x, weight):
            for _ in range(times):
                x = self.product(x, weight)
            return x

    cell, x = Products(), Tensor(np.full((n, n), 1 / n, np.float32)).astype(kind)
    cell(x, x).asnumpy()
    begun = time.perf_counter()
    cell(x, x).asnumpy()
    rate = times * 2 * n**3 / (time.perf_counter() - begun) / 1e12
    return f"{rate:.2f} TFLOP/s in {str(kind).lower()}"


OPERATORS = (
    *("product", "product, gradient", "product_back", "adapted_product", "adapted_product, gradient", "embedding"),
    *("rms_norm", "gated_silu", "attention", "attention, fused", "cross_entropy", "nf4_product", "low_rank_update"),
    "column_scale",
)
TRIES = (*OPERATORS, *(f"model {name}" for name in MODELS), "training", "speed product")


def try_one(name: str, device: str) -> str:
    if name == "training":
        return training_try(device)
    if name == "speed product":
        return speed_try(device)
    kind, _, model = name.partition(" ")
    return model_try(model, device) if kind == "model" else operator_tries(device)[name]()


def report(names: tuple[str, ...], device: str) -> int:
    """A line of each try; returns how many were not ok."""
    bad = 0
    for name in names:
        begun = time.monotonic()
        argv = [sys.executable, __file__, "--device", device, "--one", name]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        try:
            done = subprocess.run(argv, capture_output=True, text=True, errors="replace", env=env, timeout=LIMIT)
            status = {0: "ok", DIFFERS: "differs"}.get(done.returncode, "fails")
            said = (done.stdout.strip().splitlines() or [""])[-1]
            if status == "fails":
                lines = done.stderr.strip().splitlines()[-8:]
                said = f"status {done.returncode}\n" + "\n".join(f"    {line[:300]}" for line in lines)
        except subprocess.TimeoutExpired:
            status, said = "fails", f"did not end in {LIMIT} seconds"
        bad += status != "ok"
        print(f"{status:8} {name}: {said}  [{time.monotonic() - begun:.0f} s]", flush=True)
    print(f"{len(names) - bad} of {len(names)} are ok")
    return bad


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", choices=("Ascend", "CPU"), default="Ascend")
    arguments.add_argument("--quick", action="store_true", help="a few of the tries")
    arguments.add_argument("--one", choices=TRIES, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one is None:
        return 1 if report(QUICK if given.quick else TRIES, given.device) else 0
    if given.device == "Ascend":
        from lora_ms.runtime.choice import ascend_is_present

        if not ascend_is_present():
            print("there is no Ascend card here")
            return DIFFERS
    try:
        print(try_one(given.one, given.device))
    except ValueError as difference:
        print(difference)
        return DIFFERS
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
