"""One file a method of adapting a model."""
