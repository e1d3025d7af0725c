"""`python -m gemma_opt`."""

from gemma_opt.cli import main

main()
