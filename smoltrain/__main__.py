"""`python -m smoltrain` is the command `smoltrain`."""

from smoltrain.cli import main

if __name__ == "__main__":
    main()
