"""Parameters that lie side by side in memory, so that all of them are one vector, too."""

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor


class FlatParameters:
    """Parameters, and a vector that has their memory: what is written to it they have, and nothing is copied.

    A parameter that is given a value, or other memory, leaves the vector. ``gather`` brings it back.

    Args:
        params: float32.
        vector: [n], all of their numbers, one after another. It gets its memory here.
    """

    def __init__(self, params: Sequence[Parameter], vector: Parameter):
        self.params = list(params)
        self.ends = np.cumsum([p.size for p in self.params]).tolist()
        self.memory = np.empty(self.ends[-1], np.float32)
        self.addresses = [0] * len(self.params)
        vector.assign_value(Tensor.from_numpy(self.memory))
        self.gather()

    def gather(self) -> None:
        """Gives every parameter its part of the memory, with the value that it has now."""
        for i, parameter in enumerate(self.params):
            if parameter.data_ptr() != self.addresses[i]:
                part = self.memory[self.ends[i] - parameter.size : self.ends[i]].reshape(parameter.shape)
                part[...] = parameter.asnumpy()
                parameter.assign_value(Tensor.from_numpy(part))
                self.addresses[i] = parameter.data_ptr()
