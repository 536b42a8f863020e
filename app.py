"""The demo page in a browser: ``python app.py``."""

import sys

from dit_accel.demo import launch
from dit_accel.errors import DitAccelError

if __name__ == "__main__":
    try:
        launch()
    except DitAccelError as error:
        sys.exit(f"error: {error}")
