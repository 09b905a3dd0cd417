"""`python -m geodeploy`."""

from geodeploy.cli import main

main()
