"""What every rank runs. Importing the package does not import torch."""
