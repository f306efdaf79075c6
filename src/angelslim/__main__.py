"""``python -m angelslim``: the command line, for environments without the installed script."""

from .cli import main

if __name__ == "__main__":
    main()
