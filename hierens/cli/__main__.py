"""`python -m hierens.cli`, for launchers such as `accelerate launch -m hierens.cli train`."""

from hierens.cli import main

main()
