"""``python -m legacy1bit`` is the command line."""

import sys

from legacy1bit.main import main

sys.exit(main())
