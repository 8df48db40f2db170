"""Imports a source of rows of any kind into Parquet with the columns that a run knows."""
