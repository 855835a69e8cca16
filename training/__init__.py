"""What step1 needs beside its loop: recipes, optimizers, the state of a run and its directory,
processes, the CPU."""
