"""`python -m hierens`: the program `hierens`, if its script is not installed."""

from hierens.cli import main

main()
