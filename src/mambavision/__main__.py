"""`python -m mambavision`: the command line."""

import sys

from mambavision.cli import main

sys.exit(main())
