"""The command line as `python -m betakd_ray`."""

from betakd_ray.cli import main

if __name__ == "__main__":
    main()
