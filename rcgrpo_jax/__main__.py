"""`python -m rcgrpo_jax` is `rcgrpo`."""

import sys

from rcgrpo_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
