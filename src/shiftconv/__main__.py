"""``python -m shiftconv VERB``: the same as the command, for launchers such as torchrun and srun."""

from shiftconv.cli import main

if __name__ == "__main__":
    main()
