"""`python -m katcore.cli`, as stages are started."""

from katcore.cli import main

main()
