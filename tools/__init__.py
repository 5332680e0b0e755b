"""Tools for working on the project; none of it is installed with the package."""
