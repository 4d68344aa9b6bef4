"""Read-only views over Redis. Imports `common` only, never torch."""
