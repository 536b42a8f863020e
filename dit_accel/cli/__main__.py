"""``python -m dit_accel.cli`` is ``dit-accel``, too: launchers of processes take modules."""

from dit_accel.cli import main

main()
