"""`python -m remanence` (and `accelerate launch -m remanence`)."""

from remanence.cli import main

if __name__ == "__main__":
    main()
