"""``python -m alula``, for launchers that start modules: ``torchrun --nproc-per-node 2 -m alula run recipe.yaml``."""

from alula.cli import main

if __name__ == "__main__":
    main()
