"""Small language models."""
