"""The model in memory: loading, adapters, attention, the head, what is recomputed."""
