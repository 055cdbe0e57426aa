"""The same model on many devices: torch.distributed carries it, nothing of the model is written again."""
