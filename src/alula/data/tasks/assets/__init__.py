"""The data of the built-in tasks: parquet tables made by ``scripts/build_assets``; sources and licences in NOTICE."""
