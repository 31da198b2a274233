"""``python -m q_core.cli``."""

import sys

from q_core.cli import main

sys.exit(main())
