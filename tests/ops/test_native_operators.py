"""The CPU's own operators against formulas in float64, with vectors of every width: this machine's is among them.

The same tests run on aarch64, cross-compiled and emulated, with 4 (NEON's width), 8 and 16 lanes; see conftest.py.
"""

import ctypes
import math
import subprocess
from functools import cache

import mindspore as ms
import numpy as np
import pytest

from lora_ms.models.hub import NUMPY_DTYPES
from lora_ms.quant import int4, nf4
from lora_ms.runtime import native_build

RNG = np.random.default_rng(0)
# of times_transposed: few rows and many, fewer columns than a vector, an inner dimension of one panel and of several,
# more of B than is packed at a time
SHAPES = [(1, 100, 77), (3, 40, 600), (7, 33, 19), (130, 8, 64), (16, 130, 1025), (205, 300, 512), (60, 1050, 2100)]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture(
    scope="module",
    params=[(where, lanes) for where in ("here", "aarch64") for lanes in (4, 8, 16)],
    ids=lambda param: f"{param[1]} lanes" if param[0] == "here" else f"{param[1]} lanes on aarch64",
)
def call(request):
    """``call(name, inputs, shapes)``: the outputs of an operator; on three threads."""
    where, lanes = request.param
    if where == "aarch64":
        return request.getfixturevalue("aarch64")(lanes)
    return compiled((f"-DLANES={lanes}",))[1]


@cache
def compiled(flags: tuple[str, ...]) -> tuple:
    """The operators, compiled with more flags, and ``call``."""
    library, why = native_build.build(flags)
    assert library is not None, why
    operators = ctypes.CDLL(str(library))
    operators.set_threads(3)

    def run(name: str, inputs: list[np.ndarray], shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
        arrays = [*(np.ascontiguousarray(x) for x in inputs), *outputs]
        sizes = [(ctypes.c_int64 * x.ndim)(*x.shape) for x in arrays]
        n = len(arrays)
        arguments = [
            n,
            (ctypes.c_void_p * n)(*(x.ctypes.data for x in arrays)),
            (ctypes.c_int * n)(*(x.ndim for x in arrays)),
            (ctypes.c_void_p * n)(*(ctypes.addressof(size) for size in sizes)),
            (ctypes.c_char_p * n)(*(x.dtype.name.encode() for x in arrays)),
            None,
            None,
        ]
        assert getattr(operators, name)(*arguments) == 0
        return outputs

    return operators, run


def close(found: np.ndarray, wanted: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_products(call, m, n, k):
    a, b, c, d, start = normal(m, k), normal(n, k), normal(m, 5), normal(n, 5), normal(m, n)
    first, both = a.astype(float) @ b.T, a.astype(float) @ b.T + c.astype(float) @ d.T
    close(call("times_transposed", [a, b], [(m, n)])[0], first, 1e-4)
    close(call("times_transposed", [a, b, c, d, start], [(m, n)])[0], both + start, 1e-4)
    close(call("times_transposed", [a, b, start[0]], [(m, n)])[0], first + start[0], 1e-4)
    close(call("times", [a, b.T, c, d.T], [(m, n)])[0], both, 1e-4)
    close(call("transposed_times", [a.T, b.T], [(m, n)])[0], first, 1e-4)


@pytest.mark.parametrize("m", [5, 20, 300])
def test_a_product_without_columns(call, m):
    assert call("times", [normal(m, 7), normal(7, 0)], [(m, 0)])[0].shape == (m, 0)


WITHOUT_MEMORY = """
#include <cstdio>
#include <vector>
#include "threads.h"

int main() {
    lora_ms::Threads &threads = lora_ms::Threads::shared();
    threads.set_count(3);
    const auto caller = std::this_thread::get_id();
    for (bool on_helper : {false, true, false, true}) {
        std::atomic<bool> thrown{false};
        try {
            threads.run(100, [&](long) {
                if ((std::this_thread::get_id() != caller) == on_helper) {
                    thrown = true;
                    throw std::bad_alloc();
                }
                while (!thrown) std::this_thread::yield();
            });
            return 1;
        } catch (const std::bad_alloc &) {
        }
        std::vector<int> done(300);
        threads.run(300, [&](long i) { done[i]++; });
        for (int times : done) if (times != 1) return 2;
    }
    puts("caught");
}
"""


def test_too_little_memory_on_any_thread_reaches_the_caller(tmp_path):
    """MindSpore catches it there; on a helper it would end the process. What runs next is whole."""
    (tmp_path / "main.cpp").write_text(WITHOUT_MEMORY)
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{native_build.SOURCES}"]
    subprocess.run(["g++", *flags, "-o", str(tmp_path / "main"), str(tmp_path / "main.cpp")], check=True)
    ran = subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "caught\n"), ran.stderr


def test_a_product_is_the_same_however_its_rows_and_columns_are_shared_out(call):
    a, b, c, d = normal(100, 1024), normal(1100, 1024), normal(100, 16), normal(1100, 16)
    whole = call("times_transposed", [a, b, c, d], [(100, 1100)])[0]
    part = call("times_transposed", [a[:37], b[:90], c[:37], d[:90]], [(37, 90)])[0]
    np.testing.assert_array_equal(part, whole[:37, :90])
    a, b = normal(100, 300), normal(200, 300)
    whole = call("times_transposed", [a, b], [(100, 200)])[0]
    np.testing.assert_array_equal(call("times_transposed", [a[:37], b[:90]], [(37, 90)])[0], whole[:37, :90])


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_a_right_factor_in_float16_is_widened_exactly(call, m, n, k):
    a, b, c, d = normal(m, k), normal(n, k).astype(np.float16), normal(m, 5), normal(n, 5)
    b.flat[:6] = 65504, -6e-8, 6.1e-5, 6.09e-5, -0.0, 1  # the largest, the least, and about the least normal one
    for name, terms in (("times_transposed", [a, b, c, d]), ("times", [a, b.T, c, d.T])):
        wide = [x.astype(np.float32) for x in terms]
        np.testing.assert_array_equal(call(name, terms, [(m, n)])[0], call(name, wide, [(m, n)])[0])


def test_every_number_of_float16_is_widened_exactly(call):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for rows in (1, 5):  # as a few rows of A are multiplied, and as many are
        for start in range(0, 2**16, 2**12):
            some = every[start : start + 2**12]
            b = np.stack([some, np.ones_like(some)], 1)
            found = call("times_transposed", [np.array([[1, 0]] * rows, np.float32), b], [(rows, 2**12)])[0]
            np.testing.assert_array_equal(found, np.tile(some.astype(np.float32), (rows, 1)))


BFLOAT16 = NUMPY_DTYPES[ms.bfloat16]


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_a_right_factor_in_bfloat16_is_widened_exactly(call, m, n, k):
    a, b, c, d = normal(m, k), normal(n, k).astype(BFLOAT16), normal(m, 5), normal(n, 5)
    for name, terms in (("times_transposed", [a, b, c, d]), ("times", [a, b.T, c, d.T])):
        wide = [x.astype(np.float32) for x in terms]
        np.testing.assert_array_equal(call(name, terms, [(m, n)])[0], call(name, wide, [(m, n)])[0])


@pytest.mark.parametrize("flags", [(), ("-DLORA_MS_NO_AMX",)], ids=["tiles", "pairs"])
@pytest.mark.parametrize("m, n, k", [*SHAPES, (33, 4200, 70), (9, 40, 4200), (8, 16, 31)])
def test_products_of_rounded_factors(flags, m, n, k):
    """Both factors of the first product are rounded, where the processor has the instructions; what is added is not."""
    operators, run = compiled(flags)
    rounds = bool(operators.rounds_to_bfloat16()) and m >= 8
    a, b, c, d, start = normal(m, k), normal(n, k), normal(m, 5), normal(n, 5), normal(m, n)
    x, w = ((y.astype(BFLOAT16) if rounds else y).astype(float) for y in (a, b))
    wanted = x @ w.T + c.astype(float) @ d.T
    close(run("times_transposed_bfloat16", [a, b, c, d], [(m, n)])[0], wanted, 2e-4)
    close(run("times_transposed_bfloat16", [a, b, c, d, start], [(m, n)])[0], wanted + start, 2e-4)
    close(run("times_bfloat16", [a, b.T, c, d.T], [(m, n)])[0], wanted, 2e-4)
    half = b.astype(BFLOAT16)
    wanted = x @ half.astype(float).T
    close(run("times_transposed_bfloat16", [a, half], [(m, n)])[0], wanted, 2e-4)
    close(run("times_bfloat16", [a, half.T], [(m, n)])[0], wanted, 2e-4)


FOUR_BITS = [(1, 64, 128), (3, 70, 192), (40, 33, 64), (130, 100, 256), (5, 40, 96)]  # m, n, k: 96 crosses blocks


def four_bits(kind: str, n: int, k: int) -> tuple[list[np.ndarray], np.ndarray]:
    """A weight [n, k] as the operators take it, and its numbers."""
    if kind == "nf4":
        weight = nf4.quantise(normal(n, k))
        return [weight.packed.reshape(n, k // 2), weight.absmax], nf4.dequantise(weight)
    group = 32
    scales = RNG.uniform(0.01, 0.1, (n, k // group)).astype(np.float16)
    zeros = RNG.integers(0, 17, (n, k // group)).astype(np.uint8)
    codes = RNG.integers(0, 256, (n, k // 2)).astype(np.uint8)
    return [codes, scales, zeros], int4.dequantise(int4.Int4(codes, scales, zeros, None))


@pytest.mark.parametrize("rows", [4, 12, 40, 300])
@pytest.mark.parametrize("zero", ["some", "the last", "all"])
def test_rows_of_zeros_change_nothing(call, rows, zero):
    """They give zeros, or what is added, and the others what they give without them."""
    n, k = 90, 300
    a, b, c, d, start = normal(rows, k), normal(n, k), normal(rows, 8), normal(n, 8), normal(rows, n)
    left = np.sort(RNG.choice(rows, rows // 3, replace=False))  # blocks of rows among them, at the end and elsewhere
    left = {"some": left[(left < rows // 4) | (left > rows // 3)], "the last": np.arange(rows // 3), "all": left[:0]}[
        zero
    ]
    others = np.setdiff1d(np.arange(rows), left)
    a[others], c[others] = 0, 0
    for name, terms in (("times_transposed", [a, b, c, d]), ("times", [a, b.T, c, d.T])):
        for more in ([], [start], [start[0]]):
            found = call(name, [*terms, *more], [(rows, n)])[0]
            added = np.broadcast_to(more[0] if more else np.float32(0), (rows, n))
            np.testing.assert_array_equal(found[others], added[others])
            close(found, a.astype(float) @ b.T + c.astype(float) @ d.T + added, 1e-4)
    if 0 < len(left) <= 12:  # few rows, or few that are left of many
        whole = call("times_transposed", [a, b, c, d], [(rows, n)])[0]
        few = call("times_transposed", [a[left], b, c[left], d], [(len(left), n)])[0]
        close(whole[left], few, 1e-4)


@pytest.mark.parametrize("kind", ["float32", "float16", "nf4", "int4"])
def test_a_few_rows_are_the_same_however_many_they_are(call, kind):
    rows, n, k = 12, 90, 576
    dense = kind.startswith("float")
    weight = [normal(n, k).astype(kind)] if dense else four_bits(kind, n, k)[0]
    name = "times_transposed" if dense else f"{kind}_times_transposed"
    a, low, b = normal(rows, k), normal(rows, 8), normal(n, 8)
    whole = call(name, [a, *weight, low, b], [(rows, n)])[0]
    for count in range(1, rows):
        part = call(name, [a[:count], *weight, low[:count], b], [(count, n)])[0]
        np.testing.assert_array_equal(part, whole[:count])


@pytest.mark.parametrize("kind", ["nf4", "int4"])
@pytest.mark.parametrize("m, n, k", FOUR_BITS)
def test_a_weight_of_four_bits_is_decoded_exactly(call, kind, m, n, k):
    """The products are those of the decoded weight, to the bit."""
    weight, numbers = four_bits(kind, n, k)
    x, d_y, c, d, e = normal(m, k), normal(m, n), normal(m, 5), normal(n, 5), normal(5, k)
    same = np.testing.assert_array_equal
    forward, back = f"{kind}_times_transposed", f"{kind}_times"
    same(call(forward, [x, *weight], [(m, n)])[0], call("times_transposed", [x, numbers], [(m, n)])[0])
    with_low = call("times_transposed", [x, numbers, c, d], [(m, n)])[0]
    same(call(forward, [x, *weight, c, d], [(m, n)])[0], with_low)
    same(call(back, [d_y, *weight, c, e], [(m, k)])[0], call("times", [d_y, numbers, c, e], [(m, k)])[0])
    rate = np.array([0.3, 1 / 0.7], np.float32)
    dropout = [RNG.random((m, 1)).astype(np.float32), RNG.random((1, k)).astype(np.float32), rate]
    name = "dropped_input_gradient"
    found = call(f"{kind}_{name}", [d_y, *weight, c, e, *dropout], [(m, k)])[0]
    same(found, call(name, [d_y, numbers, c, e, *dropout], [(m, k)])[0])


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_a_weight_of_four_bits_is_rounded_as_another(kind):
    _, run = compiled(())
    weight, numbers = four_bits(kind, 100, 256)
    x, d_y = normal(40, 256), normal(40, 100)
    for name, left, shape in (("times_transposed", x, (40, 100)), ("times", d_y, (40, 256))):
        found = run(f"{kind}_{name}_bfloat16", [left, *weight], [shape])[0]
        np.testing.assert_array_equal(found, run(f"{name}_bfloat16", [left, numbers], [shape])[0])


def test_rows_of_an_embedding(call):
    ids = np.array([3, 0, 3, 6], np.int32)
    for dtype in (np.float32, np.float16, BFLOAT16):
        weight = normal(7, 37).astype(dtype)
        np.testing.assert_array_equal(call("embedding", [ids, weight], [(4, 37)])[0], weight[ids].astype(np.float32))


@pytest.mark.parametrize("n", (5, 67, 512))
def test_norm(call, n):
    x, weight, eps, d_y = normal(37, n), normal(n), np.array([1e-5], np.float32), normal(37, n)
    scale = 1 / np.sqrt((x.astype(float) ** 2).mean(1, keepdims=True) + 1e-5)
    close(call("rms_norm", [x, weight, eps], [x.shape])[0], x * scale * weight)
    g = d_y.astype(float) * weight
    wanted = scale * g - x * scale**3 * (g * x).mean(1, keepdims=True)
    close(call("rms_norm_gradient", [x, weight, eps, d_y], [x.shape])[0], wanted)
    close(call("rms_norm_weight_gradient", [x, eps, d_y], [(n,)])[0], (scale * x * d_y).sum(0))


def test_gated(call):
    gate, up, d_y = 8 * normal(37, 67), normal(37, 67), normal(37, 67)
    gate[0, :4] = -200, -88, 88, 200
    sigmoid = 1 / (1 + np.exp(-gate.astype(float)))
    close(call("gated_silu", [gate, up], [gate.shape])[0], gate * sigmoid * up)
    d_gate, d_up = call("gated_silu_gradient", [gate, up, d_y], [gate.shape, gate.shape])
    close(d_gate, d_y * up * (sigmoid + gate * sigmoid * (1 - sigmoid)))
    close(d_up, d_y * gate * sigmoid)


@pytest.mark.parametrize("v", (3, 1003))
def test_cross_entropy(call, v):
    logits = 9 * normal(9, v)
    targets = RNG.integers(0, v, 9).astype(np.int32)
    targets[2], targets[3] = -100, logits[3].argmax()
    logits[4] = 0.5  # all the same: the first of them counts as the largest
    targets[4], targets[5], logits[5] = 0, 1, 0.5
    x, valid, index = logits.astype(float), targets >= 0, np.maximum(targets, 0)
    log_sum = np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1)
    grad = (np.exp(x - log_sum[:, None]) - np.eye(v)[index]) * valid[:, None]
    losses, right, found = call("cross_entropy", [logits, targets], [(9,), (9,), logits.shape])
    close(losses, (log_sum - x[np.arange(9), index]) * valid)
    np.testing.assert_array_equal(right, (logits.argmax(1) == targets) & valid)
    close(found, grad)


@pytest.mark.parametrize("tokens, width, out, rank", [(37, 50, 70, 4), (200, 130, 96, 16), (1, 33, 20, 3)])
def test_an_adapted_product(call, tokens, width, out, rank):
    x, w, a, b = normal(tokens, width), normal(out, width), normal(rank, width), normal(out, rank)
    grad, scaling = normal(tokens, out), np.array(1.5, np.float32)
    (low,) = call("low_rank_input", [x, a, scaling], [(tokens, rank)])
    (y,) = call("times_transposed", [x, w, low, b], [(tokens, out)])
    wanted = 1.5 * x.astype(float) @ a.T
    close(low, wanted, 1e-4)
    close(y, x.astype(float) @ w.T + wanted @ b.T, 2e-4)
    found = call("adapted_product_gradient", [grad, x, low, b, scaling], [(tokens, rank), a.shape, b.shape])
    d_low = 1.5 * grad.astype(float) @ b
    for one, other in zip(found, (d_low, d_low.T @ x, grad.T @ wanted), strict=True):
        close(one, other, 5e-4)


@pytest.mark.parametrize("real", [60, 20, 1, 0])
def test_the_gradient_of_an_adapted_product_with_padding(call, real):
    """Rows without a gradient add nothing, and may be all."""
    x, low, b, grad, scaling = normal(60, 50), normal(60, 4), normal(70, 4), normal(60, 70), np.array(1.5, np.float32)
    grad[real:] = 0
    d_low, d_a, d_b = call("adapted_product_gradient", [grad, x, low, b, scaling], [(60, 4), (4, 50), (70, 4)])
    wanted = 1.5 * grad.astype(float) @ b
    close(d_low, wanted, 1e-4)
    close(d_a, wanted.T @ x, 1e-4)
    close(d_b, grad.T.astype(float) @ low, 1e-4)


def test_norms_and_gates_of_padding(call):
    x, weight, eps, grad = normal(30, 40), normal(40), np.array([1e-6], np.float32), normal(30, 40)
    whole = {
        "rms_norm": call("rms_norm", [x, weight, eps], [x.shape]),
        "rms_norm_gradient": call("rms_norm_gradient", [x, weight, eps, grad], [x.shape]),
        "gated_silu": call("gated_silu", [x, grad], [x.shape]),
        "gated_silu_gradient": call("gated_silu_gradient", [x, grad, x], [x.shape] * 2),
    }
    x[20:], grad[20:] = 0, 0
    padded = {
        "rms_norm": call("rms_norm", [x, weight, eps], [x.shape]),
        "rms_norm_gradient": call("rms_norm_gradient", [x, weight, eps, grad], [x.shape]),
        "gated_silu": call("gated_silu", [x, grad], [x.shape]),
        "gated_silu_gradient": call("gated_silu_gradient", [x, grad, x], [x.shape] * 2),
    }
    for name, outputs in padded.items():
        for found, other in zip(outputs, whole[name], strict=True):
            np.testing.assert_array_equal(found[:20], other[:20])
            assert not found[20:].any()


@pytest.mark.parametrize("tokens, width, out, rank", [(37, 50, 70, 4), (200, 130, 96, 16), (1, 33, 20, 3)])
def test_an_adapted_product_with_dropout(call, tokens, width, out, rank):
    x, w, a, b = normal(tokens, width), normal(out, width), normal(rank, width), normal(out, rank)
    grad, scaling, rate = normal(tokens, out), np.array(1.5, np.float32), np.array([0.3, 1 / 0.7], np.float32)
    rows, columns = RNG.random((tokens, 1), np.float32), RNG.random((1, width), np.float32)
    turns = (8 + 32 * rows) * (8 + 32 * columns)  # in float32, as the draws are
    kept = (turns - np.floor(turns) >= rate[0]) / 0.7
    more = [rows, columns, rate]
    (low,) = call("low_rank_input", [x, a, scaling, *more], [(tokens, rank)])
    (y,) = call("times_transposed", [x, w, low, b], [(tokens, out)])
    wanted = 1.5 * (x * kept) @ a.T
    close(low, wanted, 1e-4)
    close(y, x.astype(float) @ w.T + wanted @ b.T, 3e-4)
    found = call("adapted_product_gradient", [grad, x, low, b, scaling, *more], [(tokens, rank), a.shape, b.shape])
    d_low = 1.5 * grad.astype(float) @ b
    for one, other in zip(found, (d_low, d_low.T @ (x * kept), grad.T @ wanted), strict=True):
        close(one, other, 5e-4)
    d_x = call("dropped_input_gradient", [grad, w, found[0], a, *more], [x.shape])[0]
    close(d_x, grad.astype(float) @ w + (d_low @ a) * kept, 5e-4)


def test_a_logit_that_is_not_finite_makes_the_loss_so(call):
    logits = normal(3, 40)
    logits[0, 5], logits[1, 39] = np.nan, np.inf
    losses = call("cross_entropy", [logits, np.array([1, 1, 1], np.int32)], [(3,), (3,), (3, 40)])[0]
    assert np.isfinite(losses).tolist() == [False, False, True]


# lines, tokens, heads, key/value heads, head dimension, and the rows of a line
@pytest.mark.parametrize(
    "b, s, heads, kv_heads, d, rows",
    [(2, 75, 4, 2, 24, [75]), (1, 200, 2, 2, 64, [66, 40, 94]), (1, 33, 6, 2, 10, [1, 32]), (2, 130, 4, 1, 32, [130])],
)
@pytest.mark.parametrize("padding", [0, 23], ids=["no padding", "padding"])
def test_attention(call, b, s, heads, kv_heads, d, rows, padding):
    """Padding at the end of the last line sees no key, and one token within it neither."""
    q, k, v = normal(b * s, heads * d), normal(b * s, kv_heads * d), normal(b * s, kv_heads * d)
    d_out = normal(b * s, heads * d)
    positions = np.tile(np.concatenate([np.arange(n) for n in rows]), (b, 1))
    first = (np.arange(s) - positions).astype(np.int32)
    blind = np.zeros((b, s), bool)
    if padding:
        blind[-1, [5, *range(s - padding, s)]] = True
        first[blind] = np.nonzero(blind)[1] + 1
    angles = positions.reshape(-1, 1) * 1e4 ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(np.tile(angles, 2)), np.sin(np.tile(angles, 2)) * np.repeat([-1, 1], d // 2)
    inputs = [q, k, v, *(np.repeat(x, kv_heads, 0).astype(np.float32) for x in (cos, sin)), first]
    out, log_sum = call("attention", inputs, [q.shape, (b * s, heads)])
    found = call("attention_gradient", [*inputs, out, log_sum, d_out], [q.shape, k.shape, v.shape])

    def rotated(x, n):
        x = x.astype(float).reshape(b * s, n, d)
        return (x * cos[:, None] + np.roll(x, d // 2, -1) * sin[:, None]).reshape(b, s, n, d)

    def rotated_back(x):
        x = x.reshape(b * s, -1, d)
        return (x * cos[:, None] + np.roll(x * sin[:, None], d // 2, -1)).reshape(b * s, -1)

    def of_kv(x):
        return x.reshape(b, s, kv_heads, heads // kv_heads, d).sum(3)

    group = heads // kv_heads
    query, key = rotated(q, heads) / np.sqrt(d), np.repeat(rotated(k, kv_heads), group, 2)
    value = np.repeat(v.astype(float).reshape(b, s, kv_heads, d), group, 2)
    places = np.arange(s)
    seen = (places <= places[:, None]) & (places >= first[:, :, None]) | blind[:, :, None]
    scores = np.where(seen[:, None], np.einsum("bihd,bjhd->bhij", query, key), -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    wanted_sum = (np.log(probs.sum(-1)) + scores.max(-1)) * ~blind[:, None]
    probs *= ~blind[:, None, :, None] / probs.sum(-1, keepdims=True)
    grad = d_out.astype(float).reshape(b, s, heads, d)
    d_probs = np.einsum("bihd,bjhd->bhij", grad, value)
    d_scores = probs * (d_probs - (d_probs * probs).sum(-1, keepdims=True))
    close(out, np.einsum("bhij,bjhd->bihd", probs, value).reshape(b * s, -1))
    close(log_sum, wanted_sum.transpose(0, 2, 1).reshape(b * s, heads))
    close(found[0], rotated_back(np.einsum("bhij,bjhd->bihd", d_scores, key)) / np.sqrt(d))
    close(found[1], rotated_back(of_kv(np.einsum("bhij,bihd->bjhd", d_scores, query))))
    close(found[2], of_kv(np.einsum("bhij,bihd->bjhd", probs, grad)).reshape(b * s, -1))


@pytest.mark.parametrize("new", [1, 7, 61])
@pytest.mark.parametrize("b, length, heads, kv_heads, d, slot", [(2, 140, 4, 2, 24, 68), (3, 70, 2, 2, 64, 5)])
def test_attention_to_a_cache(call, b, length, heads, kv_heads, d, slot, new):
    """Line i has filled its cache up to slot + i, and gets new tokens, which look at all; a window hides the first."""
    n, kv = slot + b + new, b * kv_heads  # slots in use, and lines of the cache
    slots = slot + np.arange(b)[:, None] + np.arange(new)[None]  # [b, new]
    first = np.minimum(np.arange(b)[:, None] + np.arange(new)[None], slots).astype(np.int32)
    blind = np.zeros((b, new), bool)
    blind[-1, new // 2 :] = True  # padding; of one token it is all
    first[blind] = slots[blind] + 1
    q, k, v = normal(b * new, heads * d), normal(b * n, kv_heads * d), normal(b * n, kv_heads * d)

    def tables(positions, repeats):
        angles = positions.reshape(-1, 1) * 1e4 ** (-np.arange(0, d, 2) / d)
        cos, sin = np.cos(np.tile(angles, 2)), np.sin(np.tile(angles, 2)) * np.repeat([-1, 1], d // 2)
        return cos, sin, [np.repeat(x, repeats, 0).astype(np.float32) for x in (cos, sin)]

    def rotated(x, heads, cos, sin):
        x = x.astype(float).reshape(-1, heads, d)
        return x * cos[:, None] + np.roll(x, d // 2, -1) * sin[:, None]

    def by_heads(x):
        return x.reshape(b, n, kv_heads, d).transpose(0, 2, 1, 3).reshape(kv, n, d)

    def of_new(x):
        return x.reshape(b, n, -1)[np.arange(b)[:, None], slots].reshape(b * new, -1)

    cos, sin, _ = tables(np.tile(np.arange(n), b), kv_heads)
    key, value = by_heads(rotated(k, kv_heads, cos, sin)), by_heads(v.astype(float))
    keys, values, wanted_keys, wanted_values = (np.full((kv, length, d), np.nan, np.float32) for _ in range(4))
    for line in range(kv):
        begin = slots[line // kv_heads, 0]
        end = begin + np.count_nonzero(~blind[line // kv_heads])
        keys[line, :begin], values[line, :begin] = key[line, :begin], value[line, :begin]
        wanted_keys[line, :end], wanted_values[line, :end] = key[line, :end], value[line, :end]
    begins = (np.arange(kv) * length).astype(np.int32)
    places = (begins.reshape(b, kv_heads, 1) + slots[:, None]).astype(np.int32).ravel()
    cos, sin, spread = tables(slots, kv_heads)
    cache = [x.reshape(-1, d) for x in (keys, values)]
    (out,) = call("cached_attention", [q, of_new(k), of_new(v), *cache, *spread, first, places, begins], [q.shape])
    close(keys, wanted_keys)  # they are written
    close(values, wanted_values)
    query = rotated(q, heads, cos, sin).reshape(b, new, kv_heads, -1, d) / np.sqrt(d)
    scores = np.einsum("bikgd,bkjd->bikgj", query, key.reshape(b, kv_heads, n, d))
    seen = (np.arange(n) >= first[..., None]) & (np.arange(n) <= slots[..., None])  # [b, new, n]
    probs = np.exp(np.where(seen[:, :, None, None], scores, -np.inf))
    probs /= np.maximum(probs.sum(-1, keepdims=True), 1e-30)  # 0 of padding
    wanted = np.einsum("bikgj,bkjd->bikgd", probs, value.reshape(b, kv_heads, n, d))
    close(out, wanted.reshape(b * new, -1))


@pytest.mark.parametrize("taken", [1, 0])
@pytest.mark.parametrize("apart", [True, False], ids=["rates of their own", "one rate"])
def test_adamw(call, apart, taken):
    n, count, (beta1, beta2, eps, scale) = 9001, 3, (0.9, 0.99, 1e-6, 0.5)
    old, grad, avg, square = normal(n), normal(n), normal(n), normal(n) ** 2
    rate, decay = (np.abs(normal(n)) if apart else np.array(x, np.float32) for x in (0.1, 0.3))
    rate = rate * np.float32(taken)
    grad[5:7] = np.inf, np.nan
    correct = 1 / (1 - beta1**count), 1 / math.sqrt(1 - beta2**count)
    step = np.array([scale, taken, 1 - beta1, 1 - beta2, *correct, eps], np.float32)
    x, g, m, v = (np.where(np.isfinite(y), y, 0).astype(float) for y in (old, grad, avg, square))
    (new,) = call("adamw", [old, grad, avg, square, rate, decay, step], [(n,)])  # avg and square are written
    if taken:
        m, v = beta1 * m + (1 - beta1) * scale * g, beta2 * v + (1 - beta2) * (scale * g) ** 2
        x = x - rate * (decay * x + m * correct[0] / (np.sqrt(v) * correct[1] + eps))
    for one, wanted in zip((new, avg, square), (x, m, v), strict=True):
        close(one, wanted)


@pytest.mark.parametrize(
    "lines, tokens, width, out, rank", [(3, 1, 37, 70, 4), (2, 5, 64, 33, 16), (1, 90, 100, 130, 3)]
)
def test_updates_of_rows(call, lines, tokens, width, out, rank):
    y, x = normal(lines * tokens, out), normal(lines * tokens, width)
    a, b, choice = normal(4, rank, width), normal(4, rank, out), RNG.integers(0, 4, lines).astype(np.int32)
    (found,) = call("row_updates", [y, x, a, b, choice], [y.shape])
    of_tokens = np.repeat(choice, tokens)
    low = np.einsum("ti,tri->tr", x.astype(float), a[of_tokens])
    close(found, y + np.einsum("tr,tro->to", low, b[of_tokens]), 3e-4)
