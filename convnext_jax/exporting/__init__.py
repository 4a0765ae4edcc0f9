"""A trained network as a file for programs that know nothing of this library."""
