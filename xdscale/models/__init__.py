"""Neural network modules: shapes in, shapes out."""
