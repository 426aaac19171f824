"""The [tokens, vocabulary] matrix never exists whole, neither in value nor in gradient."""

import re
import subprocess

import pytest

CHILD = """
import numpy as np, mindspore as ms
from mindspore import Tensor
from lora_ms.nn.loss import SummedCrossEntropy
from lora_ms.train.parts import CHUNK_NUMBERS

ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
rng = np.random.default_rng(0)
hidden = Tensor(rng.standard_normal((4096, 32), np.float32))
head = Tensor(rng.standard_normal((151936, 32), np.float32))
targets = Tensor(rng.integers(0, 151936, 4096).astype(np.int32))

class Loss(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.cross_entropy = SummedCrossEntropy(CHUNK_NUMBERS // 151936)

    def construct(self, hidden, head, targets):
        return self.cross_entropy(hidden, head, targets)[0]

loss, gradient = ms.value_and_grad(Loss(), 0)(hidden, head, targets)
assert np.isfinite(float(loss.asnumpy())) and gradient.asnumpy().shape == (4096, 32)
"""


@pytest.mark.slow
def test_peak_of_4096_tokens_and_151936_entries(python, python_env, tmp_path):
    (tmp_path / "peak.py").write_text(CHILD)  # a graph is read from its source
    env = {**python_env, "MS_DEV_RUNTIME_CONF": "memory_statistics:true"}
    child = subprocess.run([python, str(tmp_path / "peak.py")], env=env, capture_output=True, text=True, check=True)
    peak = max(int(found) for found in re.findall(r"peak used mem:(\d+)M", child.stdout + child.stderr))
    matrix = 4096 * 151_936 * 4 / 2**20  # MB
    assert 50 < peak <= 0.15 * matrix, f"{peak} MB of {matrix:.0f}"
