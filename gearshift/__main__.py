"""`python -m gearshift` (and so `torchrun -m gearshift`)."""

from gearshift.cli import main

if __name__ == "__main__":
    main()
