"""``python -m dit_accel.cli`` is ``dit-accel``, too: launchers of several processes take modules."""

from dit_accel.cli import main

main()
