"""The decoder and its families, read from and written to Hugging Face directories."""
