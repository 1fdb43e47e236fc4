"""`python -m hierens`: the program `hierens`, for where no script is installed."""

from hierens.cli import main

main()
