"""The published systems: what each one trains, on which data, with which losses."""
