"""`python -m bin_proxy` and the zip file start here."""

from bin_proxy.cli import main

if __name__ == "__main__":
    main()
