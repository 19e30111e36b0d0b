"""`python -m siliconlm` is the `silicon` command."""

from siliconlm.cli.app import main

if __name__ == "__main__":
    main()
