"""Entry point of `python -m agnostic_train` and `accelerate launch -m agnostic_train`."""

import sys

from agnostic_train.cli import main

sys.exit(main())
