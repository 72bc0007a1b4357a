"""Recipe (parse) -> plan (check, estimate) -> run (execute, export, verify)."""
