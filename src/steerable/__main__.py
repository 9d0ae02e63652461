"""`python -m steerable`: the command line where its script is not on the path."""

from steerable.cli import main

if __name__ == "__main__":  # a worker process imports this file too
    main()
