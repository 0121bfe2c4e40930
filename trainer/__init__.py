"""What every rank runs, and what follows training. Importing the package does not import torch."""
