"""Post-training: what makes an assistant of a base model."""
