"""Files in which models travel to other programs."""
