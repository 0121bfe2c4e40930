"""The command line; preparing a run once; starting its ranks and watching them. Holds no model weights in memory."""
