"""`python -m tcompile` is the `tcompile` command."""

from .compiler.cli.main import main

raise SystemExit(main())
