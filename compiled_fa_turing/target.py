"""What a Turing GPU is to a compiler."""

CAPABILITY = 75
SHARED_MEMORY = 65536  # bytes that a block can have
