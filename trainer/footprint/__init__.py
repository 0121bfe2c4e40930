"""What a model under a method holds and computes, seen on devices that have shapes and no memory."""
