"""``python -m ebcache_fast`` is ``ebcache-fast``."""

import sys

from ebcache_fast.apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
