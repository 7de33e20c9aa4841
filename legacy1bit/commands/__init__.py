"""The commands of the program, a file each: ``add_arguments`` and ``run``."""
