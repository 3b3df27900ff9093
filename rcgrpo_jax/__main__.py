"""`python -m rcgrpo_jax` is `rcgrpo`."""

import sys

from rcgrpo_jax.cli.main import main

sys.exit(main())
