"""The operators that cells compute with."""
