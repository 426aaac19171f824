"""Five steps of bitsandbytes' AdamW8bit on one matrix: adamw8bit.npz (torch, bitsandbytes).

Its function for the CPU rounds by a table of 65,536 places, which small numbers fall through; here each number gets the
nearest code, as on a card.

Gradients cover four decades within a block, so that most codes are met; one block has none.
"""

from pathlib import Path

import bitsandbytes
import numpy as np
import torch

STEPS, SIZE = 5, 4096  # bitsandbytes keeps float32 below 4,096 numbers
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def nearest(values: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = values.reshape(-1, blocksize)
    largest = blocks.abs().amax(1)
    shares = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
    codes = torch.searchsorted((code[1:] + code[:-1]) / 2, shares)
    return codes.to(torch.uint8).reshape(values.shape), largest


library = torch.library.Library("bitsandbytes", "IMPL")
library.impl("quantize_blockwise", nearest, "CPU", allow_override=True)
rng = np.random.default_rng(0)
start = rng.normal(0, 0.1, (64, 64)).astype(np.float32)
gradients = (rng.normal(0, 1, (STEPS, SIZE)) * 10.0 ** rng.uniform(-4, 0, SIZE)).astype(np.float32)
gradients[:, 512:768] = 0
parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
optimizer = bitsandbytes.optim.AdamW8bit([parameter], **SETTINGS)
found = []
for gradient in gradients:
    parameter.grad = torch.from_numpy(gradient.reshape(64, 64))
    optimizer.step()
    found.append(parameter.detach().numpy().copy())
state = optimizer.state[parameter]
np.savez_compressed(
    Path(__file__).with_name("adamw8bit.npz"),
    start=start,
    gradients=gradients,
    parameters=np.stack(found),
    maps=np.stack([state["qmap1"].numpy(), state["qmap2"].numpy()]),
    codes=np.stack([state["state1"].numpy().ravel(), state["state2"].numpy().ravel()]),
    factors=np.stack([state["absmax1"].numpy(), state["absmax2"].numpy()]),
)
