"""``python -m fisherscope``: the same as the command ``fisherscope``."""

from fisherscope.cli import main

if __name__ == "__main__":
    main()
