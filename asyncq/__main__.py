"""`python -m asyncq` is the script `asyncq`."""

# The guard keeps the command line out of child processes, which import this module again.
if __name__ == "__main__":
    from asyncq.cli.main import main

    main()
