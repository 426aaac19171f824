"""Adapters: where they go, how they are stored, how they are merged. Any Cell will do; models are never imported."""
