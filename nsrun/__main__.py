"""``python -m nsrun`` is ``ttp``."""

from nsrun.client import main

main()
