"""`python -m surefoot`, where the command is not on the PATH."""

from surefoot.cli.main import main

main()
