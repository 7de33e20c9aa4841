"""The operating system: files, errors, hardware."""
