"""A computation recorded once as a graph of tensor operations and run as one program."""
