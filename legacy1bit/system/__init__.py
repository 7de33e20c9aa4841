"""Files, errors, hardware: what the operating system gives."""
