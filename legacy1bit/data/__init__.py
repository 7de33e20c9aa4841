"""Texts, tokens and the corpora that are made of them."""
