"""The package as a library: ``legacy1bit.train``, ``legacy1bit.load``, and what they return."""
