"""A server of models to many users at once."""
