"""`python -m dvpo` is `dvpo`."""

import sys

from dvpo.cli import main

sys.exit(main())
