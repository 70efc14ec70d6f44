"""How values, code and errors travel between processes, and the files of large values."""
