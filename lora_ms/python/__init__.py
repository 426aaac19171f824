"""The names that users of transformers and PEFT know."""
