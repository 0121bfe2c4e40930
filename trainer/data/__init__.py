"""From a registry entry to token ids on disk: registry -> rows -> messages -> ids and labels -> memory-mapped cache."""
