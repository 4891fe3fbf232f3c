"""The `tcompile` command: one file per verb."""
