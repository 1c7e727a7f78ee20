"""Several machines as one: the other ranks started, told what to do, watched and ended."""
