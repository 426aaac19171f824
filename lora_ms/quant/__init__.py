"""Weights of four bits: their formats in NumPy, from and to folders. Without MindSpore."""
