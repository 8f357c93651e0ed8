"""`python -m gcrl` is `gcrl`."""

import sys

from gcrl.cli import main

sys.exit(main())
