"""The engine: caches, modulation and the steps of one sampling run."""
