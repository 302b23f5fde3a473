"""`python -m looptransfer` is the command `looptransfer`."""

import sys

from looptransfer.command.cli import main

if __name__ == "__main__":
    sys.exit(main())
