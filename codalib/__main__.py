"""`python -m codalib`: the `codalib` command of this interpreter's environment."""

import sys

from codalib.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
