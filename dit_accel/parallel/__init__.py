"""More than one GPU for one generation: what sparse attention needs beside diffusers' splits."""
