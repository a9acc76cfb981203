"""The commands, one module each; those of the preparation of datasets are in `prepare`."""
