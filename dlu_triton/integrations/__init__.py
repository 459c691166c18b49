"""Drop-ins for other packages, each imported by its own name and only by those who have the package."""
