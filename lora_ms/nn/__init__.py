"""Cells and functions of the decoder; they take numbers and tensors, never a configuration object."""
