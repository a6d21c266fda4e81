"""``python -m autodiffusion_optuna`` is ``adopt``."""

from autodiffusion_optuna.cli.main import main

if __name__ == "__main__":
    main()
