"""One file a command: what ``lora-ms NAME`` does."""
