"""Ours by an `__init__.py`: torch-fidelity installs a package of the same name, which would win over a bare folder."""
