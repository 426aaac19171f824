"""The machine and its device."""
