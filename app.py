"""The page in a browser, like ``dit-accel app``: ``python app.py --help`` tells its options."""

import sys

from dit_accel.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
