"""The entries of dvc.yaml: each reads folders, calls the library, and writes folders."""
