"""``python -m fastseg`` is the command ``fastseg``."""

from fastseg.cli import main

if __name__ == "__main__":
    main()
