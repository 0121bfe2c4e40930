"""What can be set: the schema, its composition by Hydra, the files that settings name. Never imports torch."""
