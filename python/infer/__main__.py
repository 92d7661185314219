"""`python -m infer` is the command `infer`."""

from infer.cli import main

if __name__ == "__main__":
    main()
