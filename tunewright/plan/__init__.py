"""What can run here, and how: the support table, the rules, the devices, the split of a batch. Never imports torch."""
