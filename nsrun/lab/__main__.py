"""``python -m nsrun.lab``: hold a lab. Started by ``ttp lab up``; see holder.py."""

from nsrun.lab.holder import main

main()
