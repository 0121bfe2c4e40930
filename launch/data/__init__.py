"""`tunewright data`: look at data, and register it, before training on it."""
